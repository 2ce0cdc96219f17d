"""Rows of preference data from files, folders and the Hugging Face hub, each with the place it came from.

A record that cannot be read becomes a `BadRow`, so that the caller may count it, and so does the place where a file
breaks off; a file of which nothing can be read raises. Nothing here unpickles or executes what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rpo_jax.core.files import inside
from rpo_jax.core.records import Row
from rpo_jax.data.arrow_folder import check_arrow_folder
from rpo_jax.data.csv_rows import read_csv
from rpo_jax.data.faults import BadRow, BrokenFile, plain
from rpo_jax.data.hub import is_reachable
from rpo_jax.data.json_rows import read_json, read_json_lines
from rpo_jax.data.table_rows import read_dataset, read_parquet

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_FILE_SUFFIX = re.compile(r"\.(?!v\d)[A-Za-z]\w*")  # not `.1` or `.v2`, which end many a hub name
_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|validation|valid|val|dev|test|eval)(?![a-z])")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}[-.]")
_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
    ".parquet": read_parquet,
}
_KINDS = ", ".join(_READERS)
_REGISTRY = "dataset_info.json"  # LLaMA-Factory's, of the files beside it


def read_rows(path: str | Path, *, split: str = "train") -> Iterator[Row | BadRow]:
    """Every record of a source, in file order, read as it is asked for.

    Args:
        path: a `.jsonl`, `.json` (a list of objects, or {"data": [...]}), `.csv` or `.tsv` (`.gz` too) or `.parquet`
            file, a folder of such files (read in name order), a folder written by `datasets.save_to_disk`, or a hub
            name as `owner/name` or `owner/name:config`.
        split: split of a hub name or of an Arrow folder with several; in a folder of files, those whose names
            speak of another split are left out.

    Raises ValueError where the source as a whole is missing, empty, of an unknown kind or out of reach, and where
    nothing of a file can be read.
    """
    row = None
    try:
        for row in _rows_of(Path(path).expanduser(), str(path), split):
            yield row
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}; give a readable file or folder.") from None
    if row is None:
        raise ValueError(f"{path} is empty: it holds no rows; give a file with at least one.")


def _rows_of(place: Path, path: str, split: str) -> Iterator[Row | BadRow]:
    if place.is_dir():
        return _read_folder(place, split)
    if place.is_file():
        return _read_file(place)
    if _HUB_NAME.fullmatch(path) and not _FILE_SUFFIX.fullmatch(place.suffix):
        return _read_hub(path, split)
    raise ValueError(
        f"no such file: data path '{path}' does not exist; give an existing {_KINDS} file, a folder of them, or a "
        "hub data set as owner/name" + ("; several go into data.mix." if "," in path else ".")
    )


def _kind(path: Path) -> str:
    """The file's suffix without its folder's or name's dots: `.jsonl.gz` of `hh.v1.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    kind = _kind(path)
    if kind not in _READERS:
        raise ValueError(f"{path} has the unknown suffix '{kind}'; rows are read from {_KINDS}: convert or rename it.")
    last = None
    try:
        for last in _READERS[kind](path):
            yield last
    except BrokenFile as error:
        if last is None:
            raise ValueError(f"{path} is {error}.") from None
        number = last.place[1] if isinstance(last, BadRow) else last.line
        yield BadRow(f"{path}:{number + 1}", f"the file breaks off: from here on it is {error}")


def _read_folder(folder: Path, split: str) -> Iterator[Row | BadRow]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _read_arrow_folder(folder, split)
        return
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and _kind(file) in _READERS and not file.name.startswith(".") and file.name != _REGISTRY
    )
    if not files:
        raise ValueError(
            f"{folder} holds no data files; put {_KINDS} files directly into it, or give a folder written by "
            "datasets.save_to_disk."
        )
    word = rf"(?<![A-Za-z0-9]){re.escape(split)}"

    def is_wanted(name: str) -> bool:
        # A folder with train and test files must not train on its own test set.
        if not _SPLIT_WORD.search(name.lower()):
            return True
        shard = _SHARD.search(name)  # whose split stands before its number: train_prefs is not train
        text, end = (name, "(?![A-Za-z])") if shard is None else (shard[1], "(?!_?[A-Za-z])")
        return re.search(word + end, text, re.IGNORECASE) is not None

    wanted = [file for file in files if is_wanted(file.name)]
    if not wanted:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has no file of the split '{split}': it holds {names}; set the split.")
    for file in wanted:
        yield from _read_file(inside(folder, file.name))


def _read_arrow_folder(folder: Path, split: str) -> Iterator[Row | BadRow]:
    import datasets
    import pyarrow

    check_arrow_folder(folder)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # what damage makes of the description of its features, the library does not foresee
        raise ValueError(
            f"{folder} is no readable Arrow folder ({type(error).__name__}: {plain(str(error))}); write it again with "
            "datasets.save_to_disk."
        ) from None
    name = str(folder)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{folder} has no split '{split}'; it has {', '.join(map(str, dataset))}.")
        dataset, name = dataset[split], f"{folder}[{split}]"
    try:
        # Arrow files are mapped, not parsed: an offset that damage has moved would be followed out of the file.
        dataset.data.validate(full=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{folder} is a damaged Arrow folder ({plain(str(error))}); write it again.") from None
    yield from read_dataset(dataset, name)


def _read_hub(name: str, split: str) -> Iterator[Row | BadRow]:
    import datasets
    from datasets import config as client

    repository, _, config = name.partition(":")
    was_offline = client.HF_HUB_OFFLINE
    # Without a connection its client retries each file for the better part of a minute; its cache may do.
    client.HF_HUB_OFFLINE = was_offline or not is_reachable()
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub's client raises OSError, ValueError, HTTP errors and its own kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"'{name}' is no local file or folder, and split '{split}' of the hub data set of that name cannot be "
            f"loaded ({type(error).__name__}: {reason}); check the path or the name, the split and the network, "
            "or give a file of it."
        ) from None
    finally:
        client.HF_HUB_OFFLINE = was_offline
    yield from read_dataset(dataset, f"{name}[{split}]")
