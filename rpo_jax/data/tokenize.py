"""Examples to token ids: what the tokenizer and its chat template make, one prompt for all responses to it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from rpo_jax.core.records import Message, PreferenceExample, TokenizedExample, TokenizedExamples, TokenizedResponse
from rpo_jax.data.chat_template import ChatTemplate
from rpo_jax.data.control_tokens import TextEncoder
from rpo_jax.data.conversations import AnswerText, Conversation, without_end
from rpo_jax.data.faults import Faults
from rpo_jax.data.layouts.parts import common_prefix
from rpo_jax.data.limited_process import BeyondUseError
from rpo_jax.data.limited_tokenizer import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_SIDES = ("keep_start", "keep_end")
TEMPLATES = ("auto", "chat")
_EMPTY = re.compile(r"\s*<think>\s*</think>")
_HASH_BYTES = 16

BLOCK_EXAMPLES = 4096  # encoded together; equal texts among them once
MANY_CUT = 0.05  # of prompts or responses: a warning
# What may be worth a word about usable examples, besides `prompts_cut` and `responses_cut`: the name under which it is
# counted, and what is said.
NOTES = {
    "parted": "examples in which the template writes an answer otherwise than it opens one, from where they part",
    "empty_thought": "examples whose answers begin with an empty thought, which is learnt with them "
    "(data.template_arguments={enable_thinking: false} makes it part of the prompt, where the template knows that)",
    "control_text": "examples whose texts hold what looks like a control token; it stays text",
    "raw_prompts": "string prompts used as they are, though the tokenizer has a chat template (data.template=chat "
    "makes turns of them)",
    "doubled_bos": "string prompts that begin with BOS, which the tokenizer adds as well",
}


@dataclass(frozen=True)
class TokenLimits:
    """How prompts are rendered and sequences are cut.

    Where a prompt and the longest response to it, its end token included, exceed `max_tokens`, the prompt is cut to
    `max_prompt_tokens`, and then each response to what is left; a cut response has no end token. Of a conversation
    whole turns are left out, the oldest first, a system turn at its start stays, and where the last turn of the user
    alone is too long, its text is cut. `template` is as for as_messages, `template_arguments` is what the chat
    template gets besides. Raises ValueError for limits that leave no room for a response.
    """

    max_prompt_tokens: int
    max_tokens: int
    truncation_side: Literal["keep_start", "keep_end"]
    template: Literal["auto", "chat"] = "auto"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        side = self.truncation_side
        if not 1 <= self.max_prompt_tokens < self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} must be at least 1 and leave room for a response in "
                f"max_tokens={self.max_tokens}; raise max_tokens or change max_prompt_tokens."
            )
        if side not in TRUNCATION_SIDES:
            raise ValueError(f"truncation_side={side!r} is unknown; use one of {', '.join(TRUNCATION_SIDES)}.")


@dataclass
class Tokenized:
    """Examples in token ids, the rows that cannot be used, and what is worth a word about the others.

    Attributes:
        counts: `examples` and `responses` that can be used, and by a name in NOTES, how many.
    """

    examples: TokenizedExamples
    faults: Faults
    counts: dict[str, int]


def tokenize_examples(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    limits: TokenLimits,
    *,
    mismatched: bool = False,
) -> tuple[TokenizedExamples, Faults]:
    """Tokenise examples in order; returns them, and the rows that cannot be used.

    Conversations: the prompt is what the template makes of it, a response what the template adds with it, up to its end
    token. Text: prompt and responses are tokenised apart, so no token straddles their boundary. With `mismatched`, each
    example also gets the response to the next different prompt of the data, cyclically.

    Raises ValueError for a tokenizer without EOS, and for `mismatched` on data with a single prompt.
    """
    joined = join_encoded(examples, encode_examples(examples, tokenizer, limits), limits, mismatched=mismatched)
    return joined.examples, joined.faults


@dataclass
class _Text:
    """An example as texts. Those of a conversation begin with the prompt, those of text alone do not."""

    prompt: str
    answers: tuple[AnswerText, ...] | None = None
    responses: tuple[tuple[str, str | None], ...] = ()  # of text alone: each without its end token, and that token
    # Where the last control token begins that the prompt shares with all answers. Tokenizers split text at control
    # tokens and encode what stands between apart: what stands before this one need not be encoded with each answer.
    boundary: int = 0


def encode_examples(
    examples: Sequence[PreferenceExample], tokenizer: PreTrainedTokenizerBase, limits: TokenLimits
) -> Iterator[dict[str, Any]]:
    """What each example is in tokens, whatever other examples there are; a block of them in memory at a time.

    That is `fault`, why it cannot be used; or `prompt`, its ids, `responses`, their ids, not yet cut to the room that
    the prompt leaves, `rendered`, a hash of the prompt's text, and `notes`, names in NOTES. Raises ValueError for a
    tokenizer without EOS.
    """
    encoder = _ExampleEncoder(tokenizer, limits)
    with ThreadPoolExecutor(1) as ahead:  # the tokenizer, in a process of its own, is a block ahead
        waiting: tuple[Sequence[PreferenceExample], list[_Text | str], Future[_Encoded]] | None = None
        for start in range(0, len(examples), BLOCK_EXAMPLES):
            block = examples[start : start + BLOCK_EXAMPLES]
            texts = encoder.texts(block)
            encoding = ahead.submit(_Encoded, encoder.encoder, [text for text in texts if isinstance(text, _Text)])
            if waiting is not None:
                yield from encoder.encoded(*waiting)
            waiting = block, texts, encoding
        if waiting is not None:
            yield from encoder.encoded(*waiting)


class _ExampleEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: TokenLimits) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no EOS token, so a model could not learn to end a response; set eos_token in its "
                "tokenizer_config.json."
            )
        self.tokenizer, self.limits = tokenizer, limits
        self.template = ChatTemplate(tokenizer, limits.template_arguments)
        self.encoder = self.template.encoder
        self.eos = np.array([tokenizer.eos_token_id], np.int32)

    def texts(self, examples: Sequence[PreferenceExample]) -> list[_Text | str]:
        """Each example's, or why it has none."""
        texts: list[_Text | str] = []
        for example in examples:
            try:
                texts.append(self._text(example, as_messages(example.prompt, self.limits.template)))
            except BeyondUseError:
                raise  # no row is to blame
            except ValueError as error:
                texts.append(str(error))
        return texts

    def encoded(
        self, examples: Sequence[PreferenceExample], texts: Sequence[_Text | str], encoding: Future[_Encoded]
    ) -> Iterator[dict[str, Any]]:
        ids = encoding.result()
        for example, text in zip(examples, texts, strict=True):
            try:
                if isinstance(text, str):
                    raise ValueError(text)
                outcome = self._encoded(example, text, ids)
            except BeyondUseError:
                raise
            except ValueError as error:
                outcome = {"fault": str(error)}
            yield outcome

    def _text(self, example: PreferenceExample, prompt: str | tuple[Message, ...]) -> _Text:
        for one in example.responses:
            if one.text and not one.turns and not without_end(one.text, self.template.end_texts)[0].strip():
                raise ValueError(f"empty {one.kind} response: an end token alone")
        if isinstance(prompt, str):
            if example.template_arguments:
                raise ValueError("template arguments of a text: tools and the like need a prompt of messages")
            if not prompt and not len(self.encoder.prefix):
                raise ValueError("the prompt is empty, and the tokenizer has no BOS to stand for it")
            ends = self.template.end_texts
            return _Text(prompt, responses=tuple(without_end(one.text, ends) for one in example.responses))
        rendered = Conversation(self.template, prompt, example.template_arguments, example.responses)
        shared = len(reduce(common_prefix, (answer.text for answer in rendered.answers), rendered.text))
        bare = (token for token in self.encoder.find(rendered.text) if self.encoder.is_bare(token.name))
        tokens = [token for token in bare if token.end <= shared]
        return _Text(rendered.text, rendered.answers, boundary=tokens[-1].start if tokens else 0)

    def _encoded(self, example: PreferenceExample, text: _Text, ids: _Encoded) -> dict[str, Any]:
        limits, notes = self.limits, []
        prompt, responses, parted = self._joined(text, ids)
        if len(prompt) + max(map(len, responses)) > limits.max_tokens and len(prompt) > limits.max_prompt_tokens:
            notes.append("prompts_cut")
            if text.answers is None:
                prompt = cut_prompt(prompt, limits.max_prompt_tokens, limits.truncation_side, len(self.encoder.prefix))
            else:
                messages = as_messages(example.prompt, limits.template)
                assert not isinstance(messages, str)
                shorter = fit_messages(self.template, messages, example.template_arguments, limits)
                again = self._text(example, shorter)
                prompt, responses, parted = self._joined(again, _Encoded(self.encoder, [again]))
        if parted:
            notes.append("parted")
        if text.answers is not None and all(_EMPTY.match(one.text, len(text.prompt)) for one in text.answers):
            notes.append("empty_thought")
        if text.answers is None:
            has_template = self.tokenizer.chat_template is not None
            controls = self.encoder.holds(text.prompt)
            notes += ["raw_prompts"] * (has_template and not controls)
            prefix = self.encoder.prefix
            notes += ["doubled_bos"] * bool(len(prefix) and prompt[1:2].tolist() == prefix[:1].tolist())
            hidden = any(self.encoder.holds(response) for response, _ in text.responses)
        else:
            hidden = any(self.encoder.is_marked(answer.text) for answer in text.answers)
        notes += ["control_text"] * hidden
        key = hashlib.blake2b(self.encoder.without_key(text.prompt).encode(), digest_size=_HASH_BYTES).hexdigest()
        responses = [one[: limits.max_tokens + 1] for one in responses]  # one more tells that it is cut
        return {"fault": None, "prompt": prompt, "responses": responses, "rendered": key, "notes": notes}

    def _joined(self, text: _Text, ids: _Encoded) -> tuple[TokenIds, list[TokenIds], bool]:
        """Prompt and responses in tokens, and whether a response begins before the end of the prompt's text."""
        if text.answers is None:
            ends = (self.eos if end is None else self._end(end) for _, end in text.responses)
            own = [np.concatenate([ids.plain(one), end]) for (one, _), end in zip(text.responses, ends, strict=True)]
            return np.concatenate([self.encoder.prefix, ids.rendered(text.prompt)]), own, False
        start = text.boundary
        head, opening = ids.rendered(text.prompt[:start]), ids.rendered(text.prompt[start:])
        ways, shared = [], len(opening)
        for answer in text.answers:
            whole = ids.rendered(answer.text[start:])
            common = _common(opening, whole)
            if answer.continues is not None and common < len(opening):
                # A token of the whole straddles the end of the prompt; the model goes on after the prompt's own.
                whole, common = np.concatenate([opening, self.encoder.continuation(answer.continues)]), len(opening)
            ways.append(whole if answer.ended else np.concatenate([whole, self.eos]))
            shared = min(shared, common)
        return np.concatenate([head, opening[:shared]]), [way[shared:] for way in ways], shared < len(opening)

    def _end(self, token: str) -> TokenIds:
        return np.array([self.tokenizer.convert_tokens_to_ids(token)], np.int32)


