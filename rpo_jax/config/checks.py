"""What every section's checks share."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args, get_origin, get_type_hints


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
def _words(section: type) -> dict[str, list[str]]:
    """The words that a section's fields may hold, of those that list them."""
    listed = {
        name: [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
        for name, kind in get_type_hints(section).items()
    }
    return {name: words for name, words in listed.items() if words}


def check_words(name: str, section: Any) -> None:
    """ConfigError for a word that a field does not list: what is made in Python was not read, which checks types."""
    for key, words in _words(type(section)).items():
        value = getattr(section, key)
        if isinstance(value, str) and value not in words:
            raise ConfigError(f"{name}.{key}={value} is not known; use one of {', '.join(words)}.")
