"""Computed values in files that are checked when they are read: a damaged one is reported, and computed again.

What a file holds, and how its content is checked, is known to the `read` and `write` that these functions are given.
"""

from __future__ import annotations

import contextlib
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


class ByProduct:
    """What is written for later, and what writes it can do without: a disk that refuses it is no reason to end.

    Args:
        what: begins the message, in the plural.
        say: is told once when the disk refuses, and once when it takes them again.
    """

    def __init__(self, what: str, say: Callable[[str], None] = log.warning) -> None:
        self._what, self._say, self._refused = what, say, False

    def write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._refused:
                self._say(f"{self._what} are not kept: {error}; it goes on without them")
            self._refused = True
            return
        if self._refused:
            self._say(f"{self._what} are kept again")
        self._refused = False


def discard(path: Path) -> None:
    """Remove a file that cannot be used, where that is allowed: its values are computed again in any case."""
    with contextlib.suppress(OSError):
        path.unlink()
