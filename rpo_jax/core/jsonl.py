"""JSON Lines files that a kill may have cut short in their last line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.core.files import atomic_write


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
