"""Rows of CSV and TSV files, compressed by gzip or not: quoted as RFC 4180 has it, with a header."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rpo_jax.core.records import Row
from rpo_jax.data.faults import BadRow, plain
from rpo_jax.data.lines import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    TOO_LONG,
    check_encoding,
    open_bytes,
    read_line,
)


class Cell(str):
    """A value of such a file: text, which stands for a number or for JSON where a layout wants one."""

    __slots__ = ()


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """One record a row below the header, numbered by the line it begins on; blank lines are no rows.

    Raises BrokenFile where a compressed file breaks off, ValueError for a header that names a column twice.
    """
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:]) else ","
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_bytes(path) as stream:
        lines = _Lines(stream, path)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            row_id = f"{path}:{line}"
            lines.too_long = False
            try:
                cells = next(reader, None)
            except csv.Error as error:
                why = str(error).replace("\t", "\\t")
                if header is None:
                    raise ValueError(f"{row_id}: the header is broken: {why}; mend it.") from None
                if (last := reader.line_num) > line:
                    why += f"; its quotes make one row of lines {line} to {last}"
                yield BadRow(row_id, f"broken CSV: {why}")
                continue
            if cells is None:
                return
            if header is None:
                header = _header(cells, path) if cells else None
            elif cells:
                yield BadRow(row_id, TOO_LONG) if lines.too_long else _record(header, cells, str(path), line)


class _Lines:
    """A file's lines as text; bytes that are no UTF-8 become lone surrogates, so that the row can be named."""

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        self._stream, self._path, self.too_long = stream, path, False

    def __iter__(self) -> Iterator[str]:
        is_first = True
        while raw := read_line(self._stream):
            if is_first:
                check_encoding(raw, self._path)
                raw, is_first = raw.removeprefix(BYTE_ORDER_MARK), False
            self.too_long |= len(raw) > MAX_LINE_BYTES
            yield raw.decode("utf-8", "surrogateescape")


def _header(cells: list[str], path: Path) -> list[str]:
    for name, times in Counter(cells).items():
        if times > 1:
            raise ValueError(f"{path} has {times} columns '{plain(name)}'; keep one of them.")
    return cells


def _record(header: list[str], cells: list[str], file: str, line: int) -> Row | BadRow:
    row_id = f"{file}:{line}"
    if len(cells) != len(header):
        return BadRow(row_id, f"ragged row: it has {len(cells)} cells, the header {len(header)}")
    for cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            return BadRow(row_id, f"not UTF-8: byte 0x{ord(cell[error.start]) - 0xDC00:02x} in a cell")
    return Row(dict(zip(header, map(Cell, cells), strict=True)), file, line)
