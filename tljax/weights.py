"""Weights from elsewhere: a .safetensors or .npz file of named arrays becomes the parameters of a model.

Its leaves go through `graft`, by rules in the project's grammar; those that no rule names keep their name:

0.weight:to=hidden_0/kernel:transpose         renamed and transposed: PyTorch's nn.Linear keeps [out, in]
conv1.weight:to=conv_0/kernel:transpose=2+3+1+0   axes in another order: PyTorch's nn.Conv2d keeps [out, in, h, w]
bn.num_batches_tracked:drop                   left out

A rule is of one array, or of all below a name: `encoder:to=hidden_0` takes encoder/kernel to hidden_0/kernel. A name
with a ":" stands in double quotes: `"dense/kernel:0":to=hidden_0/kernel`. Pixels
reach the first stage divided by 255 and nothing else, so that a network which learnt on other inputs has to be given
them by its first stage. What is pickled is never read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tljax import graft, npz, paths, plugins
from tljax.types import InputError, Params

SUFFIXES = (".safetensors", ".npz")


class Rule(NamedTuple):
    """What becomes of one array, or of all below a prefix."""

    source: str
    """Its name in the file."""
    to: str
    """Its path in the model; the same name where none is given."""
    axes: tuple[int, ...] | None
    """New order of its axes; () reverses them; None leaves them."""
    drop: bool


def rule(text: str) -> Rule:
    """A rule as it is written; raises InputError for what is none.

    >>> rule("0.weight:to=hidden_0/kernel:transpose")
    Rule(source='0.weight', to='hidden_0/kernel', axes=(), drop=False)
    >>> rule("conv.weight:transpose=2+3+1+0").axes
    (2, 3, 1, 0)
    """
    form = "write NAME:to=PATH:transpose, NAME:transpose=2+3+1+0 or NAME:drop"
    name, words, options = plugins.parse(text)
    axes = options.get("transpose", "")
    good = set(words) <= {"transpose", "drop"} and options.keys() <= {"to", "transpose"} and (words or options)
    whole = not axes or all(axis.isdecimal() for axis in axes.split("+"))
    if not good or not whole or ("transpose" in words and axes) or ("drop" in words and (options or len(words) > 1)):
        raise InputError(f"rule '{text}' cannot be read: {form}")
    order = tuple(map(int, axes.split("+"))) if axes else () if "transpose" in words else None
    return Rule(name, plugins.unquoted(options.get("to", name)), order, "drop" in words)


def read(file: Path) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors or .npz file, as they are stored.

    Raises InputError for a file that is missing, of another kind, damaged, or holds pickled objects.
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise InputError(f"'{file}' is no {' or '.join(SUFFIXES)} file: convert it")
    if not file.is_file():
        raise InputError(f"'{file}' does not exist: give the path of a {file.suffix} file")
    return _safetensors(file) if file.suffix == ".safetensors" else npz.read(file)


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(file))
    except AttributeError as error:  # what NumPy is asked for and has not
        kind = str(error).rpartition("attribute ")[2].strip("'")
        raise InputError(f"'{file}' holds arrays of {kind}, a type that NumPy has not: save them as float32") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{file}' cannot be read as safetensors ({reason}): save it again, as float32") from error


def grafted(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Params) -> Params:
    """The arrays as parameters in the tree of `like` (abstract or real), by the rules.

    Raises InputError, naming paths and shapes, for a rule that matches nothing or a transpose of other axes, for a
    number that is not finite, and for whatever `graft.plan` refuses: an array without a place, a leaf without an
    array, a shape or dtype that differs. Nothing is cast.

    >>> like = {"head": {"kernel": np.zeros((3, 2), np.float32)}}
    >>> rules = [rule("0.weight:to=head/kernel:transpose")]
    >>> grafted({"0.weight": np.ones((2, 3), np.float32)}, rules, like)["head"]["kernel"].shape
    (3, 2)
    """
    kept: dict[str, np.ndarray] = dict(arrays)
    twice = [one.source for one in rules if [other.source for other in rules].count(one.source) > 1]
    if twice:
        raise InputError(f"two rules are of '{twice[0]}': keep one")
    for one in rules:
        names = [name for name in arrays if paths.inside((one.source,))(name)]
        if not names:
            raise InputError(f"rule '{one.source}' matches no array{plugins.nearest(one.source, arrays)}")
        for name in names:
            if one.drop:
                kept.pop(name, None)
            elif one.axes is not None:
                kept[name] = _transposed(name, arrays[name], one.axes)
    for name, array in kept.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"array '{name}' holds a number that is not finite: it is of a fit that diverged")
    rename = {one.source: one.to for one in rules if not one.drop and one.to != one.source}
    params, _ = graft.apply(graft.plan(kept, like, rename=rename), kept, like)
    return params


def _transposed(name: str, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    if axes and sorted(axes) != list(range(array.ndim)):
        order = "+".join(map(str, axes))
        raise InputError(f"array '{name}' {array.shape} has no axes {order}: name each of its {array.ndim} once")
    return np.ascontiguousarray(array.transpose(axes or None))
