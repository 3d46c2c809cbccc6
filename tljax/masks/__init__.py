"""Masks: which leaves of a pytree train. Plain pytrees, and functions on them.

A mask is the tree of the parameters with, for each leaf, a bool, a number (scales the leaf's update), a bool array
(selects elements) or a float array (scales by element; 0 freezes exactly); `canonical` makes every mask so. True means
trained, everywhere. None, integer leaves and running statistics never train, whatever a mask says: `batch_stats` of
Linen, variables of NNX that are no `nnx.Param`, `running_mean`, `moving_variance`, `ema_..` and their like. Masks are
built outside `jax.jit`, and are no argument of it.
"""

from tljax.masks.build import PER, by_glob, by_path, by_size, kept, layers, leaf_name, top, under
from tljax.masks.cell import Cell, cells, cells_of, switched
from tljax.masks.check import is_strategy, lint, lint_phases, lint_schedule, require_leaf
from tljax.masks.combine import (
    also,
    canonical,
    intersect,
    invert,
    join,
    parted,
    require_bools,
    scale,
    since,
    split,
    static,
    union,
)
from tljax.masks.leaf import Elements, chosen, selects, trains, value
from tljax.masks.show import Row, digest, equal, from_json, load, save, table, to_json

__all__ = [
    "PER",
    "Cell",
    "Elements",
    "Row",
    "also",
    "by_glob",
    "by_path",
    "by_size",
    "canonical",
    "cells",
    "cells_of",
    "chosen",
    "digest",
    "equal",
    "from_json",
    "intersect",
    "invert",
    "is_strategy",
    "join",
    "kept",
    "layers",
    "leaf_name",
    "lint",
    "lint_phases",
    "lint_schedule",
    "load",
    "parted",
    "require_bools",
    "require_leaf",
    "save",
    "scale",
    "selects",
    "since",
    "split",
    "static",
    "switched",
    "table",
    "to_json",
    "top",
    "trains",
    "under",
    "union",
    "value",
]
