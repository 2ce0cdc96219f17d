"""The end of memory, on the host or on a device: one message, whichever library finds it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

_WORDS = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can't allocate memory", re.IGNORECASE)
_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


class OutOfMemory(OSError):
    """Memory was not enough; the message says for what, and what to try."""


def size(count: float) -> str:
    """Bytes in the unit that people say them in."""
    unit, factor = next((unit for unit in _UNITS if count >= unit[1]), _UNITS[-1])
    return f"{count / factor:,.1f} {unit}"


def shortage(error: BaseException) -> str | None:
    """What an error says of memory that was not enough, in one line; None for errors of another kind.

    jax and torch raise kinds of RuntimeError, NumPy a MemoryError, the system an OSError.
    """
    is_one = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not is_one and not (isinstance(error, RuntimeError) and _WORDS.search(str(error))):
        return None
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no more could be had")
    line = re.sub(r"^([A-Z_]+: )+", "", line)[:300].rstrip(".:")
    return re.sub(r"\b(\d{4,}) ?bytes", lambda match: size(int(match[1])), line)


@contextlib.contextmanager
def explaining_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory for what ends inside for want of memory; `advice` ends its message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or (reason := shortage(error)) is None:
            raise
        raise OutOfMemory(f"out of memory: {reason}; {advice()}") from error
