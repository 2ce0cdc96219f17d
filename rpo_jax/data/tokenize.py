"""Examples to token ids: one prompt per pair, one BOS, and EOS only after a response that was not cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int

from rpo_jax.core.records import Message, PreferenceExample, TokenizedExample
from rpo_jax.data.chat_template import TemplateError, render_messages
from rpo_jax.data.share import ALONE, Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_SIDES = ("keep_start", "keep_end")
TEMPLATES = ("auto", "chat")
# One call of the tokenizer returns Python lists, many times as large as the text: these bound them.
TEXTS_PER_CALL = 2048
CHARACTERS_PER_CALL = 2**22

HASH_BYTES = 32  # 128 bits in hexadecimal digits: no two of a billion texts have one hash
NO_TEXT = b"-" * HASH_BYTES

TokenIds = Int[np.ndarray, "_"]
T = TypeVar("T")


def tokenize_examples(
    examples: Sequence[PreferenceExample | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_tokens: int,
    truncation_side: Literal["keep_start", "keep_end"],
    template: Literal["auto", "chat"] = "auto",
    mismatched: bool = False,
    share: Share = ALONE,
) -> tuple[list[TokenizedExample], list[tuple[str, str]]]:
    """Tokenise examples in order; returns them, and (row_id, reason) of every row that cannot be used.

    Prompt and responses are tokenised apart, so no token straddles their boundary. Where the prompt and the longest
    response, its EOS included, exceed `max_tokens`, the prompt is cut to `max_prompt_tokens` (BOS stays), and
    then each response to what is left; a cut response has no EOS. `template` is as for render_prompt. With
    `mismatched`, each example also gets the response to the next different prompt of the data, cyclically.

    Each process tokenises its own examples, where `examples` holds None for another's, and gets the token ids of all:
    the result is that of one process.

    Raises ValueError for a tokenizer without EOS, limits that leave no room for a response, and `mismatched` on
    data with a single prompt.
    """
    _check_arguments(tokenizer, max_prompt_tokens, max_tokens, truncation_side)
    kept, prompts, bad_rows = _render_prompts(examples, tokenizer, template)
    refused = {number for part in share.gather(list(bad_rows)) for number in part}
    # Places among the usable examples of all processes.
    place = {number: at for at, number in enumerate(n for n in range(len(examples)) if n not in refused)}
    own = np.array([place[number] for number in kept], np.int64)
    usable = list(kept.values())
    rows = share.complete(_spread([example.row_id for example in usable], own, len(place)))
    prompt_of, text_ids = _numbered(usable, prompts, own, share)

    prompt_ids = _encode_distinct(prompts, encode_prompts, tokenizer)
    sides = {
        name: _encode_distinct([getattr(example, name) for example in usable], encode_responses, tokenizer)
        for name in ("chosen", "rejected")
    }
    has_bos = tokenizer.bos_token_id is not None
    for at, prompt in enumerate(prompt_ids):
        longest = max(len(ids[at]) for ids in sides.values() if ids[at] is not None)
        if len(prompt) + longest > max_tokens:
            prompt_ids[at] = cut_prompt(prompt, max_prompt_tokens, truncation_side, has_bos)
    # Not cut to their own example's room yet: as another's mismatched response, they may have more.
    prompt_ids, chosen_ids, rejected_ids = (
        _all_ids(ids, max_tokens, own, share) for ids in (prompt_ids, sides["chosen"], sides["rejected"])
    )
    partners = _next_other_prompt(prompt_of.tolist()) if mismatched else None

    tokenized = []
    for at, row_id in enumerate(rows):
        room = max_tokens - len(prompt_ids[at])
        partner = None if partners is None else partners[at]
        other = None if partner is None else (chosen_ids[partner], rejected_ids[partner])
        tokenized.append(
            TokenizedExample(
                row_id=row_id,
                prompt_ids=prompt_ids[at],
                chosen_ids=_cut(chosen_ids[at], room),
                rejected_ids=_cut(rejected_ids[at], room),
                prompt_id=int(prompt_of[at]),
                chosen_text_id=int(text_ids[at, 0]),
                rejected_text_id=int(text_ids[at, 1]),
                mismatched_ids=None if other is None else _cut(next(ids for ids in other if ids is not None), room),
            )
        )
    faults = sorted(
        (number, row) for part in share.gather([[n, row] for n, row in bad_rows.items()]) for number, row in part
    )
    return tokenized, [(row_id, reason) for _, (row_id, reason) in faults]


def _spread(mine: Sequence[T], places: Int[np.ndarray, "k"], count: int) -> list[T | None]:
    """A list of `count` with this process's things in their places."""
    whole: list[T | None] = [None] * count
    for place, thing in zip(places.tolist(), mine, strict=True):
        whole[place] = thing
    return whole


