"""Rows of Parquet files, of Arrow folders and of data sets of the Hugging Face hub, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_jax.core.records import Row
from rpo_jax.data.faults import BadRow, BrokenFile, plain

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

ROWS_AT_ONCE = 64  # rows may be megabytes long
BUFFER_BYTES = 2**20  # of a Parquet column: without it, whole columns of a row group are read at once


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
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
                yield from _records(partial(_of_batch, batch), batch.num_rows, str(path), done)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
            raise
        raise BrokenFile(f"no readable Parquet file ({plain(str(error))}); write it again") from None


def read_dataset(dataset: Dataset, name: str) -> Iterator[Row | BadRow]:
    """The records of a data set that the `datasets` library has opened; `name` stands for their file."""
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        yield from _records(partial(_of_dataset, dataset, start), min(ROWS_AT_ONCE, len(dataset) - start), name, start)


def _of_batch(batch: RecordBatch, first: int, count: int) -> list[dict[str, Any]]:
    return list(map(_without_padding, batch.slice(first, count).to_pylist()))


def _of_dataset(dataset: Dataset, start: int, first: int, count: int) -> list[dict[str, Any]]:
    columns = dataset[start + first : start + first + count]
    rows = zip(*columns.values(), strict=True)
    return [_without_padding(dict(zip(columns, values, strict=True))) for values in rows]


def _without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """A table gives every object in a list the keys of all others, with nulls: here without, inside the objects.

    Of a message's own keys and of a row's the nulls stay, as readers name them. TRL's remove_none_values does the same.
    """
    for column, value in row.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            row[column] = [
                {key: _without_nulls(inner) for key, inner in item.items()} if isinstance(item, dict) else item
                for item in value
            ]
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _records(
    take: Callable[[int, int], list[dict[str, Any]]], count: int, file: str, done: int
) -> Iterator[Row | BadRow]:
    """Records of a table, `done` of which have been read: all at once, which is fast, or one by one.

    Args:
        take: from the first of them and a number to so many records.
    """
    try:
        records = take(0, count)
    except Exception:  # a value that cannot be decoded: text that is no UTF-8, a date in the year 100,000
        records = None
    for index in range(count):
        number = done + 1 + index
        try:
            record = take(index, 1)[0] if records is None else records[index]
        except Exception as error:  # whatever a column's decoder raises, it is this row that cannot be used
            yield BadRow(f"{file}:{number}", f"unreadable value: {type(error).__name__}: {error}")
        else:
            yield Row(record, file, number)
