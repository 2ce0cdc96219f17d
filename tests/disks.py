"""Disks that refuse, for real: a limit of file sizes, which binds every user, and a small disk that can be filled."""

import contextlib
import os
import resource

BLOCK = 4096


@contextlib.contextmanager
def small_files(room):
    """Nothing can make a file larger than `room` bytes: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def filled(folder, blocks_left=2):
    """Nothing but a few blocks left on the disk of this folder: ENOSPC."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(BLOCK))
    os.truncate(filler, max(0, filler.stat().st_size - blocks_left * BLOCK))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            filler.unlink()


@contextlib.contextmanager
def gone(folder):
    """The folder is elsewhere, as when its disk is not mounted."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        yield
    finally:
        aside.rename(folder)
