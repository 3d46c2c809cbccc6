"""The grammar of rules that say which arrays of a file become which leaves of a model, and back. A rule a line:

0.weight:to=hidden_0/kernel:transpose             renamed and transposed: PyTorch's nn.Linear keeps [out, in]
conv1.weight:to=conv_0/kernel:transpose=2+3+1+0   axes in another order: PyTorch's nn.Conv2d keeps [out, in, h, w]
layers.*.attn.*.bias:to=block_*/*/bias            a star is a part of a name, or a piece of one; each goes to its place
stages.*.conv.*:to=block_*+1/conv/*               a star that is a number may be moved by another
{scale,offset}:to=norm/{scale,bias}               several names, each to its own
{cls_token,token}:to=embedding/class_token        either name, whichever the file has
blocks.*.qkv:split:to=block_*/{query,key,value}   one array cut into several leaves, along axis 0 or `split=1`
{token,grid}:join:to=embedding/position           several arrays joined to one leaf, along axis 0 or `join=1`
q.weight:to=query/kernel:transpose:reshape=D+(heads+d)   one axis becomes two: those that were one stand in brackets
pos_embed:to=position:reshape=()+n+D              an axis of length 1 is left out
cls:to=class_token:reshape=(1+D)                  an axis of length 1 is added: [D] to [1, D]
out.weight:to=kernel:reshape=768+12+64            the new shape in numbers; without `=` it is that of the leaf
pos_embed:to=position:resize                      learned positions for the grid of the model (`tljax.weights.resize`)
patch.weight:to=patch/kernel:channels             a convolution's kernel for another number of input channels
**:cast                                           floats of another dtype become the leaf's, or `cast=float32`
**.num_batches_tracked:drop                       left out
head.bias:to=head/bias:optional                   it may match nothing

A rule applies to one array, or to all below a name: `encoder:to=hidden_0` takes encoder/kernel to hidden_0/kernel, and
encoder.layer.kernel, as PyTorch writes names, to hidden_0/layer/kernel. ('.' separates the parts of a name that has
no '/'.) `*` stays within a part, `**` does not. Steps (transpose, reshape, split, join, resize, channels) are taken in
the order in which they are written. A name with a ":" stands in double quotes: `"dense/kernel:0":to=hidden_0/kernel`.
Where several rules rename an array, the first does, with its steps; if it has none, those of the last rule that applies
and has some. Any rule that casts it does. One that drops it does so wherever it stands, if it has no star; one with a
star (`**:drop` in the last line) leaves what an earlier rule renames or changes. Arrays that no rule names keep their
name.

A file of rules (NAME.rules) has a rule a line; what follows a '#' at the beginning of a line or after a blank is a
comment. Errors name the file, the line and the column.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tljax import files, paths, plugins
from tljax.types import InputError
from tljax.weights import resize

FOLDER = Path(__file__).parent.parent / "models"
"""Where the files of rules are that have a name: beside the models."""
SUFFIX = ".rules"


class Step(NamedTuple):
    """What is done with an array (`split`: to several, `join`: to one of several)."""

    kind: str
    """'transpose', 'reshape', 'split', 'join', 'resize' or 'channels'."""
    value: Any = None
    """transpose: the new order of the axes, () reverses them. reshape: a `Shape`, or None for the leaf's. split, join,
    channels: an axis. resize: (convention, grids)."""


class Shape(NamedTuple):
    """The shape that a reshape gives."""

    axes: tuple[str, ...]
    """A number, or the letters of a length that the leaf has; an axis that the leaf has not is none of them."""
    groups: tuple[tuple[int, ...], ...] | None
    """For each axis of the array before, the positions in `axes` of those that it becomes; None if that is not said."""


class Rule(NamedTuple):
    """How one array of a file, several, or all below a prefix, become parameters."""

    source: str
    """The pattern of names in the file, as it was written."""
    sources: tuple[str, ...]
    """The patterns that its braces stand for."""
    to: tuple[str, ...]
    """The paths in the model; empty where the rule has no `to`."""
    steps: tuple[Step, ...] = ()
    cast: str | None = None
    """The dtype that floats become; '' is the leaf's, None: they stay as they are."""
    drop: bool = False
    """Whether the arrays are left out."""
    optional: bool = False
    """Whether it may match nothing."""
    text: str = ""
    place: str = ""
    """FILE:LINE of a rule in a file."""

    @property
    def renames(self) -> bool:
        """Whether it gives arrays another name."""
        return bool(self.to) and not self.drop and self.to != self.sources

    @property
    def casts_alone(self) -> bool:
        """Whether it casts and does nothing else, so that another rule may be of the same name."""
        return self.cast is not None and not self.to and not self.steps

    @property
    def shown(self) -> str:
        """The rule in a message."""
        return f"{self.place} '{self.text}'" if self.place else f"rule '{self.text}'"


