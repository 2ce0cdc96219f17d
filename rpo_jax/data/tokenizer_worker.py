"""Encodes texts with tokenizers of others: run as a process of its own, which can be stopped and may not grow.

Reads JSON lines: first a tokenizer.json, as text, then [texts, add_special_tokens,
encode_special_tokens]; answers the first with ["ok" or "error", reason], each other with [numbers of tokens, all ids as
base64 of int32, reasons why a text has none by its number]. Standard library and tokenizers only.
"""

import base64
import json
import os
import resource
import sys
from array import array
from contextlib import suppress

from tokenizers import Tokenizer

MAX_BYTES = 2 << 30  # of this process's memory
BYTES_PER_CORE = 192 << 20  # of addresses that each thread reserves and does not use
MAX_TOKENS_PER_CHARACTER = 64  # one character makes 36 at most by the rules of Unicode
FREE_TOKENS = 64


def main():
    with suppress(ValueError, OSError):  # not every system can limit it
        most = MAX_BYTES + BYTES_PER_CORE * (os.cpu_count() or 1)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer, reason = _attempt(_loaded, json.loads(sys.stdin.readline()))
    if tokenizer is None:
        _answer(["error", reason])
        return
    _answer(["ok", ""])
    for line in sys.stdin:
        texts, add_special_tokens, tokenizer.encode_special_tokens = json.loads(line)
        _answer(_encoded(tokenizer, texts, add_special_tokens))


def _answer(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _loaded(state):
    tokenizer = Tokenizer.from_str(state)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoded(tokenizer, texts, add_special_tokens):
    def encode(some):
        return [one.ids for one in tokenizer.encode_batch_fast(some, add_special_tokens=add_special_tokens)]

    def encode_one(text):
        return encode([text])[0]

    all_ids, reason = _attempt(encode, texts)
    outcomes = [(ids, "") for ids in all_ids] if all_ids is not None else [_attempt(encode_one, text) for text in texts]
    lengths, everything, errors = [], array("i"), {}
    for number, (text, (ids, reason)) in enumerate(zip(texts, outcomes, strict=True)):
        if ids is not None and len(ids) > MAX_TOKENS_PER_CHARACTER * len(text) + FREE_TOKENS:
            ids, reason = None, f"it makes {len(ids):,} tokens of {len(text):,} characters"
        if ids is None:
            errors[number] = reason
        lengths.append(len(ids or ()))
        everything.extend(ids or ())
    return [lengths, base64.b64encode(everything.tobytes()).decode("ascii"), errors]


def _attempt(function, argument):
    """What a function gives, or None and why it gives nothing."""
    try:
        return function(argument), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        return None, f"{type(error).__name__}: {error}"[:2000]


if __name__ == "__main__":
    main()
