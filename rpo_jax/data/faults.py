"""Rows that cannot be used: why, how many of each kind, and which was the first; bounded, however many there are."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_REASON_CHARACTERS = 300  # a reason may quote the data, and the data may be a megabyte
NAMED_ROWS = 1000  # so many unusable rows are remembered one by one, the others by number


class BadRow(NamedTuple):
    """A record that cannot be used; the words of `reason` before its first colon name the kind of fault."""

    row_id: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]

    @property
    def place(self) -> tuple[str, int]:
        """Its file, and its number there."""
        file, _, number = self.row_id.rpartition(":")
        return file, int(number)


class LeftOut(BadRow):
    """A record that could be used, and of which a rule makes nothing."""


class BrokenFile(Exception):
    """A file that breaks off: what was read before stands, nothing after it can be read."""


def shown(value: Any) -> str:
    """A value of the data for a message: however large or deep it is, a few characters of it."""
    return reprlib.repr(value)


def plain(text: str) -> str:
    """Text of the data for one line of a terminal: no control characters, no lone surrogates, not too long."""
    text = " ".join(text.split())
    cut = text[:MAX_REASON_CHARACTERS]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return escaped + " ..." * (len(cut) < len(text))


@dataclass
class Faults:
    """The unusable rows of a source.

    Attributes:
        counts: number of rows by kind of fault.
        firsts: the first row of each kind.
        named: rows in the order in which they were found, no more than NAMED_ROWS.
    """

    counts: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, BadRow] = field(default_factory=dict)
    named: list[BadRow] = field(default_factory=list)

    def add(self, row_id: str, reason: str) -> None:
        row = BadRow(row_id, plain(reason))
        kind = row.kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        # A layout that compares rows finds faults out of order.
        if kind not in self.firsts or row.place < self.firsts[kind].place:
            self.firsts[kind] = row
        if len(self.named) < NAMED_ROWS:
            self.named.append(row)

    def __bool__(self) -> bool:
        return bool(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def rows(self) -> list[BadRow]:
        """Those of `named`, in file order."""
        return sorted(self.named, key=lambda row: row.place)

    @property
    def first(self) -> BadRow:
        return min(self.firsts.values(), key=lambda row: row.place)

    @property
    def by_kind(self) -> dict[str, int]:
        """The counts, the most frequent kind first; of equally frequent ones, the one that comes first."""
        ordered = sorted(self.counts, key=lambda kind: (-self.counts[kind], self.firsts[kind].place))
        return {kind: self.counts[kind] for kind in ordered}

    def counted(self) -> str:
        """Each kind with its number, in one line: for an error."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.by_kind.items())

    def error(self, of_what: str, on_bad_row: str, none_left: str) -> ValueError:
        """What ends a run: the first row, how many there are of each kind, and what to do about them."""
        fix = "fix them, or set data.on_bad_row: skip to leave them out" if on_bad_row == "error" else none_left
        return ValueError(
            f"{self.first.row_id}: {self.first.reason}. {self.total} of {of_what} ({self.counted()}); {fix}."
        )

    def report(self) -> str:
        """Each kind with its number and its first row, a line for each."""
        width = len(str(max(self.counts.values(), default=0)))
        return "\n".join(
            f"  {count:>{width}}  {kind}, first {self.firsts[kind].row_id}" for kind, count in self.by_kind.items()
        )
