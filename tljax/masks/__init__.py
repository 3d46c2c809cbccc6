"""Masks: which leaves of a pytree train. Plain pytrees, and functions on them.

A mask is the tree of the parameters with, for each leaf, a bool, a number (scales the leaf's update) or an
array (selects elements). True means trained, everywhere. None, integer leaves and running statistics
(`batch_stats`, as Linen names them) never train.
"""

from tljax.masks.build import by_glob, by_path, by_size, kept, leaf_name, top, under
from tljax.masks.check import is_strategy, lint, lint_phases, require_leaf
from tljax.masks.combine import also, intersect, invert, join, require_bools, scale, since, split, static, union
from tljax.masks.leaf import selects, trains, value
from tljax.masks.show import Row, digest, equal, from_json, load, save, table, to_json

__all__ = [
    "Row",
    "also",
    "by_glob",
    "by_path",
    "by_size",
    "digest",
    "equal",
    "from_json",
    "intersect",
    "invert",
    "is_strategy",
    "join",
    "kept",
    "leaf_name",
    "lint",
    "lint_phases",
    "load",
    "require_bools",
    "require_leaf",
    "save",
    "scale",
    "selects",
    "since",
    "split",
    "static",
    "table",
    "to_json",
    "top",
    "trains",
    "under",
    "union",
    "value",
]
