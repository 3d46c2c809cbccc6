"""The fields of a JSON document and their types, checked before anything is made of them.

A SHA-256 says that a file is as it was written; it does not say that this tljax wrote it. The jsonschema package would
be one more dependency, takes 1.0 for an integer, and is some 400 times slower (3.5 s for 300,000 numbers, here 10 ms).
"""

import json
from collections.abc import Mapping
from typing import Any

Form = Any
"""The form of a value of JSON: a type (a float may be whole, an int is not a bool), None, or a tuple of alternatives;
[form] for a list, {str: form} for an object with any names; {"name": form, "other?": form} for an object with these
fields and perhaps more, in which a field whose name ends in "?" may be absent."""

_TYPE_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
}
_TYPE_NAMES |= {list: "a list", None: "null"}
_LARGEST = 2**63
"""The size of a whole number is below it, as NumPy's int64 requires."""
_QUICK: Mapping[Any, set[type]] = {str: {str}, float: {float}, (float, None): {float, type(None)}}
"""{form: types that surely have it}: a list of these types alone is checked without a look at each element."""


def fault(value: Any, form: Form, place: str = "") -> str:
    """How a value differs from a form, in words that begin with the place in it; "" if it does not.

    >>> fault({"look": 1, "rows": [{"seed": 0}]}, {"look": int, "rows": [{"seed": int, "name?": str}]})
    ''
    >>> fault({"rows": [{"seed": 0}, {"seed": "x"}]}, {"rows": [{"seed": int}]})
    'rows[1].seed is "x", not a whole number'
    >>> fault({}, {"rows": [dict]}), fault({"a": 1.5}, {str: (str, None)})
    ('rows is not there', 'a is 1.5, not text or null')
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            return _mismatch(value, list, place)
        if isinstance(form[0], type | tuple) and set(map(type, value)) <= _QUICK.get(form[0], set()):
            return ""
        faults = (fault(part, form[0], f"{place}[{i}]") for i, part in enumerate(value))
        return next(filter(None, faults), "")
    if isinstance(form, Mapping):
        return _object_fault(value, form, place)
    kinds = form if isinstance(form, tuple) else (form,)
    nested = [kind for kind in kinds if isinstance(kind, list | Mapping)]
    if any(_has_type(value, kind) for kind in kinds if kind not in nested):
        return ""
    return fault(value, nested[0], place) if nested else _mismatch(value, form, place)


def _object_fault(value: Any, form: Mapping[Any, Form], place: str) -> str:
    """`fault` of a form that is an object."""
    if not isinstance(value, dict):
        return _mismatch(value, dict, place)
    before = f"{place}." if place else ""
    for name, part in value.items() if str in form else ():
        if words := fault(part, form[str], before + name):
            return words
    for key in (key for key in form if key is not str):
        name = key.removesuffix("?")
        if name not in value and name == key:
            return f"{before}{name} is not there"
        if name in value and (words := fault(value[name], form[key], before + name)):
            return words
    return ""


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of JSON, where kind is one of _TYPE_NAMES."""
    if kind is None:
        return value is None
    if kind is int:
        return type(value) is int and abs(value) < _LARGEST
    if kind is float:
        return type(value) is float or _has_type(value, int)
    return isinstance(value, kind)


def _mismatch(value: Any, form: Form, place: str) -> str:
    """The words on a value that is of none of a form's types."""
    kinds = form if isinstance(form, tuple) else (form,)
    kinds = tuple(type(kind) if isinstance(kind, list | Mapping) else kind for kind in kinds)
    text = _TYPE_NAMES[type(value)] if isinstance(value, list | dict) else json.dumps(value)[:60]
    return f"{place or 'it'} is {text}, not {' or '.join(_TYPE_NAMES[kind] for kind in kinds)}"
