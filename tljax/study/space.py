"""Search spaces: which flags a search varies, and within what.

`learning_rate:log:1e-3:1`, `label_smoothing:between:0:0.2`, `strategy.last_k.k:int:1:3`, `activation:in:relu,tanh`:
a flag, or an option of a penalty or a strategy that the flags name, then how it is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tljax import plugins
from tljax.types import InputError

KINDS = ("log", "between", "int", "in")


class Range(NamedTuple):
    """One dimension of a search."""

    name: str
    """A flag, or `penalty.NAME.OPTION` or `strategy.NAME.OPTION`."""
    kind: str
    """One of KINDS: log and between are real, int whole, in a choice."""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is written in a flag."""
        return ":".join([self.name, self.kind, *ends(self)])


def ends(dimension: Range) -> list[str]:
    """The two bounds of a dimension as text, or its choices as one text."""
    if dimension.kind == "in":
        return [",".join(dimension.choices)]
    return [f"{dimension.low:g}", f"{dimension.high:g}"]


def parse(text: str) -> Range:
    """Read one dimension; raises InputError if the text is not one.

    >>> parse("learning_rate:log:1e-3:1")
    Range(name='learning_rate', kind='log', low=0.001, high=1.0, choices=())
    """
    name, kind, *rest = [part.strip() for part in plugins.split(text, ":")] + [""]
    rest = rest[:-1] if kind else []
    if kind not in KINDS or not name:
        raise InputError(f"space '{text}' is not of the form NAME:KIND:...: KIND is one of {', '.join(KINDS)}")
    if kind == "in":
        choices = [part.strip() for part in plugins.split(":".join(rest), ",")]
        if not all(choices) or len(set(choices)) != len(choices) or len(choices) < 2:
            raise InputError(f"space '{text}': give two values or more after 'in', with commas, each once")
        return Range(name, kind, choices=tuple(choices))
    if len(rest) != 2:
        raise InputError(f"space '{text}': write {name}:{kind}:LOW:HIGH")
    low, high = (_number(part, kind, text) for part in rest)
    if not low < high:
        raise InputError(f"space '{text}': {rest[0]} is not below {rest[1]}")
    if kind == "log" and low <= 0:
        raise InputError(f"space '{text}': a logarithm needs bounds above 0")
    return Range(name, kind, low, high)


def _number(text: str, kind: str, whole: str) -> float:
    try:
        value = int(text) if kind == "int" else float(text)
    except ValueError as error:
        wanted = "a whole number" if kind == "int" else "a number"
        raise InputError(f"space '{whole}': '{text}' is not {wanted}") from error
    if not math.isfinite(value):
        raise InputError(f"space '{whole}': '{text}' is not finite")
    return value


def read(texts: Sequence[str]) -> tuple[Range, ...]:
    """Read all dimensions of a space; raises InputError if there is none, and if one is given twice."""
    ranges = tuple(parse(text) for text in texts)
    names = [dimension.name for dimension in ranges]
    if not names:
        example = "`space=learning_rate:log:1e-3:1`"
        raise InputError(f"`space=` is not given: name a flag and its range, such as {example}")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"`space=` names '{name}' twice: keep one")
    return ranges


def applied(flags: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The flags with what was chosen for each name of a space.

    Raises InputError for an option of a penalty or a strategy that the flags do not name.

    >>> applied({"penalty": "l2:weight=0.1"}, {"penalty.l2.weight": 0.5, "epochs": 3})
    {'penalty': 'l2:weight=0.5', 'epochs': 3}
    """
    changed = dict(flags)
    for name, value in chosen.items():
        flag, _, inner = name.partition(".")
        if not inner:
            changed[name] = value
        elif flag == "penalty":
            terms = [term for term in plugins.split(changed.get("penalty", ""), ",") if term]
            changed["penalty"] = ",".join(_with(terms, inner, value, "penalty"))
        elif flag == "strategy":
            changed["strategies"] = tuple(_with(list(changed.get("strategies", ())), inner, value, "strategies"))
        else:
            raise InputError(f"space '{name}': only penalty.NAME.OPTION and strategy.NAME.OPTION have dots")
    return changed


def _with(specs: Sequence[str], inner: str, value: Any, flag: str) -> list[str]:
    """The specs, where that of one name has another value of one option; `inner` is NAME.OPTION."""
    name, _, option = inner.rpartition(".")
    names = [strategy_name(spec) if flag == "strategies" else plugins.parse(spec).name for spec in specs]
    if name not in names:
        raise InputError(f"space '{inner}': '{name}' is not in `{flag}=`{plugins.nearest(name, names)}")
    changed = []
    for text, name_of_spec in zip(specs, names, strict=True):
        alias, rest = plugins.named(text) if flag == "strategies" else ("", text)
        spec = plugins.parse(rest)
        options = {**spec.options, option: value} if name_of_spec == name else spec.options
        words = map(plugins.quoted, (spec.name, *spec.words))
        written = ":".join([*words, *(f"{key}={setting}" for key, setting in options.items())])
        changed.append(f"{alias}={written}" if alias else written)
    return changed


def strategy_name(strategy: str) -> str:
    """The name of a strategy in strategy.NAME.OPTION: its name, or its spec's without options.

    >>> strategy_name("LN_QV=mine.py:strategy:k=2"), strategy_name("mine.py:strategy"), strategy_name("last_k:k=2")
    ('LN_QV', 'mine.py', 'last_k')
    """
    name, spec = plugins.named(strategy)
    return name or plugins.parse(spec).name


def of_strategy(dimension: str) -> str:
    """The NAME of a dimension strategy.NAME.OPTION; "" of another.

    >>> of_strategy("strategy.mine.py.k"), of_strategy("learning_rate")
    ('mine.py', '')
    """
    flag, _, inner = dimension.partition(".")
    return inner.rpartition(".")[0] if flag == "strategy" else ""


def at_edge(dimension: Range, value: Any) -> str:
    """'lowest' or 'highest' where a value is within 2 % of an end of its range, on the scale of the range; else ''.

    >>> at_edge(parse("learning_rate:log:1e-3:1"), 0.99)
    'highest'
    """
    if dimension.kind == "in":
        return ""
    scale = math.log if dimension.kind == "log" else float
    share = (scale(value) - scale(dimension.low)) / (scale(dimension.high) - scale(dimension.low))
    near = 0.0 if dimension.kind == "int" else 0.02
    return "lowest" if share <= near else "highest" if share >= 1 - near else ""