class _Encoded:
    """Token ids of the texts of examples; equal texts are encoded once."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[_Text]) -> None:
        parts: dict[str, None] = {}
        for text in texts:
            start = text.boundary
            wanted = [text.prompt[:start], text.prompt[start:], *(one.text[start:] for one in text.answers or ())]
            parts |= dict.fromkeys(wanted)
        plain = dict.fromkeys(response for text in texts for response, _ in text.responses)
        self._rendered = dict(zip(parts, encoder.outcomes(list(parts)), strict=True))
        self._plain = dict(zip(plain, encoder.outcomes(list(plain), as_text=True), strict=True))

    def rendered(self, text: str) -> TokenIds:
        """Of a prompt, or of a conversation's part; ValueError where the tokenizer has none."""
        return _ids(self._rendered[text])

    def plain(self, text: str) -> TokenIds:
        """Of a response that is text, control tokens in it too; ValueError where the tokenizer has none."""
        return _ids(self._plain[text])


def _ids(outcome: TokenIds | ValueError) -> TokenIds:
    if isinstance(outcome, ValueError):
        raise ValueError(str(outcome))  # a new one: several rows may share it
    return outcome


def _common(first: TokenIds, second: TokenIds) -> int:
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


def as_messages(prompt: str | tuple[Message, ...], template: str) -> str | tuple[Message, ...]:
    """A prompt as it is rendered: a string stays one with template `auto`, and is a user's message with `chat`."""
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown; use one of {', '.join(TEMPLATES)}.")
    return (Message("user", prompt),) if isinstance(prompt, str) and template == "chat" else prompt


