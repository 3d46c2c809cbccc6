"""The layers of a model by the paths of its leaves: which parameters stand beside a leaf, and where the model is."""

from collections.abc import Iterable, Sequence

COLLECTIONS = ("params", "batch_stats")
"""Names that part a norm's statistics from its scale and bias."""


def beside(path: str, others: Iterable[str]) -> list[str]:
    """The other paths in the innermost layer of a leaf that holds any of them; [] if no layer does.

    Names of collections are passed over, and the whole tree is no layer.

    >>> beside("batch_stats/block/bn/mean", ["params/block/bn/scale", "params/block/conv/kernel", "params/head/bias"])
    ['params/block/bn/scale']
    >>> beside("block/bn/mean", ["block/conv/kernel", "head/bias"]), beside("mean", ["head/bias"])
    (['block/conv/kernel'], [])
    """
    named = [(other, _names(other)) for other in others]
    layer = _names(path)[:-1]
    while layer:
        if held := [other for other, names in named if names[: len(layer)] == layer]:
            return held
        layer = layer[:-1]
    return []


def from_the_model(path: str, others: Iterable[str]) -> str | None:
    """The end of a state's path that begins with a name with which another path begins; None if it has no such name.

    >>> from_the_model("0/bn1/mean/value", ["bn1/scale/value"]), from_the_model("opt_state/0/count", ["bn1/scale"])
    ('bn1/mean/value', None)
    """
    first = {_names(other)[0] for other in others if _names(other)}
    names = _names(path)
    place = next((number for number, name in enumerate(names) if name in first), None)
    return None if place is None else "/".join(names[place:])


def shared_start(path_and_others: Sequence[str]) -> str:
    """The layer that holds all of these paths.

    >>> shared_start(["block/bn/mean", "block/bn/scale", "block/bn/bias"])
    'block/bn'
    """
    rows = [_names(path)[:-1] for path in path_and_others]
    shared = next((n for n, names in enumerate(zip(*rows, strict=False)) if len(set(names)) > 1), min(map(len, rows)))
    return "/".join(rows[0][:shared])


def root(state: Sequence[str]) -> list[str]:
    """The names that lead to the model in a state, by the paths of its leaves: its `params`, or its first element.

    >>> root(["opt_state/0/count", "params/head/bias"]), root(["0/head/bias", "1/step"]), root(["head/bias"])
    (['params'], ['0'], [])
    """
    prefix: list[str] = []
    rows = [path.split("/") for path in state]
    while True:
        rows = [names for names in rows if len(names) > len(prefix) and names[: len(prefix)] == prefix]
        first = {names[len(prefix)] for names in rows}
        if "params" in first:
            return [*prefix, "params"]
        if not first or not all(name.isdigit() for name in first):
            return prefix
        prefix = [*prefix, "0"]


def in_model(full: str, path: str, model: Sequence[str]) -> str:
    """The path of a leaf within its model, so that an optimizer's state has it at the end of its own paths.

    `full` is its path in the state, `path` that in the tree that was picked, and `model` leads to the model. It is no
    shorter than `path` without a collection's name.

    >>> in_model("0/bn1/mean", "mean", ["0"]), in_model("params/bn1/scale", "params/bn1/scale", ["params"])
    ('bn1/mean', 'bn1/scale')
    """
    picked, names = path.split("/"), full.split("/")
    picked = picked[1:] if picked[0] in COLLECTIONS and len(picked) > 1 else picked
    for count in range(1, len(names) - len(picked) + 1):
        if names[:count] == list(model) or names[count - 1] in COLLECTIONS:
            return "/".join(names[count:])
    return "/".join(picked)


def shared_end(path: str, other: str) -> int:
    """How many names two paths share at their end.

    >>> shared_end("opt_state/mu/head/bias", "params/head/bias")
    2
    """
    pairs = list(zip(reversed(path.split("/")), reversed(other.split("/")), strict=False))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in COLLECTIONS]
