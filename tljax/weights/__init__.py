"""Weights from elsewhere: a file of named arrays (`files`) becomes the parameters of a model by rules (`rules`)."""

from tljax.weights.files import SUFFIXES, read, write
from tljax.weights.rules import Rule, grafted, placed, rule

__all__ = ["SUFFIXES", "Rule", "grafted", "placed", "read", "rule", "write"]
