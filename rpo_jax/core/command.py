"""What all commands share: how errors end them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

USER_ERROR = 2  # exit status where something that was given cannot be used


def print_error(error: Exception | str) -> None:
    """An error in one line on stderr, with its notes; those of several lines are jax's, on its traceback."""
    notes = " ".join(note for note in getattr(error, "__notes__", ()) if "\n" not in note)
    print("error:", re.sub(r"\s*\n\s*", " ", f"{error}{f' ({notes})' if notes else ''}"), file=sys.stderr)


def run_command(work: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status) -> int:
    """Do the work of a command and return its exit status: what `work` returns, 0 where it returns nothing.

    What a user can correct, a ValueError or OSError, becomes one line on stderr and status 2. Other errors pass.

    Args:
        leave: what a process of several does with its status before it ends on an error; see hosts.processes.leave.
    """
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print_error(error)
        return leave(USER_ERROR)
    except Exception:
        leave(1)
        raise
