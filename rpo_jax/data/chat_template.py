"""Chat templates that came with a tokenizer: programs of others, rendered where they can do no harm."""

from __future__ import annotations

import atexit
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_jax.core.records import Message
from rpo_jax.data.control_tokens import TextEncoder
from rpo_jax.data.limited_process import BeyondUseError, LimitedProcess, Stopped
from rpo_jax.data.tokenizer import DEFAULT_CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_SECONDS = 60.0  # of Python and jinja2, which may come from a slow disk
RENDER_SECONDS = 10.0  # for a prompt and its answers; a template takes well below a millisecond for each
_PROBE = "\ue000answer\ue001"  # private-use characters: no template changes them
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateError(BeyondUseError):
    """A template that cannot be used at all, whatever the messages."""


Wanted = tuple[Sequence[Message], bool]  # messages, and whether the assistant's turn is to be opened after them


class Ending(NamedTuple):
    """What a template writes after an assistant's last turn.

    `text` is what it writes up to the end token, that included; `token` the end token, None where it writes none;
    `after` how many control tokens it writes after that.
    """

    text: str
    token: str | None
    after: int = 0


class ChatTemplate:
    """The chat template of a tokenizer with its arguments, and what it makes of conversations.

    Attributes:
        encoder: knows the special tokens, and those added ones that this template itself writes, as control tokens.
        ending: how an answer ends; None where the template refuses a plain question and answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments or {})
        self.source = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        self.check_arguments(self._arguments, "data.template_arguments")
        self._beyond_use: str | None = None
        probe = self._probe()
        # Role tags are not always special tokens; what opens and closes thoughts the assistant writes itself.
        added, written = {str(token) for token in tokenizer.added_tokens_decoder.values()}, probe + self._system_probe()
        self.encoder = TextEncoder(tokenizer, (name for name in added if name in written and "think" not in name))
        after = probe.partition(_PROBE)[2]
        tokens = self.encoder.find(after)
        self.ending = None
        if probe:
            self.ending = Ending(after, None)
            if tokens:
                self.ending = Ending(after[: tokens[0].end], tokens[0].name, len(tokens) - 1)

    def _probe(self) -> str:
        for opening in ((), (Message("system", "a"),)):
            try:
                (text,) = self.render([((*opening, Message("user", "a"), Message("assistant", _PROBE)), False)])
            except TemplateError as error:
                self._beyond_use = str(error)  # told when a conversation is to be rendered: text needs no template
                break
            if isinstance(text, str):
                return text
        return ""

    def _system_probe(self) -> str:
        """What the template makes of a conversation with a system turn; nothing where it takes none."""
        roles = ("system", "user", "assistant")
        try:
            (text,) = self.render([(tuple(Message(role, "a") for role in roles), False)])
        except TemplateError:
            return ""
        return text if isinstance(text, str) else ""

    def check_arguments(self, arguments: Mapping[str, Any], where: str) -> None:
        """ValueError for an argument that the template does not read."""
        sources = list(self.source.values()) if isinstance(self.source, dict) else [self.source]
        for name in arguments:
            taken = name in ("messages", "add_generation_prompt")
            if taken or not any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
                raise ValueError(f"{where}: the tokenizer's chat template does not read {name!r}; leave it out.")

    def render(self, wanted: Sequence[Wanted], more: Mapping[str, Any] | None = None) -> list[str | ValueError]:
        """The text that each of the wanted conversations makes, or why the template refuses it.

        `more` is what else the template reads of these conversations (tools, enable_thinking, ...). Any template but
        the default one runs in jinja's sandbox, in a process without this one's environment variables, for at most
        RENDER_SECONDS and within the memory that template_worker allows. Raises TemplateError where it is beyond use.
        """
        if self._beyond_use is not None:
            raise TemplateError(self._beyond_use)
        tokenizer, arguments = self._tokenizer, {**self._arguments, **(more or {})}
        conversations = [([message.to_dict() for message in messages], opened) for messages, opened in wanted]
        if self.source == DEFAULT_CHAT_TEMPLATE:
            return [
                str(
                    tokenizer.apply_chat_template(
                        messages, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=opened
                    )
                )
                for messages, opened in conversations
            ]
        template = tokenizer.get_chat_template(tools=arguments.get("tools"))
        worker = _worker_for(json.dumps([template, dict(tokenizer.special_tokens_map)]))
        # In one request, for each takes two changes of process.
        outcomes = worker.ask([[messages, opened, arguments] for messages, opened in conversations])
        return [text if outcome == "ok" else ValueError(text) for outcome, text in outcomes]

    @property
    def end_texts(self) -> tuple[str, ...]:
        """The tokens that may end an answer: the template's, and EOS."""
        own = self.ending.token if self.ending is not None else None
        return tuple(str(token) for token in (own, self._tokenizer.eos_token) if token)

    @property
    def end_ids(self) -> frozenset[int]:
        """The token that ends an answer, where the template writes one."""
        if self.ending is None or self.ending.token is None:
            return frozenset()
        ids: Any = self._tokenizer.convert_tokens_to_ids([self.ending.token])
        return frozenset(ids)

    @property
    def writes_the_date(self) -> bool:
        """Whether the template asks for today's date, so that another day gives other tokens."""
        return "strftime_now" in str(self.source) and "date_string" not in self._arguments


def _worker_for(program: str) -> _Worker:
    """The worker of a template and its values; two are kept, for a tokenizer may have another template for tools."""
    worker = _kept.get(program)
    if worker is None:
        if len(_kept) > 1:
            close_worker()
        worker = _kept[program] = _Worker(program)
    return worker


@atexit.register
def close_worker() -> None:
    """Stop the process that renders, if there is one."""
    while _kept:
        _kept.popitem()[1].close()


class _Worker(LimitedProcess):
    """A process of template_worker.py, for one template."""

    def __init__(self, program: str) -> None:
        super().__init__(WORKER)
        ((outcome, reason),) = self.ask(json.loads(program), START_SECONDS)
        if outcome == "error":
            self.close()
            raise TemplateError(f"The tokenizer's chat template cannot be used: {reason}")

    def close(self) -> None:
        for program in [program for program, worker in _kept.items() if worker is self]:
            del _kept[program]
        super().close()

    def ask(self, request: Any, seconds: float | None = None) -> list[tuple[str, str]]:
        """For each thing asked ["ok", text] or ["error", reason]; TemplateError where no answer comes."""
        try:
            return self.exchange(request, RENDER_SECONDS if seconds is None else seconds)
        except BaseException as reason:
            self.close()  # after an interrupt too: its answer would be taken for the next one's
            if not isinstance(reason, Stopped):
                raise
            raise TemplateError(
                f"The tokenizer's chat template was stopped: {reason} for one prompt; use a tokenizer whose template "
                "you trust, or remove chat_template from its files."
            ) from None


_kept: dict[str, _Worker] = {}
