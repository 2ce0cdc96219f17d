"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: `failed` keeps the run from starting or going on; a `warning` does not.
        subject: what was looked at, in a word or two.
        text: what was found.
        fix: what to do about it; empty where all is well.
    """

    status: Literal["ok", "warning", "failed"]
    subject: str
    text: str
    fix: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, fix: str) -> Finding:
    return Finding("warning", subject, text, fix)


def failed(subject: str, error: Exception | str, fix: str = "") -> Finding:
    """A failure; the messages of this package's errors say the fix themselves, after the last semicolon."""
    text, semicolon, advice = str(error).rpartition("; ")
    if fix or not semicolon:
        return Finding("failed", subject, str(error), fix)
    return Finding("failed", subject, text, advice)
