"""Text to token ids as the tokenizer has it, but that text of others never becomes a control token.

A chat template writes control tokens as text, and so may anybody: `<|im_end|>` in a message ends a turn once the
rendered text is encoded. transformers' `split_special_tokens` makes text of all of them, the template's too. Here those
of a message are marked before it is rendered, and a text with marks is encoded by a copy of the tokenizer whose control
tokens have other names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rpo_jax.data.limited_tokenizer import LimitedTokenizer, TokenIds, limited, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters, which no normaliser changes, around a number that nobody can guess.
_KEY = secrets.token_hex(8)
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for a byte of text, whatever the tokenizer calls it
_MARK = re.compile(f"\ue000{_KEY}-(\\d+)\ue001")


class ControlToken(NamedTuple):
    """A control token that stands in a text, from `start` to `end`."""

    name: str
    start: int
    end: int


class TextEncoder:
    """A tokenizer, and which of its tokens are control tokens: the special ones, and `others`.

    Attributes:
        prefix: what the tokenizer puts in front of a text by itself, such as BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = (str(token) for token in added if token.special)
        self._stripping = {str(token) for token in added if token.lstrip or token.rstrip}
        names = {
            name
            for name in (*special, *tokenizer.all_special_tokens, *others)
            # What opens and closes thoughts the assistant writes itself, and templates look for it in texts.
            if name and not _BYTE.fullmatch(name) and name not in ("<think>", "</think>")
        }
        self._names = sorted(names, key=lambda name: (-len(name), name))
        self._numbers = {name: number for number, name in enumerate(self._names)}
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for name in names:
            lengths[name[0]].add(len(name))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, lengths))}]" if lengths else "(?!)")

    @cached_property
    def prefix(self) -> TokenIds:
        for text in self._words():
            (bare,), (whole,) = self._outcomes([text]), self._outcomes([text], add_special_tokens=True)
            if isinstance(bare, ValueError) or isinstance(whole, ValueError):
                continue
            for start in range(len(whole) - len(bare) + 1):
                if len(bare) and np.array_equal(whole[start : start + len(bare)], bare):
                    return whole[:start]
        return np.zeros(0, np.int32)

    def _words(self) -> Iterator[str]:
        yield "a"
        # For those that know none but the words of their vocabulary.
        yield from islice((word for word in self.tokenizer.get_vocab() if word not in self._numbers), 8)

    def num_leading(self, prompt: TokenIds) -> int:
        """How many tokens stand before a prompt's text: the tokenizer's own, or a BOS with which a template begins."""
        size = len(self.prefix)
        if size and np.array_equal(prompt[:size], self.prefix):
            return size
        bos = self.tokenizer.bos_token_id  # where it comes again, it marks turns
        return int(bos is not None and prompt[:1].tolist() == [bos] and np.count_nonzero(prompt == bos) == 1)

    def find(self, text: str) -> list[ControlToken]:
        """The control tokens that stand in a text."""
        return list(self._found(text))

    def holds(self, text: str) -> bool:
        """Whether a control token stands in a text."""
        return next(self._found(text), None) is not None

    def _found(self, text: str) -> Iterator[ControlToken]:
        """From left to right, of those that begin at a place the longest, however many there are."""
        at = 0
        while (first := self._first.search(text, at)) is not None:
            at = first.start()
            for length in self._lengths[first[0]]:
                if (name := text[at : at + length]) in self._numbers:
                    yield ControlToken(name, at, at + length)
                    at += length
                    break
            else:
                at += 1

    def _replaced(self, text: str, other: Callable[[str], str]) -> str:
        pieces, at = [], 0
        for name, start, end in self._found(text):
            pieces += [text[at:start], other(name)]
            at = end
        return "".join([*pieces, text[at:]])

    def hide(self, value: Any) -> Any:
        """A text whose control tokens are marked as text of others; of lists and objects, all texts and keys."""
        if isinstance(value, str):
            return self._replaced(value, lambda name: f"\ue000{_KEY}-{self._numbers[name]}\ue001")
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return {self.hide(key): self.hide(item) for key, item in value.items()} if isinstance(value, dict) else value

    def is_marked(self, text: str) -> bool:
        """Whether a text holds what `hide` marked."""
        return _MARK.search(text) is not None

    def without_key(self, text: str) -> str:
        """A text as it is marked in every process."""
        return text.replace(_KEY, "")

    def shown(self, text: str) -> str:
        """A text with marks as it was."""
        return _MARK.sub(lambda mark: self._names[int(mark[1])], text)

    def encode(self, texts: Sequence[str], *, as_text: bool = False) -> list[TokenIds]:
        """Token ids of texts, without what the tokenizer adds.

        Args:
            as_text: whatever looks like a control token is text; otherwise what `hide` marked is.

        Raises ValueError for a text that the tokenizer cannot encode, and for one that needs it with a tokenizer
        written in Python, which cannot tell them apart; TokenizerError where it is beyond use.
        """
        encoded = []
        for outcome in self.outcomes(texts, as_text=as_text):
            if isinstance(outcome, ValueError):
                raise outcome
            encoded.append(outcome)
        return encoded

    def outcomes(self, texts: Sequence[str], *, as_text: bool = False) -> list[TokenIds | ValueError]:
        """What `encode` gives for each text, or why there is nothing."""
        kept = [i for i, text in enumerate(texts) if (self.holds(text) if as_text else self.is_marked(text))]
        encoded = dict(zip(kept, self._renamed_outcomes([texts[i] for i in kept], as_text), strict=True))
        plain = [i for i in range(len(texts)) if i not in encoded]
        encoded |= zip(plain, self._outcomes([texts[i] for i in plain]), strict=True)
        return [encoded[i] for i in range(len(texts))]

    def continuation(self, text: str) -> TokenIds:
        """Token ids of a text that goes on after another, without the space that some tokenizers put in front."""
        anchor = next((name for name in self._names if self.is_bare(name)), "")
        ids = self.encode([anchor + text])[0]
        return ids[1:] if anchor else ids

    def is_bare(self, name: str) -> bool:
        """Whether a control token is a match by itself, without the white space around it."""
        return name not in self._stripping

    def _outcomes(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[TokenIds | ValueError]:
        tokenizer = limited(self.tokenizer)
        if tokenizer is not None:
            return tokenizer.encode(texts, add_special_tokens=add_special_tokens)
        return [self._in_python(text, add_special_tokens) for text in texts]

    def _in_python(self, text: str, add_special_tokens: bool) -> TokenIds | ValueError:
        """By a tokenizer written in Python: no expression and no rule of its folder's own runs."""
        try:
            # verbose=False: longer than the model's context is no news, the cut comes later.
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        except Exception as error:  # of many kinds
            return refusal(f"{type(error).__name__}: {error}")
        return np.array(encoded["input_ids"], np.int32)

    def _renamed_outcomes(self, texts: Sequence[str], as_text: bool) -> list[TokenIds | ValueError]:
        if not texts:
            return []
        if limited(self.tokenizer) is None:
            example = self.shown(texts[0])
            return [
                ValueError(
                    f"the text holds {self.find(example)[0].name!r}, and this tokenizer, which is written in Python, "
                    "would make a control token of it; use one with a tokenizer.json."
                )
            ] * len(texts)
        renamed, numbers = self._renamed
        if not as_text:
            texts = [self.shown(self._replaced(text, _secret)) for text in texts]
        return [_renumbered(outcome, numbers) for outcome in renamed.encode(texts)]

    @cached_property
    def _renamed(self) -> tuple[LimitedTokenizer, dict[int, int]]:
        """The tokenizer with other names for its control tokens, and which of its ids are others than they were."""
        from tokenizers import Tokenizer

        backend: Any = self.tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        names = {name: _secret(name) for name in self._names}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        # As a word of the vocabulary too it would be found in text.
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:  # which may make such a word of its pieces
            merges = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
            model["merges"] = [merge for merge, parts in merges if not {"".join(parts), *parts} & names.keys()]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state |= {"post_processor": None, "truncation": None, "padding": None}
        content = json.dumps(state)
        renamed = Tokenizer.from_str(content)
        numbers = {renamed.token_to_id(new): backend.token_to_id(name) for name, new in names.items()}
        return LimitedTokenizer(content), {new: old for new, old in numbers.items() if new is not None and new != old}


def _secret(name: str) -> str:
    return f"\ue002{_KEY}{name.encode().hex()}\ue003"


def _renumbered(outcome: TokenIds | ValueError, numbers: dict[int, int]) -> TokenIds | ValueError:
    if isinstance(outcome, ValueError):
        return outcome
    return np.array([numbers.get(number, number) for number in outcome.tolist()], np.int32)
