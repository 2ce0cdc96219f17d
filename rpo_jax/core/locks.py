"""One writer a place: a lock file beside a run, an export or a file of answers, which says who writes there.

Two things tell whether its owner lives, and neither is a process id, which is 1 in every container, nor a clock:

- flock, which the kernel gives up when the process ends, however it ends. It reaches all containers of a machine, and
  all hosts of an NFSv4 disk.
- a heartbeat, for another host on a disk whose flock does not reach: the file's time changes every BEAT_SECONDS. It is
  watched for a change, and compared with nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: heartbeats alone
    fcntl = None

BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0  # a process that has not beaten for so long is taken for dead
NAME_SECONDS = 2.0  # until who has the lock has written its name into it
MAX_BYTES = 4096  # of a lock file
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a disk without locks
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine

log = logging.getLogger(__name__)


class InUse(ValueError):
    """Another process writes there; the message names it."""


@contextlib.contextmanager
def one_writer(path: Path, key: str = "") -> Iterator[None]:
    """Inside, no other process that asks for it writes a file or folder, which need not exist yet.

    Args:
        key: of the configuration, which gave the path; for messages.

    Raises InUse where another process of any host is inside. A lock whose owner is dead is taken over; it takes
    WATCH_SECONDS to see that where the owner ran on another host, or before this one was started again.
    """
    what = f"{key}={path}" if key else str(path)
    with contextlib.ExitStack() as held:
        # By both names where it is a link: whoever replaces the link has another place under the same name.
        for place in sorted({path.resolve(), path.parent.resolve() / path.name}):
            held.enter_context(_held(_lock_file(place), what))
        yield


def _lock_file(place: Path) -> Path:
    """Beside the place, which may be replaced whole; in it where nothing can be written beside it."""
    inside = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    return place / ".lock" if inside else place.with_name(f".{place.name[:200]}.lock")


@contextlib.contextmanager
def _held(file: Path, what: str) -> Iterator[None]:
    record = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        "token": secrets.token_hex(8),
    }
    descriptor, ended = _take(file, what, record), threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, file, what, record, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join(BEAT_SECONDS)  # not longer: its disk may hang
        with contextlib.suppress(OSError):
            if _is_at(descriptor, file) and _is_of(_read(descriptor), record):
                file.unlink()
        os.close(descriptor)


def _take(file: Path, what: str, record: dict[str, Any]) -> int:
    """The open lock file, with this process's record in it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.ExitStack() as unless_taken:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                unless_taken.callback(os.close, descriptor)
                reaches = _lock(descriptor, file, what)
                kernel = f"{_boot_id()} {os.fstat(descriptor).st_dev}"
                owner = _read(descriptor)
                # Of a process of this boot that has the lock, on this mounted disk, the kernel would have said so.
                if owner and not (reaches and owner.get("kernel") == kernel) and _is_beating(file, what, owner):
                    raise _refused(file, what, owner)
                if _is_at(descriptor, file):  # else its owner was done meanwhile, and has removed it
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps({**record, "kernel": kernel}).encode(), 0)
                    os.fsync(descriptor)
                    unless_taken.pop_all()
                    return descriptor
    except OSError as error:
        raise OSError(f"{what} cannot be locked: {file} is not written ({error.strerror}).") from None


def _boot_id() -> str:
    """Which start of which machine this is."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return socket.gethostname()


def _lock(descriptor: int, file: Path, what: str) -> bool:
    """Lock it; False where this disk has no locks. Raises InUse where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        deadline = time.monotonic() + NAME_SECONDS
        while (owner := _read(descriptor)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        raise _refused(file, what, owner) from None
    return True


def _refused(file: Path, what: str, owner: dict[str, Any] | None) -> InUse:
    return InUse(
        f"{what} is in use: {_name(owner)} writes there; wait for it, or give another place. "
        f"If it is gone for good, remove {file}."
    )


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['process']} on {owner['host']}, since {owner['since']} by its clock,"


def _read(descriptor: int) -> dict[str, Any] | None:
    """What a lock file says about its owner; None where it says nothing that could be used."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(os.pread(descriptor, MAX_BYTES, 0)):
            case {"host": str(host), "process": int(), "since": str(since), "token": str()} as owner:
                return owner if host.isprintable() and since.isprintable() else None
    return None


def _is_of(owner: dict[str, Any] | None, record: dict[str, Any]) -> bool:
    return owner is not None and owner["token"] == record["token"]


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _is_beating(file: Path, what: str, owner: dict[str, Any]) -> bool:
    log.warning(
        "%s: %s did not say that it is done; looking for %g s whether it lives", what, _name(owner), WATCH_SECONDS
    )
    first, deadline = _changed(file), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        if (now := _changed(file)) is None:
            return False  # it is done
        if now != first:
            return True
    return False


def _changed(file: Path) -> int | None:
    """When a file was last changed, by whatever clock; opened first, as NFS may otherwise tell what it knew before."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        return os.fstat(opened.fileno()).st_mtime_ns
    return None


def _beat(descriptor: int, file: Path, what: str, record: dict[str, Any], ended: threading.Event) -> None:
    """Say that this process lives, and end it where another one has taken it for dead."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a network disk may be away for a while
            os.utime(descriptor)
            with file.open("rb") as opened:
                owner = _read(opened.fileno())
            if owner is not None and not _is_of(owner, record) and not ended.is_set():
                line = f"error: {what} is written by {_name(owner)} too, which took this process for dead; it stops.\n"
                os.write(2, line.encode())
                os._exit(2)
