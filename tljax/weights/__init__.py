"""Weights from elsewhere: a file of named arrays (`files`) becomes the parameters of a model, and back (`layouts`), by
rules (`rules`)."""

from tljax.weights.files import HUB, INDEX, SUFFIXES, is_place, located, read, write
from tljax.weights.layouts import Move, changes, exported, grafted, moves, outline, without_inverse
from tljax.weights.rules import Rule, comments, names, pixels, read_rules, rule, rules_of

__all__ = [
    "HUB",
    "INDEX",
    "SUFFIXES",
    "Move",
    "Rule",
    "changes",
    "comments",
    "exported",
    "grafted",
    "is_place",
    "located",
    "moves",
    "names",
    "outline",
    "pixels",
    "read",
    "read_rules",
    "rule",
    "rules_of",
    "without_inverse",
    "write",
]
