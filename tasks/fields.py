"""The types of a family's fields: what a configuration file or a caller may put into them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

from learned_opt.task import TaskFamily

_SCALARS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
}
_LISTS = {"int": "a list of integers", "float": "a list of numbers", "str": "a list of strings"}


def check_types(name: str, family: type[TaskFamily], config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first value that is not of its field's type; ranges are the family's own to check.

    Fields of other types, such as a wrapped family, are left to the family.
    """
    for field in dataclasses.fields(cast(Any, family)):
        kind = str(field.type)
        of = kind.removeprefix("tuple[").split(",")[0]
        if field.name not in config or of not in _SCALARS:
            continue
        value = config[field.name]
        if of == kind:
            fits, words = _is(value, of), _SCALARS[of][1]
        else:
            fits, words = isinstance(value, (list, tuple)) and all(_is(item, of) for item in value), _LISTS[of]
        if not fits:
            raise ValueError(f"{field.name} of task family {name!r} must be {words}; got {value!r}")


def check_finite(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first value that is infinite or not a number; after the family's own checks."""
    for field, value in config.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"{field} of task family {name!r} must be finite; got {value!r}")


def _is(value: Any, kind: str) -> bool:
    # True is an int to Python, and a mistake where a number is meant.
    return isinstance(value, _SCALARS[kind][0]) and (kind == "bool" or not isinstance(value, bool))
