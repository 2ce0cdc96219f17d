"""Power cuts, simulated: what a disk may hold of a folder if the power had gone at any fsync, rename or removal.

POSIX promises of a file what was there at its last fsync, of a folder the entries of its last fsync; of what came later
any part may be there. Writes are not followed: content is read at the fsync, whoever wrote it, in whatever language.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PowerCuts:
    """Follows a folder while the block runs, and keeps what a cut before an event would leave.

    Args:
        folder: what is in it at the start counts as on disk.
        disks: where the remains are laid out, a folder for each cut.
        told: called at each cut.
        every: cut before each so-manieth event.

    Attributes:
        cuts: of each cut the remains, and what `told` said.
    """

    def __init__(self, folder: Path, disks: Path, told: Callable[[], Any], every: int = 1, seed: int = 0) -> None:
        self.folder, self.disks, self.told, self.every = folder.resolve(), disks, told, every
        self.cuts: list[tuple[Path, Any]] = []
        self._events = 0
        self._random = random.Random(seed)
        self._content: dict[int, bytes] = {}  # of files, by inode, at their last fsync
        self._entries: dict[int, dict[str, tuple[int, bool]]] = {}  # of folders: name to inode, and whether it is one
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir")}

    def __enter__(self) -> PowerCuts:
        for path in [self.folder, *self.folder.rglob("*")]:
            self._note(path)
        for name in self._real:
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def _watched(self, name: str) -> Callable:
        real = self._real[name]

        def call(target, *arguments, **named):
            if threading.current_thread().name == "cut":
                return real(target, *arguments, **named)
            with self._lock:
                path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target))
                ours = path.resolve().is_relative_to(self.folder) if "dir_fd" not in named else False
                if ours:
                    self._event()
                result = real(target, *arguments, **named)
                if ours and name == "fsync":
                    self._note(path)
                if name in ("unlink", "rmdir"):  # its inode's number is given again
                    self._forget_removed()
                return result

        return call

    def _here(self) -> dict[int, Path]:
        found = {}
        for path in [self.folder, *self.folder.rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # other threads go on
                found[path.stat().st_ino] = path
        return found

    def _forget_removed(self) -> None:
        here = self._here()
        for known in (self._content, self._entries):
            for inode in known.keys() - here.keys():
                del known[inode]

    def _note(self, path: Path) -> None:
        """What fsync of this path promises."""
        inode = path.stat().st_ino
        if path.is_dir():
            self._entries[inode] = self._listed(path)
        else:
            self._content[inode] = path.read_bytes()

    def _listed(self, path: Path) -> dict[str, tuple[int, bool]]:
        with contextlib.suppress(FileNotFoundError):  # other threads go on
            return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        return {}

    def _event(self) -> None:
        self._events += 1
        if self._events % self.every == 0:
            self._current = self._here()
            remains = self.disks / str(self._events)
            self._lay_out(self.folder.stat().st_ino, remains)
            self.cuts.append((remains, self.told()))

    def _lay_out(self, inode: int, target: Path) -> None:
        """Write a folder as the disk may have it: with the entries of its last fsync, or with those of now."""
        target.mkdir(parents=True)
        old, now = self._entries.get(inode), None
        if (path := self._current.get(inode)) is not None and path.is_dir():
            now = self._listed(path)
        choices = [entries for entries in (old, now) if entries is not None]
        for name, (child, is_folder) in self._random.choice(choices or [{}]).items():
            if is_folder:
                self._lay_out(child, target / name)
            else:
                (target / name).write_bytes(self._bytes(child))

    def _bytes(self, inode: int) -> bytes:
        synced, path = self._content.get(inode), self._current.get(inode)
        written = None
        if path is not None and path.is_file():
            with contextlib.suppress(FileNotFoundError):
                written = path.read_bytes()
        if synced is not None and (written is None or written == synced):
            return synced
        written = written or b""
        kept = self._random.choice([b"", written[: len(written) // 2], written])
        return kept if synced is None else self._random.choice([kept, synced])