def _numbered(
    examples: Sequence[PreferenceExample], prompts: Sequence[str], own: Int[np.ndarray, "k"], share: Share
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n 2"]]:
    """Each prompt's and each response's number among the distinct ones, by first appearance; -1 for no response.

    Of several processes, none has all texts: they compare hashes.
    """
    texts = [(prompt, e.chosen, e.rejected) for prompt, e in zip(prompts, examples, strict=True)]
    hashes = np.frombuffer(
        b"".join(_hash(text) for three in texts for text in three), np.dtype(f"S{HASH_BYTES}")
    ).reshape(-1, 3)
    every = share.together(hashes.view(np.uint8), own).view(hashes.dtype)
    prompt_of = _by_first_appearance(every[:, 0])
    sides = every[:, 1:].ravel()
    present = sides != NO_TEXT
    text_ids = np.full(sides.shape, -1, np.int64)
    text_ids[present] = _by_first_appearance(sides[present])
    return prompt_of, text_ids.reshape(-1, 2)


def _hash(text: str | None) -> bytes:
    # No byte of it is 0, which NumPy would take for padding at the end.
    if text is None:
        return NO_TEXT
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES // 2).hexdigest().encode()


def _by_first_appearance(values: np.ndarray) -> Int[np.ndarray, "_"]:
    """Equal values get one number, 0, 1, ... in the order in which they first appear."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _encode_distinct(
    texts: Sequence[str | None],
    encode: Callable[[Sequence[str], PreTrainedTokenizerBase], list[TokenIds]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Any]:
    """Token ids of each text, equal texts encoded once; None for None."""
    distinct = list(dict.fromkeys(text for text in texts if text is not None))
    ids = dict(zip(distinct, encode(distinct, tokenizer), strict=True))
    return [None if text is None else ids[text] for text in texts]


def _all_ids(mine: Sequence[TokenIds | None], limit: int, own: Int[np.ndarray, "k"], share: Share) -> list[Any]:
    """Token ids of all processes, none longer than `limit`; None where there are none."""
    mine = [_cut(ids, limit) for ids in mine]
    if share.count == 1:
        return list(mine)
    lengths = np.array([-1 if ids is None else len(ids) for ids in mine], np.int64)
    flat = np.concatenate([np.zeros(0, np.int32), *(ids for ids in mine if ids is not None)])
    parts = share.gather({"own": own, "lengths": lengths, "ids": flat})
    whole: list[Any] = [None] * sum(len(part["own"]) for part in parts)
    for part in parts:
        ends = np.cumsum(np.maximum(part["lengths"], 0))
        for place, length, end in zip(part["own"].tolist(), part["lengths"].tolist(), ends.tolist(), strict=True):
            whole[place] = None if length < 0 else part["ids"][end - length : end]
    return whole


def _cut(ids: TokenIds | None, limit: int) -> TokenIds | None:
    return None if ids is None else ids[:limit]


def render_prompt(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Literal["auto", "chat"] = "auto"
) -> str:
    """The prompt as one text, with the assistant's turn opened where a chat template made it.

    Messages go through the tokenizer's chat template, or DEFAULT_CHAT_TEMPLATE where it has none. A string is used
    as it is with template `auto`, and as one user message with `chat`. Raises ValueError where the template
    refuses the messages, TemplateError where it cannot be used at all.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown; use one of {', '.join(TEMPLATES)}.")
    if isinstance(prompt, str):
        if template == "auto":
            return prompt
        prompt = (Message("user", prompt),)
    try:
        return render_messages(prompt, tokenizer)
    except TemplateError:
        raise  # no row is to blame
    except Exception as error:  # a template is a program: it may refuse what it is given in any way
        roles = ", ".join(message.role for message in prompt)
        raise ValueError(f"the tokenizer's chat template refuses the messages: roles {roles}: {error}") from error


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenIds]:
    """Token ids of rendered prompts: exactly one BOS, at the start, where the tokenizer has one.

    A template may have written BOS already, at the start or before every turn. A tokenizer whose BOS is its EOS
    keeps those further in, which end turns.
    """
    bos = tokenizer.bos_token_id
    encoded = _encode(texts, tokenizer)
    if bos is None:
        return encoded
    start = np.array([bos], np.int32)
    if bos == tokenizer.eos_token_id:
        return [ids if len(ids) and ids[0] == bos else np.concatenate([start, ids]) for ids in encoded]
    return [np.concatenate([start, ids[ids != bos]]) for ids in encoded]


