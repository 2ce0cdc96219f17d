"""What all commands share: how errors end them, and how they talk."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rpo_jax.core.files import refusal
from rpo_jax.core.jsonl import parse_json
from rpo_jax.core.memory import explaining_memory
from rpo_jax.core.text import printable

USER_ERROR = 2  # exit status where something that was given cannot be used


def print_text(text: object) -> None:
    """A line, or several, on stdout: what a file, a folder or a row is called moves no cursor there."""
    print(printable(str(text)), flush=True)


def print_error(error: Exception | str) -> None:
    """An error in one line on stderr, with its notes; those of several lines are jax's, on its traceback."""
    notes = " ".join(note for note in getattr(error, "__notes__", ()) if "\n" not in note)
    text = re.sub(r"\s*\n\s*", " ", f"{error}{f' ({notes})' if notes else ''}")
    with contextlib.suppress(OSError):  # as where stderr is on a disk that is full: the exit status still says it
        print("error:", printable(text), file=sys.stderr)


class _Printable(logging.Formatter):
    """Names of files and words of libraries on their way to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def json_object(text: str) -> dict[str, Any]:
    """An option's value that is a JSON object."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def refuse_unread(parser: argparse.ArgumentParser, options: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """ValueError for the first of these options that was given another value than its default, and would do nothing."""
    for name in names:
        if options[name] != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} would not be read: {why}; leave it out.")


def column_names(text: str) -> dict[str, str]:
    """An option's value that says what rows call their columns, as data.columns does."""
    names = json_object(text)
    if not all(isinstance(column, str) for column in names.values()):
        raise argparse.ArgumentTypeError(f'{text!r} names no columns, as {{"prompt": "question"}} does')
    return names


class SteadyStream:
    """A text stream that what writes to it outlives: a full disk under it, or a reader that has gone, ends nothing.

    That is told once, on stderr.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._told = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            if not self._told:
                self._told = True
                print_error(f"{refusal('standard output', error) or error}; it goes on without")

    def end(self) -> None:
        """Flush at last; what cannot be written is dropped, or the interpreter would fail of it on its way out."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def run_command(work: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status) -> int:
    """Do the work of a command and return its exit status: what `work` returns, 0 where it returns nothing.

    What a user can correct, a ValueError or OSError, and too little memory become one line on stderr and status 2.
    Other errors pass.

    Args:
        leave: what a process of several does with its status before it ends on an error; see hosts.processes.leave.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    stream: Any = SteadyStream(sys.stdout)
    try:
        with contextlib.redirect_stdout(stream):
            try:
                with explaining_memory(lambda: "use a smaller model or batch, or a machine with more of it"):
                    return work() or 0
            except (ValueError, OSError) as error:
                print_error(error)
                return leave(USER_ERROR)
            except Exception:
                leave(1)
                raise
    finally:
        stream.end()
