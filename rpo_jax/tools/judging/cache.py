"""Answers that a judge gave, on disk, so that a rerun asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any, NamedTuple


class JudgeAnswer(NamedTuple):
    text: str
    prompt_tokens: int
    answer_tokens: int


def answer_key(endpoint: str, request: dict[str, Any]) -> str:
    """SHA-256 of where a request goes and of all that it says: model, question (both responses in order), settings."""
    return hashlib.sha256(json.dumps([endpoint, request], sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """An SQLite file: each answer is there whole or not at all, also after a kill, and processes may share it.

    Raises ValueError for a file that is no such cache, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
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
            row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else JudgeAnswer(*row)

    def put(self, key: str, answer: JudgeAnswer) -> None:
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, *answer))

    def close(self) -> None:
        self._database.close()
