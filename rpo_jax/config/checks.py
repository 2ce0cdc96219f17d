"""What every section's checks share."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value that a section refuses; its message is complete."""


def positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name}={value} must be greater than 0.")


def in_range(section: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{section}.{name}={value} must lie between {low} and {high}.")
