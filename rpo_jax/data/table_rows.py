"""Rows of Parquet files, of Arrow folders and of data sets of the Hugging Face hub, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rpo_jax.core.records import Row
from rpo_jax.data.faults import BadRow, BrokenFile, plain
from rpo_jax.data.share import Reading, Skipped

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

ROWS_AT_ONCE = 64  # rows may be megabytes long
BUFFER_BYTES = 2**20  # of a Parquet column: without it, whole columns of a row group are read at once


def read_parquet(path: Path, reading: Reading) -> Iterator[Row | BadRow | Skipped]:
    """The records of a Parquet file. Raises BrokenFile where it cannot be decoded any further."""
    import pyarrow
    from pyarrow import parquet

    done = 0
    try:
        with parquet.ParquetFile(
            path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as table:
            for name, times in Counter(table.schema_arrow.names).items():
                if times > 1:
                    raise ValueError(f"{path} has {times} columns '{plain(name)}'; keep one of them.")
            for batch in table.iter_batches(ROWS_AT_ONCE):
                yield from _records(_BatchReader(batch), str(path), done, reading)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise BrokenFile(f"no readable Parquet file ({plain(str(error))}); write it again") from None


def read_dataset(dataset: Dataset, name: str, reading: Reading) -> Iterator[Row | BadRow | Skipped]:
    """The records of a data set that the `datasets` library has opened; `name` stands for their file."""
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(dataset))
        yield from _records(_SliceReader(dataset, start, stop), name, start, reading)


class _Reader(Protocol):
    """Some records of a table: all at once, which is fast, or one by one."""

    def all(self) -> list[dict[str, Any]]: ...
    def one(self, index: int) -> dict[str, Any]: ...
    def __len__(self) -> int: ...


class _BatchReader:
    def __init__(self, batch: RecordBatch) -> None:
        self._batch = batch

    def all(self) -> list[dict[str, Any]]:
        return self._batch.to_pylist()

    def one(self, index: int) -> dict[str, Any]:
        return self._batch.slice(index, 1).to_pylist()[0]

    def __len__(self) -> int:
        return self._batch.num_rows


class _SliceReader:
    def __init__(self, dataset: Dataset, start: int, stop: int) -> None:
        self._dataset, self._start, self._stop = dataset, start, stop

    def all(self) -> list[dict[str, Any]]:
        columns = self._dataset[self._start : self._stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def one(self, index: int) -> dict[str, Any]:
        return self._dataset[self._start + index]

    def __len__(self) -> int:
        return self._stop - self._start


def _records(reader: _Reader, file: str, done: int, reading: Reading) -> Iterator[Row | BadRow | Skipped]:
    if not reading.needs(len(reader)):
        yield from (Skipped(done + 1 + index) for index in range(len(reader)))
        return
    try:
        records = reader.all()
    except Exception:  # a value that cannot be decoded: text that is no UTF-8, a date in the year 100,000
        records = None
    if records is not None:
        yield from (Row(record, file, number) for number, record in enumerate(records, start=done + 1))
        return
    for index in range(len(reader)):
        number = done + 1 + index
        try:
            record = reader.one(index)
        except Exception as error:  # whatever a column's decoder raises, it is this row that cannot be used
            yield BadRow(f"{file}:{number}", f"unreadable value: {type(error).__name__}: {error}")
        else:
            yield Row(record, file, number)