FORM = "write NAME:to=PATH:transpose, NAME:transpose=2+3+1+0 or NAME:drop"
_WORDS = (
    *("to", "transpose", "reshape", "split", "join", "resize", "channels"),
    *("cast", "drop", "optional"),
)
_DTYPES = ("float32", "float16", "bfloat16", "float64")
STAR = re.compile(r"(\*\*?)([+-][0-9]+)?")
"""A star of a path in the model, and the number that it is moved by."""


def rule(text: str) -> Rule:
    """Parse the text of a rule. Raises InputError if the text is not a rule.

    >>> parsed = rule("0.weight:to=hidden_0/kernel:transpose")
    >>> parsed.source, parsed.to, parsed.steps
    ('0.weight', ('hidden_0/kernel',), (Step(kind='transpose', value=()),))
    >>> rule("conv.weight:transpose=2+3+1+0").steps[0].value
    (2, 3, 1, 0)
    >>> rule("blocks.*.qkv:split:to=block_*/{query,key,value}").to
    ('block_*/query', 'block_*/key', 'block_*/value')
    """
    try:
        return _parsed(text)
    except _Fault as fault:
        raise InputError(f"rule '{text}' cannot be read: {fault.reason}; {FORM}") from fault


def rules_of(text: str, name: str) -> tuple[Rule, ...]:
    """The rules of a file's text. Raises InputError, with NAME:LINE:COLUMN, for a line that is not a rule.

    >>> [each.place for each in rules_of("# a comment\\nbn.t:drop  # another\\n", "mine.rules")]
    ['mine.rules:2']
    >>> rules_of("\\n  a.weight:to=a/kernel:transpose=0+x\\n", "mine.rules")
    Traceback (most recent call last):
    tljax.types.InputError: mine.rules:2:36: 'x' is no number of an axis
    """
    rules: list[Rule] = []
    lines: dict[tuple[str, bool], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = re.split(r"(?:^|\s)#", line, maxsplit=1)[0]
        if not content.strip():
            continue
        indent = len(content) - len(content.lstrip())
        try:
            parsed = _parsed(content.strip())
            source = parsed.source, parsed.casts_alone
            if source in lines:
                raise _Fault(f"line {lines[source]} is of '{parsed.source}' too: keep one")
        except _Fault as fault:
            raise InputError(f"{name}:{number}:{indent + fault.column + 1}: {fault.reason}") from fault
        lines[source] = number
        rules.append(parsed._replace(place=f"{name}:{number}"))
    if not rules:
        raise InputError(f"'{name}' holds no rule: write one a line, such as 0.weight:to=hidden_0/kernel:transpose")
    return tuple(rules)


def read_rules(name: str) -> tuple[Rule, ...]:
    """The rules of a file, by its path, or by the name of one that lies beside the models.

    Raises InputError if there is none, and as `rules_of` does.

    >>> read_rules("vit_hff")
    Traceback (most recent call last):
    tljax.types.InputError: there are no rules 'vit_hff'; nearest: 'vit_hf', 'vit_timm', 'resnet_hf'
    """
    file = rules_file(name)
    if file is None and Path(name).is_dir():
        raise InputError(f"the rules '{name}' are a folder: give a file of rules in it")
    if file is None:
        raise InputError(f"there are no rules '{name}'{plugins.nearest(name, names())}")
    return rules_of(files.text(file), file.name)


def pixels(name: str) -> str:
    """What the comments of a file of rules say of the pixels that its checkpoints learnt on; '' where they say nothing.

    >>> pixels("resnet_hf")
    "Hugging Face's ResNets learnt on pixels=imagenet."
    """
    return comments(name, "pixels=")


def comments(name: str, word: str) -> str:
    """The comment lines of a file of rules that have a word; '' where none has.

    >>> comments("vit_hf", "Build ")
    'Build vit:size=...:patch=...:eps=1e-12.'
    """
    file = rules_file(name)
    lines = files.text(file).splitlines() if file else []
    return " ".join(line.strip("# ") for line in lines if line.startswith("#") and word in line)


def rules_file(name: str) -> Path | None:
    """The file that a name or path of rules stands for; None if there is none."""
    shipped = FOLDER / f"{name}{SUFFIX}"
    file = shipped if name in names() else Path(name)
    return file if file.is_file() else None


def names() -> list[str]:
    """The names of the rules that are shipped.

    >>> "vit_timm" in names()
    True
    """
    return sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}"))


