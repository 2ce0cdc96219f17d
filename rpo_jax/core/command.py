"""What all commands share: how errors end them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable

from rpo_jax.core.text import printable

USER_ERROR = 2  # exit status where something that was given cannot be used


def print_text(text: object) -> None:
    """A line, or several, on stdout: what a file, a folder or a row is called moves no cursor there."""
    print(printable(str(text)), flush=True)


def print_error(error: Exception | str) -> None:
    """An error in one line on stderr, with its notes; those of several lines are jax's, on its traceback."""
    notes = " ".join(note for note in getattr(error, "__notes__", ()) if "\n" not in note)
    text = re.sub(r"\s*\n\s*", " ", f"{error}{f' ({notes})' if notes else ''}")
    print("error:", printable(text), file=sys.stderr)


class _Printable(logging.Formatter):
    """Names of files and words of libraries on their way to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def run_command(work: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status) -> int:
    """Do the work of a command and return its exit status: what `work` returns, 0 where it returns nothing.

    What a user can correct, a ValueError or OSError, becomes one line on stderr and status 2. Other errors pass.

    Args:
        leave: what a process of several does with its status before it ends on an error; see hosts.processes.leave.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print_error(error)
        return leave(USER_ERROR)
    except Exception:
        leave(1)
        raise
