"""JSON Lines files that a kill may have cut short in their last line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.core.files import WriteFailed, atomic_write, writing


def complete_lines(path: Path) -> list[bytes]:
    """Lines without their ends; none where there is no file, and without a last one that has no end."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text is; ValueError for any that is none, brackets without end too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deep ({error})") from None


def read_jsonl(path: Path, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Objects of all complete lines.

    Raises ValueError, naming the line, for one that is no JSON object or lacks a key of `needed`, of which `step` is
    an integer.
    """
    rows = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(needed) <= set(row) or not isinstance(row.get("step", 0), int):
            expected = f"a JSON object with {', '.join(needed)}" if needed else "a JSON object"
            raise ValueError(
                f"{path}:{number} is damaged: it should be {expected}, got {line[:60].decode('utf-8', 'replace')!r}; "
                "remove that line."
            )
        rows.append(row)
    return rows


def to_line(row: Mapping[str, Any], *, ascii_only: bool = True) -> str:
    """An object as a line of a JSON Lines file, its end included."""
    return json.dumps(row, ensure_ascii=ascii_only) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], *, ascii_only: bool = True) -> None:
    """Write all rows in place of what is there; a reader finds either, whole."""
    atomic_write(path, "".join(to_line(row, ascii_only=ascii_only) for row in rows))


class GrowingFile:
    """A file that lines are added to as they come; those that the disk refuses wait in memory, and are tried again.

    Args:
        say: is told once when lines have to wait, and once when they are written.

    Attributes:
        waiting: rows that are not in the file yet.
        fault: why they wait; None where none does.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, ascii_only: bool = True) -> None:
        self._path, self._say, self._ascii_only, self._made = path, say, ascii_only, path.exists()
        self.waiting: list[Mapping[str, Any]] = []
        self.fault: WriteFailed | None = None

    def add(self, *rows: Mapping[str, Any]) -> None:
        self.waiting += rows
        self.flush()

    def flush(self, *, lasting: bool = False) -> None:
        """Write what waits; `lasting`: so that it is there after a power cut, as are the lines before."""
        try:
            with writing(self._path):
                lines = "".join(to_line(row, ascii_only=self._ascii_only) for row in self.waiting)
                self._append(lines.encode("utf-8", "backslashreplace"), lasting)
        except WriteFailed as error:
            if self.fault is None:
                self._say(f"{error}; its lines wait in memory, and it goes on")
            self.fault = error
            return
        if self.fault is not None:
            self._say(f"{self._path} is written again, with the lines that had to wait")
        self.waiting, self.fault = [], None

    def _append(self, content: bytes, lasting: bool) -> None:
        # Opened anew each time, as a network disk may tell only of a file that is closed that it has no room. Made only
        # once: where it has vanished with its disk, another one in its place would be on another disk.
        with self._path.open("r+b" if self._made else "ab", buffering=0) as file:
            self._made, end = True, file.seek(0, os.SEEK_END)
            try:
                while content:
                    content = content[file.write(content) :]
                if lasting:
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)  # no half line before the next one
                raise