class _Fault(Exception):
    """What is wrong with the text of a rule, and at which of its characters, from 0."""

    def __init__(self, reason: str, column: int = 0):
        super().__init__(reason)
        self.reason, self.column = reason, column


def _parsed(text: str) -> Rule:
    """Raises _Fault if the text is not a rule."""
    for opening, closing in ("{}", "()"):
        if text.count(opening) != text.count(closing) and '"' not in text:
            raise _Fault("a bracket is not closed", max(text.find(opening), 0))
    parts = plugins.split(text, ":")
    columns = [sum(map(len, parts[:i])) + i for i in range(len(parts))]
    source = plugins.unquoted(parts[0].strip())
    if not source:
        raise _Fault("no name stands before the first ':'")
    if len(parts) == 1:
        raise _Fault("nothing follows the name", len(text))
    to: tuple[str, ...] = ()
    steps: list[Step] = []
    options: dict[str, str] = {}
    for part, column in zip(parts[1:], columns[1:], strict=True):
        column += len(part) - len(part.lstrip())
        key, equals, value = part.strip().partition("=")
        inside = column + len(key) + 1
        if key not in _WORDS:
            reason = (
                f"'{key}' is no word of rules{plugins.nearest(key, _WORDS)}" if key else "nothing is between two ':'"
            )
            raise _Fault(reason, column)
        if equals and not value:
            raise _Fault(f"nothing follows '{key}='", inside)
        if key in options and (key in ("to", "cast", "drop", "optional") or (steps and steps[-1].kind == key)):
            raise _Fault(f"'{key}' is given twice", column)
        options[key] = value
        if key == "to":
            to = _names(plugins.unquoted(value), inside)
            if not value:
                raise _Fault("nothing follows 'to'", inside)
        elif key in ("drop", "optional"):
            if equals:
                raise _Fault(f"'{key}' takes no value", inside)
        elif key == "cast":
            if value not in ("", *_DTYPES):
                raise _Fault(f"'{value}' is none of {', '.join(_DTYPES)}", inside)
        else:
            steps.append(Step(key, _VALUES[key](value, inside)))
    if "drop" in options and set(options) - {"drop", "optional"}:
        raise _Fault("what is dropped has no other words than 'optional'")
    if set(options) == {"optional"}:
        raise _Fault("'optional' says nothing by itself")
    sources = _names(source, 0)
    column = text.find("to=") + 3
    _require_pairs(sources, to, [step.kind for step in steps], max(column, 0))
    return Rule(
        source, sources, to, tuple(steps), options.get("cast"), "drop" in options, "optional" in options, text.strip()
    )


def _names(pattern: str, column: int) -> tuple[str, ...]:
    """The patterns that the braces of one stand for."""
    try:
        return tuple(paths.expanded(pattern))
    except InputError as error:
        raise _Fault(str(error), column) from error


