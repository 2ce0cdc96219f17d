"""What every section's checks share."""

from __future__ import annotations

import functools
import os
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


class ConfigError(ValueError):
    """A value that a section refuses; its message is complete."""


def positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name}={value} must be greater than 0.")


def in_range(section: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{section}.{name}={value} must lie between {low} and {high}.")


@functools.cache
def _kinds(section: type) -> dict[str, tuple[tuple[type, ...], list[str]]]:
    """Of each field of a section the classes that its value may have, and the words where it lists them."""
    found = {}
    for name, hint in get_type_hints(section).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        classes = {type(words[0]) if get_origin(part) is Literal else get_origin(part) or part for part in parts}
        classes |= {int} if float in classes else {list} if tuple in classes else set()
        found[name] = ((object,) if Any in classes else tuple(classes)), words
    return found


def check_fields(name: str, section: Any) -> None:
    """ConfigError for a value that a field does not take: what is made in Python was not read, which checks types.

    Paths become texts, and numbers of NumPy those of Python, as a file has them.
    """
    for key, (classes, words) in _kinds(type(section)).items():
        value = getattr(section, key)
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        plain = plain.item() if isinstance(plain, np.generic) else plain
        if plain is not value:
            object.__setattr__(section, key, plain)
        if not isinstance(plain, classes):
            wanted = " or ".join(sorted("null" if one is NoneType else one.__name__ for one in classes))
            raise ConfigError(f"{name}.{key}={plain!r} must be {wanted}, not {type(plain).__name__}.")
        if isinstance(plain, str) and words and plain not in words:
            raise ConfigError(f"{name}.{key}={plain} is not known; use one of {', '.join(words)}.")
