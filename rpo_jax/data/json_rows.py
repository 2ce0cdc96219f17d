"""Rows of JSON and JSON Lines files, compressed by gzip or not.

JSON Lines are read a line at a time, so memory does not grow with the file; a JSON document is parsed as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rpo_jax.core.records import Row
from rpo_jax.data.faults import BadRow
from rpo_jax.data.lines import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    TOO_LONG,
    check_encoding,
    open_bytes,
    read_document,
    read_line,
)


def read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    """One object a line; blank lines are no rows. Raises BrokenFile where a compressed file breaks off."""
    with open_bytes(path) as stream:
        line = 0
        while raw := read_line(stream):
            line += 1
            if line == 1:
                check_encoding(raw, path)
            if len(raw) > MAX_LINE_BYTES:
                yield BadRow(f"{path}:{line}", TOO_LONG)
                continue
            raw = raw.removeprefix(BYTE_ORDER_MARK)  # also where files were put one after another
            if raw.strip():
                yield _parse_line(raw, str(path), line)


def read_json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, or {"data": [...]}, or JSON Lines under this name."""
    try:
        content = _read_document(path)
    except _JsonLines:
        yield from read_json_lines(path)
        return
    for number, value in enumerate(content, start=1):
        yield _record(value, str(path), number)


class _Repeated:
    """In place of an object that names a key twice: which of the two values is meant, nobody knows."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        self.key = next(key for key, _ in pairs if key in seen or seen.add(key))


def _decode(text: str) -> tuple[Any, list[_Repeated]]:
    """A JSON value, and what stands in it for objects that name a key twice."""
    repeats: list[_Repeated] = []

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        repeats.append(_Repeated(pairs))
        return repeats[-1]

    return json.JSONDecoder(object_pairs_hook=unique).decode(text), repeats


def _parse_line(raw: bytes, file: str, line: int) -> Row | BadRow:
    row_id = f"{file}:{line}"
    try:
        value, repeats = _decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(row_id, f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(row_id, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return BadRow(row_id, f"broken JSON: {error}")
    return _record(repeats[0] if repeats else value, file, line)


def _record(value: Any, file: str, line: int) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, file, line)
    if isinstance(value, _Repeated):
        return BadRow(f"{file}:{line}", f"repeated key: {value.key!r} occurs twice in one object")
    return BadRow(f"{file}:{line}", f"not a JSON object: got {type(value).__name__}")


class _JsonLines(Exception):
    """The document is one object a line, under a .json name."""


def _read_document(path: Path) -> list[Any]:
    """The elements of a JSON document; those that name a key twice as `_Repeated`."""
    raw = read_document(path).removeprefix(BYTE_ORDER_MARK)
    if not raw.strip():
        return []
    check_encoding(raw, path)
    try:
        content, repeats = _decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):
            raise _JsonLines from None
        raise ValueError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}; fix the file there."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken JSON: {error}; fix the file.") from None
    if isinstance(content, dict) and _is_by_columns(content):
        raise ValueError(
            f"{path} is a table column by column; write it by rows, as pandas' to_json(orient='records', lines=True)."
        )
    if isinstance(content, dict) and "data" in content:
        content = content["data"]
    elif isinstance(content, dict | _Repeated) and b"\n" not in raw.strip():  # JSON Lines of one line
        content = [content]
    if not isinstance(content, list):
        raise ValueError(
            f'{path} holds neither a list of objects nor {{"data": [...]}}; make it one of them, or JSON Lines.'
        )
    return [_first_repeat(value) or value for value in content] if repeats else content


def _is_by_columns(content: dict[str, Any]) -> bool:
    """Whether it is what pandas writes unless told otherwise, or columns as lists: of texts, which no prompt is."""
    columns = list(content.values())
    if columns and all(isinstance(column, dict) and "0" in column for column in columns):
        return True
    prompts = content.get("prompt", content.get("chosen"))
    return isinstance(prompts, list) and bool(prompts) and all(isinstance(text, str) for text in prompts)


def _first_repeat(value: Any) -> _Repeated | None:
    """The first object in a value, however deep, that names a key twice."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Repeated):
            return item
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return None