def _require_pairs(sources: Sequence[str], to: Sequence[str], kinds: Sequence[str], column: int) -> None:
    """Raises _Fault unless names and paths fit each other: as many, and as many stars."""
    if kinds.count("split") + kinds.count("join") > 1:
        raise _Fault("an array is split or joined once")
    if "split" in kinds:
        if len(to) < 2:
            raise _Fault("'split' needs several paths: to=block_*/{query,key,value}/kernel", column)
        if len(sources) > 1:
            raise _Fault("'split' is of one array: write a rule for each")
    elif "join" in kinds:
        if len(sources) < 2:
            raise _Fault("'join' needs several names: {token,grid}:join:to=embedding/position")
        if len(to) != 1:
            raise _Fault("'join' gives one leaf: name one path", column)
    elif to and len(sources) % len(to):
        raise _Fault(
            f"{len(sources)} names and {len(to)} paths: give as many, or cut one array by 'split', or join several by "
            "'join'",
            column,
        )
    for path in to:
        stars = [match[1] for match in STAR.finditer(path)]
        for name in sources:
            if [match[0] for match in re.finditer(r"\*\*?", name)] != stars:
                raise _Fault(f"'{name}' and '{path}' have other stars: each star of the name goes to one", column)


def _axes(value: str, column: int) -> tuple[int, ...]:
    """The axes of a transpose."""
    for axis, place in _cut(value):
        if not axis.isdecimal() or len(axis) > 2:
            raise _Fault(f"'{axis}' is no number of an axis", column + place)
    return tuple(int(axis) for axis, _ in _cut(value))


def _axis(default: int, value: str, column: int) -> int:
    """The axis of a split, a join or channels."""
    if not value:
        return default
    if not re.fullmatch("-?[0-9]{1,2}", value):
        raise _Fault(f"'{value}' is no number of an axis", column)
    return int(value)


def _shape(value: str, column: int) -> Shape | None:
    """The shape of a reshape; None where it says none."""
    if not value:
        return None
    axes: list[str] = []
    groups: list[tuple[int, ...]] = []
    for item, place in _cut(value):
        inner = item[1:-1] if item.startswith("(") and item.endswith(")") else item
        words = [word for word, _ in _cut(inner)] if inner else []
        for word in words:
            if not re.fullmatch(r"-1|[1-9][0-9]{0,8}|[A-Za-z_]\w*", word):
                raise _Fault(f"'{word}' is no length: write a number, or letters", column + place)
        groups.append(tuple(range(len(axes), len(axes) + len(words))))
        axes += words
    numbers = all(re.fullmatch("-?[0-9]+", axis) for axis in axes) and "(" not in value
    if numbers and axes.count("-1") > 1:
        raise _Fault("only one length may be -1", column)
    if not numbers and "-1" in axes:
        raise _Fault("-1 stands among numbers alone: write letters for a length that the leaf has", column)
    return Shape(tuple(axes), None if numbers else tuple(groups))


def _grids(value: str, column: int) -> Any:
    """What a resize says."""
    grids = resize.parsed(value)
    if grids is None:
        known = ", ".join(resize.CONVENTIONS)
        raise _Fault(f"'{value}' is none of {known}, nor a grid such as 14x14", column)
    return grids


_VALUES = {
    "transpose": _axes,
    "reshape": _shape,
    "split": lambda value, column: _axis(0, value, column),
    "join": lambda value, column: _axis(0, value, column),
    "channels": lambda value, column: _axis(2, value, column),
    "resize": _grids,
}
"""{kind of a step: the function that reads what stands after its '='}."""


def _cut(text: str) -> list[tuple[str, int]]:
    """(item, its place) of a list with '+' between, but not inside brackets.

    >>> _cut("D+(heads+d)")
    [('D', 0), ('(heads+d)', 2)]
    """
    if not text:
        return []
    items = plugins.split(text, "+")
    return [(item, sum(map(len, items[:i])) + i) for i, item in enumerate(items)]


def nearest(name: str, rules: Iterable[Rule]) -> str:
    """The end of an error message: the rule whose names are nearest to the name of an array or a leaf; "" for none.

    >>> nearest("layer.0.query", [rule("layer.*.key:to=key_*"), rule("head:drop")])
    "; the nearest rule is 'layer.*.key:to=key_*'"
    """
    texts = {pattern: each for each in rules for pattern in (*each.sources, *each.to) if each.to or each.drop}
    numbers = re.sub(r"[0-9]+", "*", name)
    close = plugins.closest(numbers, texts)
    return f"; the nearest rule is {texts[close].shown.removeprefix('rule ')}" if close else ""
