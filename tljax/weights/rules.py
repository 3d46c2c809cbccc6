"""Named arrays become the parameters of a model by rules.

The leaves go through `graft`, by rules in the project's grammar; those that no rule names keep their name:

0.weight:to=hidden_0/kernel:transpose         renamed and transposed: PyTorch's nn.Linear keeps [out, in]
conv1.weight:to=conv_0/kernel:transpose=2+3+1+0   axes in another order: PyTorch's nn.Conv2d keeps [out, in, h, w]
bn.num_batches_tracked:drop                   left out

A rule applies to one array, or to all below a name: `encoder:to=hidden_0` takes encoder/kernel to hidden_0/kernel, and
encoder.layer.kernel, as PyTorch writes names, to hidden_0/layer/kernel. ('.' separates the parts of a name that has
no '/'.) A name with a ":" stands in double quotes: `"dense/kernel:0":to=hidden_0/kernel`. Where several rules rename
an array, the first does. A dry run of `experiments.transfer` shows what went where.

Pixels reach the first stage divided by 255 and nothing else, so that a network which learnt on other inputs has to be
given them by its first stage. What is pickled is never read.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tljax import graft, paths, plugins
from tljax.types import InputError, Params


class Rule(NamedTuple):
    """How one array of a file, or all below a prefix, becomes parameters."""

    source: str
    """The name of the array, or the prefix, in the file."""
    to: str
    """The path in the model; the same as `source` where the rule has no `to`."""
    axes: tuple[int, ...] | None
    """The new order of the axes; () reverses them; None leaves them."""
    drop: bool
    """Whether the array is left out."""


def rule(text: str) -> Rule:
    """Parse the text of a rule. Raises InputError if the text is not a rule.

    >>> rule("0.weight:to=hidden_0/kernel:transpose")
    Rule(source='0.weight', to='hidden_0/kernel', axes=(), drop=False)
    >>> rule("conv.weight:transpose=2+3+1+0").axes
    (2, 3, 1, 0)
    """
    form = "write NAME:to=PATH:transpose, NAME:transpose=2+3+1+0 or NAME:drop"
    name, words, options = plugins.parse(text)
    axes = options.get("transpose", "")
    known = set(words) <= {"transpose", "drop"} and options.keys() <= {"to", "transpose"} and (words or options)
    numeric = not axes or all(axis.isdecimal() for axis in axes.split("+"))
    if not known or not numeric or ("transpose" in words and axes) or ("drop" in words and (options or len(words) > 1)):
        raise InputError(f"rule '{text}' cannot be read: {form}")
    order = tuple(map(int, axes.split("+"))) if axes else () if "transpose" in words else None
    return Rule(name, plugins.unquoted(options.get("to", name)), order, "drop" in words)


def grafted(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Params) -> Params:
    """The arrays as parameters in the tree of `like` (abstract or real), by the rules.

    Nothing is cast. Raises InputError, naming paths and shapes, for a rule that matches nothing, a transpose of axes
    that the array lacks, a number that is not finite, an array without a leaf, a leaf without an array, and for all
    that `graft.plan` refuses: a shape or dtype that differs.

    >>> like = {"head": {"kernel": np.zeros((3, 2), np.float32)}}
    >>> rules = [rule("0.weight:to=head/kernel:transpose")]
    >>> grafted({"0.weight": np.ones((2, 3), np.float32)}, rules, like)["head"]["kernel"].shape
    (3, 2)
    """
    targets = placed(arrays, rules)
    _require_all_placed(arrays, targets, like)
    source = {name: array for name, array in arrays.items() if targets[name] is not None}
    for rule in rules:
        for name in source:
            if rule.axes is not None and _applies(rule, name):
                source[name] = _transposed(name, arrays[name], rule.axes)
    for name, array in source.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"array '{name}' holds a number that is not finite: it is of a fit that diverged")
    # The longest names first: an array's name may be the prefix of others.
    rename = {name: targets[name] or "" for name in sorted(source, key=len, reverse=True) if targets[name] != name}
    params, _ = graft.apply(graft.plan(source, like, rename=rename), source, like)
    return params


def placed(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, str | None]:
    """{name of an array: its path in the model}, by the rules; None for an array that is left out.

    Raises InputError for a rule that matches nothing, a rule that renames nothing as others come before it, and two
    rules for one name.

    >>> placed(["tok.pos", "tok.0.bias", "head.bias", "steps"], [rule("tok:to=embed"), rule("steps:drop")])
    {'tok.pos': 'embed/pos', 'tok.0.bias': 'embed/0/bias', 'head.bias': 'head.bias', 'steps': None}
    """
    names = list(names)
    sources = [rule.source for rule in rules]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise InputError(f"two rules are of '{twice[0]}': keep one")
    for rule in rules:
        if not any(_applies(rule, name) for name in names):
            hint = plugins.nearest(rule.source, names)
            hint = hint if hint.startswith("; nearest") else f"; arrays: {paths.some(names, _MOST_NAMES)}"
            raise InputError(f"rule '{rule.source}' matches no array{hint}")
    targets: dict[str, str | None] = {}
    used = set()
    for name in names:
        applying = [rule for rule in rules if _applies(rule, name)]
        renaming = [rule for rule in applying if not rule.drop and rule.to != rule.source][:1]
        for rule in renaming or applying[:1]:
            used.add(rule.source)
            rest = name[len(rule.source) :]
            targets[name] = rule.to + (rest if "/" in name else rest.replace(".", "/"))
        if any(rule.drop for rule in applying):
            targets[name] = None
        targets.setdefault(name, name)
    for rule in rules:
        if not rule.drop and rule.to != rule.source and rule.source not in used:
            raise InputError(f"rule '{rule.source}' renames nothing, as a rule before it does: put it first")
    return targets


_MOST_NAMES = 4
"""The most names that an error lists."""


def _applies(rule: Rule, name: str) -> bool:
    """Whether a rule applies to an array: to its name, or to a name above it."""
    separator = "/" if "/" in name else "."
    return name == rule.source or name.startswith(rule.source + separator)


def _require_all_placed(arrays: Mapping[str, np.ndarray], targets: Mapping[str, str | None], like: Params) -> None:
    """Raise InputError, with a rule as an example, if an array has no leaf or a leaf has no array."""
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in paths.items(like)}
    unplaced = [name for name, path in targets.items() if path is not None and path not in shapes]
    unfilled = [path for path in shapes if path not in targets.values()]
    arrays_have = f"{paths.some(unplaced, _MOST_NAMES)} of the file's arrays " + (
        "has" if len(unplaced) == 1 else "have"
    )
    leaves_have = f"{paths.some(unfilled, _MOST_NAMES)} of the model's leaves " + (
        "has" if len(unfilled) == 1 else "have"
    )
    if unplaced and unfilled:
        pairs = [(name, path) for name in unplaced for path in unfilled]
        alike = [pair for pair in pairs if arrays[pair[0]].shape == shapes[pair[1]]]
        transposed = [pair for pair in pairs if arrays[pair[0]].shape == shapes[pair[1]][::-1]]
        name, path = (alike or transposed or pairs)[0]
        example = f"{plugins.quoted(name)}:to={plugins.quoted(path)}"
        example += ":transpose" if transposed and not alike else ""
        raise InputError(
            f"{arrays_have} no place in the model, and {leaves_have} no array: say which is which by rules, such as "
            f"`source_rename={example}`"
        )
    if unplaced:
        raise InputError(
            f"{arrays_have} no place in the model: build the model that they are of, or leave them out by rules, "
            f"such as `source_rename={plugins.quoted(unplaced[0])}:drop`"
        )
    if unfilled:
        raise InputError(f"{leaves_have} no array in the file: it is of another model; build that one")


def _transposed(name: str, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The array with its axes in a new order; () reverses them. Raises InputError for axes that it lacks."""
    if axes and sorted(axes) != list(range(array.ndim)):
        order = "+".join(map(str, axes))
        raise InputError(f"array '{name}' {array.shape} has no axes {order}: name each of its {array.ndim} once")
    return np.ascontiguousarray(array.transpose(axes or None))
