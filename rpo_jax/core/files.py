"""Files that others made: found only inside their folder, read only up to a size, refused with a reason.

And files of our own: in their place they are whole, also after the machine lost its power.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 1 << 24


def inside(folder: Path, name: str) -> Path:
    """A file of a folder; ValueError where its name, or a link on the way, leads out of the folder.

    The hub's cache is a folder of links: snapshots/REVISION/NAME leads to blobs/HASH beside `snapshots`.
    """
    parts = Path(name).parts
    try:
        home, target = folder.resolve(), (folder / name).resolve()
        target.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise ValueError(f"{folder} names a file {name[:100]!r} that cannot be: {error}.") from None
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if Path(name).is_absolute() or ".." in parts or not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{name[:100]!r} leads out of {folder} (to {target}), so it is not read; put the file itself there."
        )
    return folder / name


def read_json(folder: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a folder; ValueError where it is something else, or larger than `max_bytes`."""
    file = inside(folder, name)
    if (size := file.stat().st_size) > max_bytes:
        raise ValueError(f"{file} has {size:,} bytes; no such file needs more than {max_bytes:,}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # brackets without end
        raise ValueError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def replace_durably(beside: Path, path: Path) -> None:
    """Give what was written beside its place, in one rename that lasts: all on disk before, the new name after."""
    for found in [*sorted(beside.rglob("*")), beside] if beside.is_dir() else [beside]:
        _sync(found)
    os.replace(beside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    # Some network disks, and Windows, cannot flush a folder; a file that cannot be flushed is an error.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