def encode_responses(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenIds]:
    """Token ids of responses: no BOS, and EOS at the end, once also where the text brings its own."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = np.array([eos], np.int32)
    encoded = _encode(texts, tokenizer)
    if bos is not None and bos != eos:
        encoded = [ids[ids != bos] for ids in encoded]
    return [ids if len(ids) and ids[-1] == eos else np.concatenate([ids, end]) for ids in encoded]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenIds]:
    encoded = []
    for some in _in_calls(texts):
        # verbose=False: longer than the model's context is no news, the cut comes later.
        ids = tokenizer(some, add_special_tokens=False, verbose=False)
        encoded += [np.array(row, np.int32) for row in ids["input_ids"]]
    return encoded


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


def _check_arguments(
    tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_tokens: int, truncation_side: str
) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so a model could not learn to end a response; set eos_token in its "
            "tokenizer_config.json."
        )
    if not 1 <= max_prompt_tokens < max_tokens:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} must be at least 1 and leave room for a response in "
            f"max_tokens={max_tokens}; raise max_tokens or change max_prompt_tokens."
        )
    if truncation_side not in TRUNCATION_SIDES:
        raise ValueError(f"truncation_side={truncation_side!r} is unknown; use one of {', '.join(TRUNCATION_SIDES)}.")


def _render_prompts(
    examples: Sequence[PreferenceExample | None],
    tokenizer: PreTrainedTokenizerBase,
    template: Literal["auto", "chat"],
) -> tuple[dict[int, PreferenceExample], list[str], dict[int, tuple[str, str]]]:
    """This process's usable examples by number, their rendered prompts, and (row_id, reason) of the others."""
    kept: dict[int, PreferenceExample] = {}
    prompts: list[str] = []
    bad_rows: dict[int, tuple[str, str]] = {}
    for number, example in enumerate(examples):
        if example is None:
            continue
        try:
            prompt = render_prompt(example.prompt, tokenizer, template)
        except TemplateError:
            raise
        except ValueError as error:
            bad_rows[number] = example.row_id, str(error)
            continue
        if not prompt and tokenizer.bos_token_id is None:
            bad_rows[number] = example.row_id, "the prompt is empty, and the tokenizer has no BOS to stand for it"
            continue
        kept[number] = example
        prompts.append(prompt)
    return kept, prompts, bad_rows


def cut_prompt(ids: TokenIds, max_prompt_tokens: int, truncation_side: str, has_bos: bool) -> TokenIds:
    """The start of a prompt, or its end after BOS."""
    if len(ids) <= max_prompt_tokens or truncation_side == "keep_start":
        return ids[:max_prompt_tokens]
    head = ids[: int(has_bos)]
    return np.concatenate([head, ids[len(ids) - (max_prompt_tokens - len(head)) :]])


def _next_other_prompt(prompt_of: Sequence[int]) -> list[int]:
    """For each example the next one, cyclically, with a different prompt.  Depends on the data only, not on a seed."""
    count = len(prompt_of)
    if count and len(set(prompt_of)) == 1:
        raise ValueError(
            f"All {count} examples have the same prompt, so there is no mismatched response to estimate KTO's KL "
            "from; add examples with other prompts, or use another objective."
        )
    following = [0] * count
    for step in reversed(range(2 * count)):  # the second time round knows what follows the last example
        here, after = step % count, (step + 1) % count
        following[here] = after if prompt_of[after] != prompt_of[here] else following[after]
    return following
