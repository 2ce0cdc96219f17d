"""Rows of preference data from files, folders and the Hugging Face hub, each with the place it came from.

A record that cannot be read becomes a `BadRow`, so that the caller may count it; a file that cannot be read
raises at once. Nothing here unpickles or executes what it reads.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rpo_jax.types import Row

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_FILE_SUFFIX = re.compile(r"\.(?!v\d)[A-Za-z]\w*")  # not `.1` or `.v2`, which end many a hub name
_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|validation|valid|val|dev|test|eval)(?![a-z])")


class BadRow(NamedTuple):
    """A record that cannot be used; the words of `reason` before its first colon name the kind of fault."""

    row_id: str
    reason: str


def read_rows(path: str | Path, *, split: str = "train") -> list[Row | BadRow]:
    """Every record of a source, in file order.

    Args:
        path: a `.jsonl`, `.json` (a list of objects, or {"data": [...]}; `.gz` too) or `.parquet` file, a folder
            of such files (read in name order), a folder written by `datasets.save_to_disk`, or a hub name as
            `owner/name` or `owner/name:config`.
        split: split of a hub name or of an Arrow folder with several; in a folder of files, those whose names
            speak of another split are left out.

    Raises ValueError where the source as a whole is missing, empty, truncated, of an unknown kind or out of reach.
    """
    place = Path(path).expanduser()
    rows: list[Row | BadRow]
    try:
        if place.is_dir():
            rows = list(_read_folder(place, split))
        elif place.is_file():
            rows = list(_read_file(place))
        elif _HUB_NAME.fullmatch(str(path)) and not _FILE_SUFFIX.fullmatch(place.suffix):
            rows = list(_read_hub(str(path), split))
        else:
            raise ValueError(
                f"no such file: data path '{path}' does not exist; give an existing {_kinds()} file, a folder of "
                "them, or a hub data set as owner/name."
            )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; give a readable file or folder.") from None
    if not rows:
        raise ValueError(f"{path} is empty: it holds no rows; give a file with at least one.")
    return rows


def _kinds() -> str:
    return ", ".join(_READERS)


def _kind(path: Path) -> str:
    """The file's suffix without its folder's or name's dots: `.jsonl.gz` of `hh.v1.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    kind = _kind(path)
    if kind not in _READERS:
        raise ValueError(
            f"{path} has the unknown suffix '{kind}'; rows are read from {_kinds()}: convert or rename it."
        )
    try:
        yield from _READERS[kind](path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated or no gzip file ({error}); fetch it again, or drop '.gz' from its name if it "
            "is not compressed."
        ) from None


def _read_folder(folder: Path, split: str) -> Iterator[Row | BadRow]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _read_arrow_folder(folder, split)
        return
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and _kind(file) in _READERS and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(
            f"{folder} holds no data files; put {_kinds()} files directly into it, or give a folder written by "
            "datasets.save_to_disk."
        )
    named = re.compile(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z])", re.IGNORECASE)
    # A folder with train and test files must not train on its own test set.
    wanted = [file for file in files if named.search(file.name) or not _SPLIT_WORD.search(file.name.lower())]
    if not wanted:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has no file of the split '{split}': it holds {names}; set the split.")
    for file in wanted:
        yield from _read_file(file)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                yield _parse_line(raw, str(path), line)


def _parse_line(raw: bytes, file: str, line: int) -> Row | BadRow:
    row_id = f"{file}:{line}"
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(row_id, f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(row_id, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return BadRow(row_id, f"broken JSON: {error}")
    return _record(value, file, line)


def _record(value: Any, file: str, line: int) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, file, line)
    return BadRow(f"{file}:{line}", f"not a JSON object: got {type(value).__name__}")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as stream:
        raw = stream.read().removeprefix(_BYTE_ORDER_MARK)
    if not raw.strip():
        return
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip().startswith(b"{"):  # one object a line, under a .json name
            yield from _read_json_lines(path)
            return
        raise ValueError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}; fix the file there."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken JSON: {error}; fix the file.") from None
    if isinstance(content, dict) and "data" in content:
        content = content["data"]
    elif isinstance(content, dict) and b"\n" not in raw.strip():  # JSON Lines of one line
        content = [content]
    if not isinstance(content, list):
        raise ValueError(
            f'{path} holds neither a list of objects nor {{"data": [...]}}; make it one of them, or JSON Lines.'
        )
    for number, value in enumerate(content, start=1):
        yield _record(value, str(path), number)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            records = (record for batch in table.iter_batches() for record in batch.to_pylist())
            yield from _numbered(records, str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}); write it again.") from None


def _numbered(records: Iterable[Any], file: str) -> Iterator[Row]:
    for number, record in enumerate(records, start=1):
        yield Row(record, file, number)


def _read_arrow_folder(folder: Path, split: str) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (ValueError, LookupError, TypeError, OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{folder} is no readable Arrow folder ({type(error).__name__}: {error}); write it again with "
            "datasets.save_to_disk."
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{folder} has no split '{split}'; it has {', '.join(map(str, dataset))}.")
        yield from _numbered(dataset[split], f"{folder}[{split}]")
    else:
        yield from _numbered(dataset, str(folder))


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub's client raises OSError, ValueError, HTTP errors and its own kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"'{name}' is no local file or folder, and split '{split}' of the hub data set of that name cannot be "
            f"loaded ({type(error).__name__}: {reason}); check the path or the name, the split and the network."
        ) from None
    yield from _numbered(dataset, f"{name}[{split}]")


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
}
