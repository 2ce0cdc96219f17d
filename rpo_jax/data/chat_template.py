"""Chat templates that came with a tokenizer: programs of others, rendered where they can do no harm."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_jax.core.records import Message
from rpo_jax.data.tokenizer import DEFAULT_CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0  # for one prompt; a template takes well below a millisecond
MAX_ANSWER_BYTES = 1 << 29
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateError(ValueError):
    """A template that cannot be used at all, whatever the messages."""


def render_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = True
) -> str:
    """The text that messages make by the tokenizer's chat template, DEFAULT_CHAT_TEMPLATE where it has none.

    It ends where the assistant is to go on, or with add_generation_prompt=False with the last message. Any template but
    the default one runs in jinja's sandbox, in a process without this one's environment variables, for at most
    RENDER_SECONDS a prompt and within the memory that template_worker allows. Raises ValueError where the template
    refuses the messages, TemplateError where it is beyond use.
    """
    given = [message.to_dict() for message in messages]
    if (tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE) == DEFAULT_CHAT_TEMPLATE:
        rendered = tokenizer.apply_chat_template(
            given,
            chat_template=DEFAULT_CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(rendered)
    worker = _worker_for(json.dumps([tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)]))
    return worker.ask([given, add_generation_prompt])


def _worker_for(program: str) -> _Worker:
    """The worker of a template and its values; one is kept, for there is one tokenizer to a run."""
    worker = _kept.get(program)
    if worker is None:
        close_worker()
        worker = _kept[program] = _Worker(program)
    return worker


@atexit.register
def close_worker() -> None:
    """Stop the process that renders, if there is one."""
    while _kept:
        _kept.popitem()[1].close()


class _Worker:
    """A process of template_worker.py, for one template."""

    def __init__(self, program: str) -> None:
        paths = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],  # not beside its own folder, where a module is called tokenize
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**paths, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        )
        try:
            self.ask(json.loads(program))
        except TemplateError:
            raise
        except ValueError as error:
            self.close()
            raise TemplateError(f"The tokenizer's chat template cannot be used: {error}") from None

    def close(self) -> None:
        for program in [program for program, worker in _kept.items() if worker is self]:
            del _kept[program]
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what could not be written to a process that died
                stream.close()

    def ask(self, request: Any) -> str:
        """The answer's text; ValueError with its reason where it is an error, TemplateError where none comes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            outcome, text = json.loads(self._line(time.monotonic() + RENDER_SECONDS))
        except (OSError, EOFError) as error:
            self.close()
            reason = str(error) or "it used too much memory"
            raise TemplateError(
                f"The tokenizer's chat template was stopped: {reason}; use a tokenizer whose template you trust, or "
                "remove chat_template from its files."
            ) from None
        if outcome == "error":
            raise ValueError(text)
        return text

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        pieces = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            size = 0
            while not pieces or not pieces[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"it took more than {RENDER_SECONDS:g} s for one prompt")
                pieces.append(os.read(self._process.stdout.fileno(), 1 << 20))
                size += len(pieces[-1])
                if not pieces[-1]:
                    raise EOFError
                if size > MAX_ANSWER_BYTES:
                    raise EOFError("it wrote too much")
        return b"".join(pieces)


_kept: dict[str, _Worker] = {}
