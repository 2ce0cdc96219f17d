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
        self._what, self._say = what, say
        self._told: set[str] = set()

    def write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._tell("not kept", f": {error}; it goes on without them")
        else:
            if self._told:
                self._tell("kept again", "")

    def _tell(self, state: str, why: str) -> None:
        if state not in self._told:
            self._told.add(state)
            self._say(f"{self._what} are {state}{why}")


def discard(path: Path) -> None:
    """Remove a file that cannot be used, where that is allowed: its values are computed again in any case."""
    with contextlib.suppress(OSError):
        path.unlink()
