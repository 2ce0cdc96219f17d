"""Examples to token ids: one prompt per pair, one BOS, and EOS only after a response that was not cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from rpo_jax.core.records import Message, PreferenceExample, TokenizedExample, TokenizedResponse
from rpo_jax.data.chat_template import TemplateError, render_messages
from rpo_jax.data.faults import Faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_SIDES = ("keep_start", "keep_end")
TEMPLATES = ("auto", "chat")
# One call of the tokenizer returns Python lists, many times as large as the text: these bound them.
TEXTS_PER_CALL = 2048
CHARACTERS_PER_CALL = 2**22

TokenIds = Int[np.ndarray, "_"]


@dataclass(frozen=True)
class TokenLimits:
    """How prompts are rendered and sequences are cut.

    Where a prompt and the longest response to it, its EOS included, exceed `max_tokens`, the prompt is cut to
    `max_prompt_tokens` (BOS stays), and then each response to what is left; a cut response has no EOS. `template` is
    as for render_prompt. Raises ValueError for limits that leave no room for a response.
    """

    max_prompt_tokens: int
    max_tokens: int
    truncation_side: Literal["keep_start", "keep_end"]
    template: Literal["auto", "chat"] = "auto"

    def __post_init__(self) -> None:
        side = self.truncation_side
        if not 1 <= self.max_prompt_tokens < self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} must be at least 1 and leave room for a response in "
                f"max_tokens={self.max_tokens}; raise max_tokens or change max_prompt_tokens."
            )
        if side not in TRUNCATION_SIDES:
            raise ValueError(f"truncation_side={side!r} is unknown; use one of {', '.join(TRUNCATION_SIDES)}.")


def tokenize_examples(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    *,
    mismatched: bool = False,
) -> tuple[list[TokenizedExample], Faults]:
    """Tokenise examples in order; returns them, and the rows that cannot be used.

    Prompt and responses are tokenised apart, so no token straddles their boundary. With `mismatched`, each example also
    gets the response to the next different prompt of the data, cyclically.

    Raises ValueError for a tokenizer without EOS, and for `mismatched` on data with a single prompt.
    """
    return join_encoded(examples, encode_examples(examples, tokenizer, limits), limits, mismatched=mismatched)


def encode_examples(
    examples: Sequence[PreferenceExample], tokenizer: PreTrainedTokenizerBase, limits: TokenLimits
) -> list[dict[str, Any]]:
    """What each example is in tokens, whatever other examples there are.

    That is `fault`, why it cannot be used; or `prompt`, its ids, `responses`, their ids, not yet cut to the room that
    the prompt leaves, and `rendered`, a hash of the prompt's text. Raises ValueError for a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so a model could not learn to end a response; set eos_token in its "
            "tokenizer_config.json."
        )
    has_bos = tokenizer.bos_token_id is not None
    rendered = [_rendered(example, tokenizer, limits.template) for example in examples]
    prompts = _encode_distinct([text for text, fault in rendered if not fault], encode_prompts, tokenizer)
    usable = [example for example, (_, fault) in zip(examples, rendered, strict=True) if not fault]
    responses = _encode_distinct([one.text for e in usable for one in e.responses], encode_responses, tokenizer)
    encoded = []
    for example, (text, fault) in zip(examples, rendered, strict=True):
        if fault:
            encoded.append({"fault": fault})
            continue
        prompt, own = prompts[text], [responses[one.text] for one in example.responses]
        if len(prompt) + max(map(len, own)) > limits.max_tokens:
            prompt = cut_prompt(prompt, limits.max_prompt_tokens, limits.truncation_side, has_bos)
        own = [ids[: limits.max_tokens] for ids in own]
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()  # 128 bits: none of a billion texts share it
        encoded.append({"fault": None, "prompt": prompt, "responses": own, "rendered": key})
    return encoded


def join_encoded(
    examples: Sequence[PreferenceExample],
    encoded: Sequence[Mapping[str, Any]],
    limits: TokenLimits,
    *,
    mismatched: bool = False,
) -> tuple[list[TokenizedExample], Faults]:
    """What `encode_examples` made of all of a data set, as tokenize_examples returns it."""
    faults = Faults()
    for example, found in zip(examples, encoded, strict=True):
        if found["fault"]:
            faults.add(example.row_id, found["fault"])
    usable = [(e, found) for e, found in zip(examples, encoded, strict=True) if not found["fault"]]
    prompt_ids: dict[str, int] = {}
    text_ids: dict[str, int] = {}
    tokenized = []
    for example, found in usable:
        room = limits.max_tokens - len(found["prompt"])
        responses = [
            TokenizedResponse(one.kind, ids[:room], text_ids.setdefault(one.text, len(text_ids)))
            for one, ids in zip(example.responses, found["responses"], strict=True)
        ]
        number = prompt_ids.setdefault(found["rendered"], len(prompt_ids))
        tokenized.append(TokenizedExample(example.row_id, number, (found["prompt"],), tuple(responses)))
    if mismatched:
        partners = _next_other_prompt([example.prompt_id for example in tokenized])
        tokenized = [
            # Cut to this example's room alone: it may have more than the response's own prompt leaves.
            _with_response(example, "mismatched", usable[partner][1]["responses"][0], limits.max_tokens)
            for example, partner in zip(tokenized, partners, strict=True)
        ]
    return tokenized, faults


def _with_response(example: TokenizedExample, kind: str, ids: TokenIds, max_tokens: int) -> TokenizedExample:
    response = TokenizedResponse(kind, ids[: max_tokens - len(example.prompt_ids)])
    return replace(example, responses=(*example.responses, response))


def _rendered(
    example: PreferenceExample, tokenizer: PreTrainedTokenizerBase, template: Literal["auto", "chat"]
) -> tuple[str, str | None]:
    """The prompt's text, and why it cannot be used; None where it can."""
    try:
        text = render_prompt(example.prompt, tokenizer, template)
    except TemplateError:
        raise  # no row is to blame
    except ValueError as error:
        return "", str(error)
    if not text and tokenizer.bos_token_id is None:
        return "", "the prompt is empty, and the tokenizer has no BOS to stand for it"
    return text, None


def _encode_distinct(
    texts: Sequence[str],
    encode: Callable[[Sequence[str], PreTrainedTokenizerBase], list[TokenIds]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, TokenIds]:
    """Token ids by text; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(distinct, tokenizer), strict=True))


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
