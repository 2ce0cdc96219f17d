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
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TokenIds = Int[np.ndarray, "_"]

# One call of the tokenizer returns Python lists, many times as large as the text: these bound them.
TEXTS_PER_CALL = 2048
CHARACTERS_PER_CALL = 2**22

# Private-use characters, which no normaliser changes, around a number that nobody can guess.
_KEY = secrets.token_hex(8)
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for a byte of text, whatever the tokenizer calls it
_MARK = re.compile(f"\ue000{_KEY}-(\\d+)\ue001")


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
            name for name in (*special, *tokenizer.all_special_tokens, *others) if name and not _BYTE.fullmatch(name)
        }
        self._names = sorted(names, key=lambda name: (-len(name), name))  # the longest first, as it is matched
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")

    @cached_property
    def prefix(self) -> TokenIds:
        bare = self._ids(["a"])[0]
        whole = np.array(self.tokenizer("a", verbose=False)["input_ids"], np.int32)
        for start in range(len(whole) - len(bare) + 1):
            if np.array_equal(whole[start : start + len(bare)], bare):
                return whole[:start]
        return whole[:0]

    def num_leading(self, prompt: TokenIds) -> int:
        """How many tokens stand before a prompt's text: the tokenizer's own, or a BOS with which a template begins."""
        size = len(self.prefix)
        if size and np.array_equal(prompt[:size], self.prefix):
            return size
        bos = self.tokenizer.bos_token_id  # where it comes again, it marks turns
        return int(bos is not None and prompt[:1].tolist() == [bos] and np.count_nonzero(prompt == bos) == 1)

    def find(self, text: str) -> list[re.Match[str]]:
        """The control tokens that stand in a text."""
        return list(self._pattern.finditer(text))

    def hide(self, value: Any) -> Any:
        """A text whose control tokens are marked as text of others; of lists and objects, all texts in them."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"\ue000{_KEY}-{self._names.index(found[0])}\ue001", value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return {key: self.hide(item) for key, item in value.items()} if isinstance(value, dict) else value

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

        Raises ValueError for a text that needs it with a tokenizer written in Python, which cannot tell them apart.
        """
        kept = [i for i, text in enumerate(texts) if (self._pattern if as_text else _MARK).search(text)]
        encoded = dict(zip(kept, self._renamed_ids([texts[i] for i in kept], as_text), strict=True))
        plain = [i for i in range(len(texts)) if i not in encoded]
        encoded |= zip(plain, self._ids([texts[i] for i in plain]), strict=True)
        return [encoded[i] for i in range(len(texts))]

    def continuation(self, text: str) -> TokenIds:
        """Token ids of a text that goes on after another, without the space that some tokenizers put in front."""
        anchor = next((name for name in self._names if self.is_bare(name)), "")
        ids = self.encode([anchor + text])[0]
        return ids[1:] if anchor else ids

    def is_bare(self, name: str) -> bool:
        """Whether a control token is a match by itself, without the white space around it."""
        return name not in self._stripping

    def _ids(self, texts: Sequence[str]) -> list[TokenIds]:
        encoded = []
        for some in _in_calls(texts):
            # verbose=False: longer than the model's context is no news, the cut comes later.
            ids = self.tokenizer(some, add_special_tokens=False, verbose=False)
            encoded += [np.array(row, np.int32) for row in ids["input_ids"]]
        return encoded

    def _renamed_ids(self, texts: Sequence[str], as_text: bool) -> list[TokenIds]:
        if not texts:
            return []
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            example = self.shown(texts[0])
            raise ValueError(
                f"the text holds {self.find(example)[0][0]!r}, and this tokenizer, which is written in Python, would "
                "make a control token of it; use one with a tokenizer.json."
            )
        renamed, numbers = self._renamed
        if not as_text:
            texts = [self.shown(self._pattern.sub(lambda found: _secret(found[0]), text)) for text in texts]
        encoded = renamed.encode_batch(texts, add_special_tokens=False)
        return [np.array([numbers.get(number, number) for number in one.ids], np.int32) for one in encoded]

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
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
            model["merges"] = [merge for merge, parts in merges if not {"".join(parts), *parts} & set(names)]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state |= {"post_processor": None, "truncation": None, "padding": None}
        renamed = Tokenizer.from_str(json.dumps(state))
        numbers = {renamed.token_to_id(new): backend.token_to_id(name) for name, new in names.items()}
        return renamed, {new: old for new, old in numbers.items() if new is not None and new != old}


def _secret(name: str) -> str:
    return f"\ue002{_KEY}{name.encode().hex()}\ue003"


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
