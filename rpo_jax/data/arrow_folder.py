"""Folders written by datasets.save_to_disk name their own parts: those names are checked before they are followed."""

from __future__ import annotations

from pathlib import Path

from rpo_jax.core.files import inside, read_json

SPLITS, STATE = "dataset_dict.json", "state.json"


def check_arrow_folder(folder: Path) -> None:
    """ValueError where a part of an Arrow folder lies elsewhere, or where its description is none."""
    if (folder / SPLITS).is_file():
        for split in _texts(folder / SPLITS, read_json(folder, SPLITS).get("splits")):
            _check_parts(inside(folder, split))
    else:
        _check_parts(folder)


def _check_parts(folder: Path) -> None:
    if not (folder / STATE).is_file():
        return  # the library says what is missing
    files = read_json(folder, STATE).get("_data_files")
    names = [file.get("filename") if isinstance(file, dict) else file for file in files or ()]
    for name in (*_texts(folder / STATE, names), STATE, "dataset_info.json"):
        inside(folder, name)


def _texts(file: Path, names: object) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} names its parts by something else than texts; write it again.")
    return names