def fit_messages(
    template: ChatTemplate, messages: tuple[Message, ...], arguments: str, limits: TokenLimits
) -> tuple[Message, ...]:
    """The messages that fit max_prompt_tokens; ValueError where none do.

    The oldest turns are left out, so that what is left begins with a user's turn, but for system turns at the start;
    then the text of the last user's turn is cut.
    """

    def fits(some: Sequence[Message]) -> bool:
        text = Conversation(template, some, arguments).text
        return len(template.encoder.encode([text])[0]) <= limits.max_prompt_tokens

    opening = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i >= opening]
    for start in starts:
        if fits(kept := (*messages[:opening], *messages[start:])):
            return kept
    last = starts[-1] if starts else None
    if last is not None:
        content = messages[last].content

        def cut(size: int) -> tuple[Message, ...]:
            text = content[:size] if limits.truncation_side == "keep_start" else content[len(content) - size :]
            return (*messages[:opening], messages[last]._replace(content=text), *messages[last + 1 :])

        low, high = 0, len(content)  # the most characters that fit, by halves
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(cut(middle)) else (low, middle)
        if low:
            return cut(low)
    raise ValueError(
        "the prompt does not fit: without its older turns and its text it takes more than "
        f"data.max_prompt_tokens={limits.max_prompt_tokens}"
    )


