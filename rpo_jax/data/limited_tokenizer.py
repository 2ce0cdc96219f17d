"""Tokenizers that came from others: their regular expressions and rules run where they can be stopped.

A tokenizer.json is a program: its expressions may take for ever or break the library, its rules may make a gigabyte of
a sentence. What Rust does cannot be interrupted from within, so it runs in tokenizer_worker.py.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from rpo_jax.data.limited_process import BeyondUseError, LimitedProcess, Stopped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = Int[np.ndarray, "_"]

WORKER = Path(__file__).with_name("tokenizer_worker.py")
START_SECONDS = 60.0  # a large vocabulary takes one or two
CALL_SECONDS, CHARACTERS_PER_SECOND = 10.0, 50_000  # a tokenizer takes a hundredth of that
WASTED_SECONDS = 60.0  # on texts one by one, after a call of many had to be stopped
TEXTS_PER_CALL, CHARACTERS_PER_CALL = 2048, 1 << 20  # bound the memory that a call takes
KEPT = 2  # processes at a time: a tokenizer and its renamed copy


class TokenizerError(BeyondUseError):
    """A tokenizer that cannot be used at all, whatever the texts."""


class LimitedTokenizer:
    """A tokenizer of the tokenizers library, in a process that is started when it is first needed.

    Args:
        state: the content of its tokenizer.json, or a function that gives it.
        split_special_tokens: whether its control tokens are text when they stand in a text.
    """

    def __init__(self, state: str | Callable[[], str], *, split_special_tokens: bool = False) -> None:
        self._state, self._key, self._split = state, "", split_special_tokens
        self._wasted = 0.0

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[TokenIds | ValueError]:
        """Token ids of each text, or why it has none. Raises TokenizerError where that seems true of any text."""
        encoded: list[TokenIds | ValueError] = []
        for some in _in_calls(texts):
            try:
                encoded += self._call(some, add_special_tokens)
            except Stopped as reason:
                encoded += [self._alone(text, str(reason), add_special_tokens) for text in some]
        return encoded

    def _alone(self, text: str, reason: str, add_special_tokens: bool) -> TokenIds | ValueError:
        """One of the texts that could not be encoded together: most of them can."""
        if self._wasted > WASTED_SECONDS:
            raise TokenizerError(
                f"The tokenizer was stopped: {reason}, and text by text it is no better; use one that you trust."
            )
        began = time.monotonic()
        try:
            (outcome,) = self._call([text], add_special_tokens)
        except Stopped as error:
            outcome = refusal(f"it was stopped: {error} for one text")
        self._wasted += time.monotonic() - began
        return outcome

    def _call(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenIds | ValueError]:
        seconds = CALL_SECONDS + sum(map(len, texts)) / CHARACTERS_PER_SECOND
        with _one_at_a_time:
            process = self._process()
            try:
                lengths, packed, errors = process.exchange([texts, add_special_tokens, self._split], seconds)
            except BaseException:  # also an interrupt, after which its answer would be taken for another's
                _close(self._key)
                raise
        ids = np.frombuffer(base64.b64decode(packed), np.int32)
        parts: list[TokenIds | ValueError] = [part.copy() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        for number, reason in errors.items():
            parts[int(number)] = refusal(reason)
        return parts

    def _process(self) -> LimitedProcess:
        if self._key not in _kept:
            state = self._state if isinstance(self._state, str) else self._state()
            self._key = hashlib.sha256(state.encode()).hexdigest()
            if self._key not in _kept:
                while len(_kept) >= KEPT:
                    _close(next(iter(_kept)))
                _kept[self._key] = _started(state)
        return _kept[self._key]


def _started(state: str) -> LimitedProcess:
    process = LimitedProcess(WORKER)
    try:
        outcome, reason = process.exchange(state, START_SECONDS)
    except Stopped as error:
        outcome, reason = "error", f"it was stopped: {error}"
    except BaseException:
        process.close()
        raise
    if outcome != "ok":
        process.close()
        raise TokenizerError(f"The tokenizer cannot be used: {reason}.")
    return process


def limited(tokenizer: PreTrainedTokenizerBase) -> LimitedTokenizer | None:
    """The same for all who ask, as long as the tokenizer stays as it is; None for one that is written in Python."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    version = len(tokenizer), str(backend.post_processor), bool(tokenizer.split_special_tokens)
    known = _limited.get(tokenizer)
    if known is None or known[0] != version:
        made = LimitedTokenizer(backend.to_str, split_special_tokens=version[2])
        known = _limited[tokenizer] = version, made
    return known[1]


@atexit.register
def close_tokenizers() -> None:
    """Stop the processes; they start again when they are needed."""
    while _kept:
        _close(next(iter(_kept)))


def _close(key: str) -> None:
    process = _kept.pop(key, None)
    if process is not None:
        process.close()


def refusal(reason: str) -> ValueError:
    """Why a row with this text cannot be used."""
    return ValueError(f"the tokenizer cannot encode a text: {reason}")


def _in_calls(texts: Sequence[str]) -> Iterator[list[str]]:
    some, characters = [], 0
    for text in texts:
        if some and (len(some) == TEXTS_PER_CALL or characters + len(text) > CHARACTERS_PER_CALL):
            yield some
            some, characters = [], 0
        some.append(text)
        characters += len(text)
    if some:
        yield some


_kept: dict[str, LimitedProcess] = {}
_one_at_a_time = threading.Lock()  # of the calls of all threads
_limited: weakref.WeakKeyDictionary[Any, tuple[Any, LimitedTokenizer]] = weakref.WeakKeyDictionary()
