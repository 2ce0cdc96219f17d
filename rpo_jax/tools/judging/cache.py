"""Answers that a judge gave, on disk, so that a rerun asks nothing twice."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any, NamedTuple

from rpo_jax.core.files import WriteFailed, refusal
from rpo_jax.core.store import ByProduct

# What the system refused, by SQLite's name for it.
_REFUSALS = {
    "SQLITE_FULL": errno.ENOSPC,
    "SQLITE_READONLY": errno.EROFS,
    "SQLITE_IOERR": errno.EIO,
    "SQLITE_CANTOPEN": errno.ENOENT,
}


class JudgeAnswer(NamedTuple):
    text: str
    prompt_tokens: int
    answer_tokens: int


def answer_key(endpoint: str, request: dict[str, Any]) -> str:
    """SHA-256 of where a request goes and of all that it says: model, question (both responses in order), settings."""
    return hashlib.sha256(json.dumps([endpoint, request], sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """An SQLite file: each answer is there whole or not at all, also after a kill, and processes may share it.

    Answers that the file does not take are known as long as this object is; that is told once.

    Raises ValueError for a file that is no such cache, or cannot be made or read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._unkept: dict[str, JudgeAnswer] = {}
        self._kept = ByProduct("Answers of the judge")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Threads take turns by the lock; another process is waited for.
            self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"--cache {self.path} cannot be made ({error}); give another file.") from None
        try:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER, answer_tokens INTEGER)"
            )
        except sqlite3.Error as error:
            self._database.close()
            raise ValueError(f"--cache {self.path} is no cache that can be written ({error}); give another.") from None

    def get(self, key: str) -> JudgeAnswer | None:
        query = "SELECT text, prompt_tokens, answer_tokens FROM answers WHERE key = ?"
        with self._lock:
            try:
                row = self._database.execute(query, (key,)).fetchone()
            except sqlite3.Error as error:  # asking again what it may hold would be paid for
                raise ValueError(f"--cache {self.path} cannot be read ({error}); mend it, or give another.") from None
            return self._unkept.get(key) if row is None else JudgeAnswer(*row)

    def put(self, key: str, answer: JudgeAnswer) -> None:
        with self._lock:
            self._unkept[key] = answer
            self._kept.write(self._write_all)

    def _write_all(self) -> None:
        """Write what is not in the file yet: what was refused before is tried again."""
        rows = [(key, *answer) for key, answer in self._unkept.items()]
        try:
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            number = next((number for name, number in _REFUSALS.items() if code.startswith(name)), None)
            reason = f"{self.path}: {error}" if number is None else refusal(self.path, OSError(number, ""))
            raise WriteFailed(reason) from None
        self._unkept.clear()

    def close(self) -> None:
        self._database.close()
