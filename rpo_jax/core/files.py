"""Files that others made: found only inside their folder, read only up to a size, refused with a reason.

And files of our own: in their place they are whole, also after the machine lost its power.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.core.locks import one_writer

MAX_CONFIG_BYTES = 1 << 24
RENAME_PAUSES = (0.1, 0.3, 0.9)  # seconds before a rename is tried again
_GONE = "gone-"  # in the name of what is being removed
UNSURE = (errno.ENOENT, errno.ESTALE, errno.EBUSY)  # errors of a rename that NFS may have done
_LOST = "see that its disk is still there"
# What to do about a refusal, by the system's number for it.
_REMEDIES = {
    errno.ENOSPC: "free some room there",
    errno.EDQUOT: "free some of this user's quota there",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "mount that disk for writing, or choose another place",
    errno.EACCES: "let this user write there, or choose another place",
    errno.EPERM: "let this user write there, or choose another place",
    errno.EBUSY: "it may be where a disk is mounted: choose a folder in it",
    **dict.fromkeys((errno.EIO, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE), _LOST),
}


class WriteFailed(OSError):
    """A file could not be written; the message names it, says why, and what to do."""


def refusal(path: str | Path, error: BaseException) -> str | None:
    """Why the system refuses to write a path, and what to do, in one line; None for an error of another kind.

    Libraries give the system's number as an attribute or, those in other languages than Python, in their text.
    """
    # Only an OSError's text is taken at Python's own form of it: others may tell of a connection that failed.
    forms = r"os[ _]error(?:_code)?\W{1,2}(\d+)" + (r"|\[Errno (\d+)\]" if isinstance(error, OSError) else "")
    match = re.search(forms, str(error))
    number = getattr(error, "errno", None) or (int(match[1] or match[2]) if match else None)
    connection = ConnectionRefusedError, ConnectionResetError, ConnectionAbortedError
    if number is None or number < 1 or isinstance(error, connection):  # below 1 is a server's name that nobody knows
        return None
    return f"{path} cannot be written: {os.strerror(number)}; {_REMEDIES.get(number, 'choose another place')}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteFailed where the system refuses to write `path`, or what is beside it for a while, inside."""
    try:
        yield
    except WriteFailed:
        raise
    except Exception as error:
        other = getattr(error, "filename", None)  # another file that was to be read has its name in the message
        if (reason := refusal(path, error)) is None or not (other is None or _is_part(str(other), path.absolute())):
            raise
        raise WriteFailed(reason) from error


