"""Work on files of others in a process of its own, which can be stopped, may not grow, and sees no secrets."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MAX_ANSWER_BYTES = 1 << 29


class BeyondUseError(ValueError):
    """A template or a tokenizer that cannot be used at all: no row is to blame, and every other would fail too."""


class Stopped(Exception):
    """Why a process gave no answer."""


class LimitedProcess:
    """A program of this package that answers a line of JSON with one; it limits its own memory."""

    def __init__(self, program: Path) -> None:
        paths = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],  # not beside its own folder, where a module is called tokenize
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**paths, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def exchange(self, request: Any, seconds: float) -> Any:
        """The answer to a request; after Stopped, which says why there is none, only `close` is of use."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        waiting, pieces = memoryview(json.dumps(request).encode() + b"\n"), []
        size, deadline = 0, time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdin, selectors.EVENT_WRITE)
            selector.register(self._process.stdout, selectors.EVENT_READ)
            try:
                while not pieces or not pieces[-1].endswith(b"\n"):
                    ready = selector.select(max(0.0, deadline - time.monotonic()))
                    if not ready:
                        raise Stopped(f"it took more than {seconds:g} s")
                    for key, _ in ready:
                        if key.fileobj is self._process.stdin:
                            waiting = waiting[os.write(key.fd, waiting) :]
                            if not waiting:
                                selector.unregister(self._process.stdin)
                            continue
                        pieces.append(os.read(key.fd, 1 << 20))
                        size += len(pieces[-1])
                        if not pieces[-1]:
                            raise Stopped("it used too much memory")
                        if size > MAX_ANSWER_BYTES:
                            raise Stopped("it wrote too much")
            except BrokenPipeError:
                raise Stopped("it used too much memory") from None
        return json.loads(b"".join(pieces))
