"""Computed values in files that are checked when they are read: a damaged one is reported, and computed again.

What a file holds, and how its content is checked, is known to the `read` and `write` that these functions are given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

DAMAGED = (ValueError, OSError, SafetensorError)
Values = TypeVar("Values")

log = logging.getLogger(__name__)


def fault(read: Callable[[], object]) -> str | None:
    """Why a file cannot be used, in one line; None where it can."""
    try:
        read()
    except DAMAGED as error:
        return " ".join(str(error).split())
    return None


def load(what: str, path: Path, read: Callable[[], Values]) -> Values | None:
    """The values of a file; None, and a logged reason, where it is damaged. `what` begins the message."""
    try:
        return read()
    except DAMAGED as error:
        log.warning("%s in %s are computed again: %s.", what, path, error)
        return None


def keep(what: str, write: Callable[[], None]) -> None:
    """Write values for the next run; a disk that is full is no reason to end this one, which has what it computed."""
    try:
        write()
    except OSError as error:
        log.warning("%s are not kept for the next run: %s.", what, error)
