"""Sizes and SHA-256 of every file of a folder, in a JSON file in it: what tells a damaged checkpoint from a whole one.

The storage itself notices some damage, when it happens to read what was hit; this finds any.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rpo_jax.core.files import atomic_write, read_json

NAME = "checksums.json"
LATER = "_CHECKPOINT_METADATA"  # orbax adds the time of the commit to it, after it has given the folder to us
THREADS = 8  # hashing lets other threads of Python go on


def write_manifest(folder: Path) -> None:
    """Record all files that the folder holds now; whole or not at all."""
    names = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        content = dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))
    atomic_write(folder / NAME, json.dumps({"files": content}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` has recorded: the first file, and why; None if all is well.

    Sizes are compared before any content is read. Files that came later are no fault.
    """
    try:
        recorded = {name: _checked(name, entry) for name, entry in read_json(folder, NAME)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be used ({' '.join(str(error).split())[:200]})"
    for name, (size, _) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (got := path.stat().st_size) != size:
            return f"{name} has {got:,} bytes, not {size:,}"

    def differs(name: str) -> bool:
        try:
            return _describe(folder / name)["sha256"] != recorded[name][1]
        except OSError:
            return True

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [name for name, differ in zip(recorded, pool.map(differs, recorded), strict=True) if differ]
    return f"the content of {wrong[0]} does not match its checksum" if wrong else None


def _checked(name: str, entry: Any) -> tuple[int, str]:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"it names {name[:100]!r}, which is not in the folder")
    return int(entry["bytes"]), str(entry["sha256"])


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name not in (NAME, LATER)]


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