def join_encoded(
    examples: Sequence[PreferenceExample],
    encoded: Iterable[Mapping[str, Any]],
    limits: TokenLimits,
    *,
    mismatched: bool = False,
) -> Tokenized:
    """What `encode_examples` made of all of a data set, as tokenize_examples returns it, and notes on it."""
    faults, notes = Faults(), Counter[str]()
    prompts, texts = bytearray(), bytearray()  # hashes: 128 bits, which none of a billion share
    whole: list[TokenIds] = []  # first responses, not cut

    def usable() -> Iterator[TokenizedExample]:
        for example, outcome in zip(examples, encoded, strict=True):
            fault = outcome["fault"] or _made_equal(example, outcome, limits)
            if fault:
                faults.add(example.row_id, fault)
                continue
            room = limits.max_tokens - len(outcome["prompt"])
            notes.update(outcome["notes"])
            notes["responses_cut"] += sum(len(ids) > room for ids in outcome["responses"])
            prompts.extend(bytes.fromhex(outcome["rendered"]))
            for response in example.responses:
                texts.extend(hashlib.blake2b(response.text.encode(), digest_size=_HASH_BYTES).digest())
            if mismatched:
                whole.append(outcome["responses"][0])
            pairs = zip(example.responses, outcome["responses"], strict=True)
            responses = tuple(TokenizedResponse(one.kind, ids[:room]) for one, ids in pairs)
            yield TokenizedExample(example.row_id, -1, (outcome["prompt"],), responses)

    tokenized = TokenizedExamples(usable()).numbered(*map(_numbers, (prompts, texts)))
    counts = {"examples": len(tokenized), "responses": len(tokenized.kind), **+notes}
    if mismatched:
        partners = _next_other_prompt(tokenized.prompt_id.tolist())
        tokenized = TokenizedExamples(
            # Cut to this example's room alone: it may have more than the response's own prompt leaves.
            _with_response(example, "mismatched", whole[partner], limits.max_tokens)
            for example, partner in zip(tokenized, partners, strict=True)
        )
    return Tokenized(tokenized, faults, counts)


def _numbers(hashes: bytearray) -> Int[np.ndarray, "_"]:
    """Numbers of distinct hashes, in the order in which they first appear."""
    _, first, number = np.unique(np.frombuffer(hashes, f"V{_HASH_BYTES}"), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]