def check_writable(folder: Path) -> None:
    """WriteFailed where no file can be written into a folder, or into the nearest one above it that is there.

    Raises ValueError for an address, such as a bucket's: as a path it would be a folder of that name here.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):  # paths have one slash of the two
        raise ValueError(
            f"{folder} is an address, not a folder; mount the bucket and give the folder it is mounted at."
        )
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    with writing(nearest), tempfile.TemporaryFile(dir=nearest, buffering=0) as file:
        file.write(bytes(1 << 12))


def check_there(file: Path) -> None:
    """WriteFailed where the folder of a file that is known to be in it has vanished with its disk.

    What is written there now would lie in the place of that disk, on another one.
    """
    if not file.exists():
        raise WriteFailed(refusal(file.parent, OSError(errno.ENOENT, "")))


def _is_part(name: str, path: Path) -> bool:
    """Whether this is a path, something in it or above it, or what takes its place when it is whole."""
    named = Path(name).absolute()
    return path.is_relative_to(named) or str(named).startswith((str(path), str(path.with_name(f".{path.name[:200]}"))))


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


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """What tells these paths apart: as few last parts of each as do, all of them where two are the same."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def refuse_gguf(path: Path) -> None:
    """ValueError for a GGUF file, or a folder of nothing else that a model could be read from."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    files = [file for file in candidates if file.suffix.lower() == ".gguf" or _first_bytes(file) == b"GGUF"]
    if not files:
        return
    folder, name = files[0].parent, files[0].name
    load = f"({str(folder)!r}, gguf_file={name!r}"
    target = f".save_pretrained({str(folder / files[0].stem)!r})"
    raise ValueError(
        f"{files[0]} is GGUF, llama.cpp's format, which is not read here. Use the folder that it was made from, or "
        'convert it once (after pip install gguf) and give the new folder: python -c "from transformers import '
        "AutoModelForCausalLM as M, AutoTokenizer as T, GgufConfig as G; "
        f'M.from_pretrained{load}, quantization_config=G(dequantize=True)){target}; T.from_pretrained{load}){target}"'
    )


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4)


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


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it there, both lastingly; a reader finds all of it or the old one.

    Raises WriteFailed where the system refuses.
    """
    partial = path.with_name(f".{path.name[:200]}.{_unique()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A lone surrogate, as in a file's name that is no UTF-8, is written as the escape that JSON has for it.
            partial.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            atomic_replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _unique() -> str:
    """Part of a name that no process of any host has given."""
    return secrets.token_hex(8)


def atomic_replace(partial: Path, path: Path) -> None:
    """Rename a finished file or folder to `path` so that it lasts: its content is on disk before, the name after."""
    sync(partial)
    rename(partial, path)
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, in place of a file of that name.

    A network disk may have done so and yet report that it failed: a request that is sent again, because its answer was
    lost, finds nothing left to rename. What counts is where the file is.
    """
    identity = file_identity(source)
    for seconds in (*RENAME_PAUSES, None):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if has_moved(identity, source, target):
                return
            if seconds is None or error.errno not in UNSURE:
                raise
            time.sleep(seconds)


def has_moved(identity: tuple[int, int] | None, source: Path, target: Path) -> bool:
    """Whether what was at `source`, by device and inode, is at `target` now."""
    return identity is not None and file_identity(source) is None and file_identity(target) == identity


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, which a rename does not change; None where there is nothing."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status.st_dev, status.st_ino
    return None


def remove_folder(path: Path) -> None:
    """Remove a folder, at once from its name: on NFS it stays as long as a file in it is open."""
    gone = path
    if f".{_GONE}" not in path.name:
        with contextlib.suppress(OSError):
            gone = path.with_name(f".{path.name.removeprefix('.')}.{_GONE}{_unique()}")
            rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or all of a folder, on disk when this returns."""
    for entry in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        sync_folder(entry) if entry.is_dir() else _sync(entry)


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool, locked: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    One process writes a folder at a time: InUse, a ValueError, names another one. `locked` where the caller is that
    writer already.
    """
    check_writable(path.parent)
    with contextlib.nullcontext() if locked else one_writer(path):
        recover(path)
        check_target(path, overwrite=overwrite)
        partial, replaced = (path.with_name(f".{path.name}.{kind}-{_unique()}") for kind in ("partial", "replaced"))
        try:
            with writing(path):
                partial.mkdir(parents=True)
                yield partial
                if path.exists():
                    rename(path, replaced)
                try:
                    atomic_replace(partial, path)
                except OSError:
                    if replaced.exists():
                        rename(replaced, path)
                    raise
                if replaced.exists():
                    remove_folder(replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear up after a process that was killed while it wrote a folder: what it was about to replace is put back.

    For the folder's one writer: what others have left there is of the dead, on whatever host they ran.
    """
    name = glob.escape(path.name)
    gone = list(path.parent.glob(f".{name}.*{_GONE}*"))
    # Whole, and one at most: what is removed loses this name first.
    replaced = [folder for folder in path.parent.glob(f".{name}.replaced-*") if folder not in gone]
    if replaced and not path.exists():
        rename(replaced.pop(), path)
    for left in [*replaced, *gone, *path.parent.glob(f".{name}.partial-*")]:
        remove_folder(left)
    for left in path.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def check_target(path: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """ValueError for a folder that exists, holds something, and may not be replaced; WriteFailed where none can be.

    Args:
        sources: what is made into it, and may not lie in it.
    """
    for source in sources:
        if source.expanduser().resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{path} is to be written and holds {source}, which it is made of; give another folder.")
    check_writable(path.parent)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists; give another folder, or ask to overwrite it.")


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    # Some network disks, and Windows, cannot flush a folder.
    with contextlib.suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
