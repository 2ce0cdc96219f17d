"""Compiled programs on disk, through jax's own cache: what it cannot read or write there is told once, in one line."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rpo_jax.core.files import refusal
from rpo_jax.core.store import discard

_WARNING = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)
_SETTING = "JAX_COMPILATION_CACHE_DIR"


@contextlib.contextmanager
def keeping_compiled(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, jax keeps in a folder, or where its own setting says, what it compiles.

    jax warns of every program that it cannot keep. What it had written of one before the disk was full stays there, and
    is then read in vain by every run to come, as it overwrites nothing: so it is removed.
    """
    if _SETTING in os.environ:  # jax's own setting goes before ours
        folder = Path(os.environ[_SETTING])
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    warned: set[str] = set()
    since, show = time.time(), warnings.showwarning

    def shown(message: Warning | str, *rest: Any, **named: Any) -> None:
        match = _WARNING.match(str(message))
        if match is None:
            show(message, *rest, **named)
            return
        what, program, reason = match[1], match[2], " ".join(match[3].split())[:200]
        refused = refusal(folder, OSError(reason))
        for entry in folder.glob(f"{glob.escape(program)}-*-cache"):
            # One that was read is not what it should be, unless the disk is at fault; one that was written is new.
            if refused is None if what == "reading" else entry.stat().st_mtime >= since:
                discard(entry)
        if what not in warned:
            warned.add(what)
            if what == "reading":
                say(f"compiled programs in {folder} are compiled again: {reason}")
            else:
                say(f"compiled programs are not kept: {refused or f'{folder}: {reason}'}; it goes on without them")

    with warnings.catch_warnings():
        # Always: of two programs of one name each has its own file.
        warnings.filterwarnings("always", message=_WARNING.pattern.partition(" for ")[0])
        warnings.showwarning = shown
        yield