def describe_cuts(counts: Mapping[str, int], max_tokens: int) -> str | None:
    """How many prompts and responses were cut, in one line, with advice where they are many; None where none was."""
    prompts, responses = counts.get("prompts_cut", 0), counts.get("responses_cut", 0)
    if not prompts and not responses:
        return None
    text = f"{prompts:,} prompts and {responses:,} responses cut (data.max_tokens {max_tokens})"
    share = max(prompts / counts["examples"], responses / counts["responses"])
    return text if share <= MANY_CUT else f"{text}: {share:.0%}; raise data.max_tokens and data.max_prompt_tokens"


def describe_notes(counts: Mapping[str, int]) -> list[str]:
    """What else is worth a word, a line each."""
    return [f"{counts[name]:,} {text}" for name, text in NOTES.items() if counts.get(name)]


def _made_equal(example: PreferenceExample, outcome: Mapping[str, Any], limits: TokenLimits) -> str | None:
    """Why responses that differ as texts do not as tokens; None where they do."""
    room = limits.max_tokens - len(outcome["prompt"])
    made: dict[str, dict[bytes, int]] = {"chosen": {}, "rejected": {}}
    for response, ids in zip(example.responses, outcome["responses"], strict=True):
        made.setdefault(response.kind, {})[ids[:room].tobytes()] = len(ids)
    equal = made["chosen"].keys() & made["rejected"].keys()
    if not equal:
        return None
    if any(made["chosen"][ids] > room for ids in equal):
        return (
            f"chosen equals rejected once cut: data.max_tokens={limits.max_tokens} leaves {room} tokens after the "
            "prompt; raise it"
        )
    return "chosen equals rejected in tokens: the chat template or the tokenizer drops what differs"


def _with_response(example: TokenizedExample, kind: str, ids: TokenIds, max_tokens: int) -> TokenizedExample:
    response = TokenizedResponse(kind, ids[: max_tokens - len(example.prompt_ids)])
    return replace(example, responses=(*example.responses, response))


class PromptEncoder:
    """Prompts that are to be answered to token ids, as training makes them.

    Args:
        max_prompt_tokens: longer prompts are cut as in training; None leaves them as they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Literal["auto", "chat"],
        template_arguments: Mapping[str, Any],
        max_prompt_tokens: int | None,
        truncation_side: Literal["keep_start", "keep_end"],
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_arguments)
        size = max_prompt_tokens or 1
        self._limits = TokenLimits(size, size + 1, truncation_side, template, template_arguments)
        self._cuts = max_prompt_tokens is not None

    def encode(self, prompt: str | tuple[Message, ...], arguments: str = "") -> TokenIds:
        """Token ids of one prompt; ValueError with the reason for one that cannot be used."""
        encoder, limits = self.template.encoder, self._limits
        messages = as_messages(prompt, limits.template)
        if isinstance(messages, str):
            if arguments:
                raise ValueError("template arguments of a text: tools and the like need a prompt of messages")
            ids = np.concatenate([encoder.prefix, *encoder.encode([messages])])
            if not self._cuts:
                return ids
            return cut_prompt(ids, limits.max_prompt_tokens, limits.truncation_side, len(encoder.prefix))
        (ids,) = encoder.encode([Conversation(self.template, messages, arguments).text])
        if not self._cuts or len(ids) <= limits.max_prompt_tokens:
            return ids
        shorter = fit_messages(self.template, messages, arguments, limits)
        return encoder.encode([Conversation(self.template, shorter, arguments).text])[0]


def cut_prompt(ids: TokenIds, max_prompt_tokens: int, truncation_side: str, num_prefix: int) -> TokenIds:
    """The start of a prompt, or its end after the tokens that the tokenizer puts in front."""
    if len(ids) <= max_prompt_tokens or truncation_side == "keep_start":
        return ids[:max_prompt_tokens]
    head = ids[:num_prefix]
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
        before, after = step % count, (step + 1) % count
        following[before] = after if prompt_of[after] != prompt_of[before] else following[after]
    return following
