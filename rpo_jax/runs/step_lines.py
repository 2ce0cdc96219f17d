"""Files of JSON lines that each tell of a step: a run that takes steps again writes their lines again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rpo_jax.core.files import replace_durably


def lines_before(file: Path, step: int) -> list[str]:
    """The lines of earlier steps, none where there is no file; a last line that a kill has cut short is left out."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]


def replace_lines(file: Path, lines: Iterable[str]) -> None:
    """Have these lines in the file, in one step that lasts."""
    new = file.with_suffix(".jsonl.tmp")
    new.write_text("".join(lines), encoding="utf-8")
    replace_durably(new, file)
