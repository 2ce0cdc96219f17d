"""Lines of text files, compressed by gzip or not, of bounded length."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from rpo_jax.core.memory import size
from rpo_jax.data.faults import BrokenFile

MAX_LINE_BYTES = 16 * 2**20  # a few million tokens: beyond that a line is no preference, and memory has a bound
TOO_LONG = f"too long: the line has more than {MAX_LINE_BYTES // 2**20} MiB"

MAX_GROWTH, FREE_BYTES = 200, 64 * 2**20  # of a compressed document: text grows about fivefold, a bomb a thousandfold
_PIECE_BYTES = 2**20

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def read_line(stream: io.BufferedIOBase) -> bytes:
    """The next line; of one longer than MAX_LINE_BYTES, its start and one byte more than that.

    Raises BrokenFile where a compressed file breaks off.
    """
    try:
        raw = stream.readline(MAX_LINE_BYTES + 1)
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
        return raw
    except GZIP_ERRORS as error:
        raise broken_gzip(error) from None


def read_document(path: Path) -> bytes:
    """All bytes of a file.

    Raises BrokenFile where a compressed one breaks off, ValueError where it grows as no text does.
    """
    try:
        with open_bytes(path) as stream:
            if not isinstance(stream, gzip.GzipFile):
                return stream.read()
            most = MAX_GROWTH * path.stat().st_size + FREE_BYTES
            pieces, length = [], 0
            while piece := stream.read(_PIECE_BYTES):  # one read of `most` bytes would ask for all that memory at once
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise ValueError(
                        f"{path} grows to more than {size(most)} when it is decompressed, which no text does; "
                        "decompress it where there is room and look at what it holds."
                    )
            return b"".join(pieces)
    except GZIP_ERRORS as error:
        raise broken_gzip(error) from None


def broken_gzip(error: Exception) -> BrokenFile:
    return BrokenFile(
        f"truncated or no gzip file ({error}); fetch it again, or drop '.gz' from its name if it is not compressed"
    )


def check_encoding(raw: bytes, path: Path) -> None:
    """Raises ValueError where a file's first bytes say that it is not UTF-8."""
    for mark, name in _OTHER_ENCODINGS.items():
        if raw.startswith(mark):
            raise ValueError(f"{path} is not UTF-8: it is {name}; save the file as UTF-8.")
