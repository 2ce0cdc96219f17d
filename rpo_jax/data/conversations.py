"""A prompt and its answers as texts: where the prompt ends, what an answer is, and what a template would drop."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpo_jax.core.records import Message, Response
from rpo_jax.data.chat_template import ChatTemplate, Wanted

if TYPE_CHECKING:
    from rpo_jax.data.control_tokens import ControlToken, TextEncoder

_OPENED = re.compile(r"<think>\s*\Z")
_CONTINUED = "\ue000continued\ue001"
# The names of an assistant's reasoning in a message, as transformers takes them; it gives templates the first and last.
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class AnswerText:
    """What a template makes of a conversation with its answer, up to the end token.

    Attributes:
        text: all of it, control tokens of its contents marked as text.
        continues: where it does not begin with the prompt's text: what goes on after that; None where it parts from it.
        ended: the template wrote the end token; otherwise EOS follows.
    """

    text: str
    continues: str | None
    ended: bool


class Conversation:
    """The messages of a prompt, rendered, and answers to it.

    Raises ValueError, with a reason whose words before the first colon name the kind of fault, for messages that the
    template refuses, or of which it leaves something out.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        arguments: str = "",
        responses: Sequence[Response] = (),
    ) -> None:
        self._template, self._encoder = template, template.encoder
        parsed: dict[str, Any] = json.loads(arguments) if arguments else {}
        template.check_arguments(parsed, "template arguments of the row")
        self._more = self._encoder.hide(parsed)
        self._messages = tuple(hidden(message, self._encoder) for message in messages)
        self._continued = messages[-1].role == "assistant"  # the responses go on with that turn
        asked = (self._messages, True)
        if self._continued:
            *before, last = self._messages
            asked = ((*before, last._replace(content=last.content + _CONTINUED)), False)
        turns = [self._turns(response) for response in responses]
        self.text, *answered = self._render([asked, *((own, False) for own in turns)])
        if self._continued:
            self.text, mark, _ = self.text.partition(_CONTINUED)
            if not mark:
                raise ValueError("the assistant's turn that a response is to continue is not in the rendered prompt")
        self._check_nothing_is_left_out(self._messages, self.text)
        for response, own, text in zip(responses, turns, answered, strict=True):
            self._check_nothing_is_left_out(own, text, response)
        self.answers = tuple(map(self._answer, responses, (own[-1] for own in turns), answered))

    def _render(self, wanted: Sequence[Wanted]) -> list[str]:
        texts = self._template.render(wanted, self._more)
        for (messages, _), text in zip(wanted, texts, strict=True):
            if isinstance(text, ValueError):
                roles = ", ".join(message.role for message in messages)
                raise ValueError(f"the tokenizer's chat template refuses the messages: roles {roles}: {text}")
        return [str(text) for text in texts]

    def _turns(self, response: Response) -> tuple[Message, ...]:
        """The conversation with a response, whose own end token, and what follows it, is left out."""
        *turns, last = response.turns or (Message("assistant", response.text),)
        last = last._replace(content=without_end(last.content, self._template.end_texts)[0])
        *turns, last = (hidden(turn, self._encoder) for turn in (*turns, last))
        if self._continued and not turns:
            *before, started = self._messages
            return (*before, started._replace(content=started.content + last.content))
        return (*self._messages, *turns, last)

    def _check_nothing_is_left_out(self, messages: Sequence[Message], text: str, own: Response | None = None) -> None:
        """ValueError for turns and calls of the rendered prompt, or those of a response, that are not in its text."""
        first, whose = (0, "") if own is None else (len(self._messages), f" of the {own.kind} response")
        marked, marks = list(messages), {}
        for number, message in enumerate(messages[first:], first):
            if (
                message.role != "assistant" and message.content.strip() not in text
            ):  # or written otherwise: as JSON, say
                marked[number] = message._replace(content=_mark(number))
                marks[_mark(number)] = f"turns{whose}: those of the role {message.role!r}"
            more = _more(message)
            for place, call in enumerate(more.get("tool_calls") or ()):
                named = call.get("function", call) if isinstance(call, Mapping) else None
                if isinstance(named, dict) and isinstance(named.get("name"), str):
                    marks[_mark(number, place)] = f"tool calls{whose}: that of {named['name']!r}"
                    named["name"] = _mark(number, place)
            if more.get("tool_calls"):
                marked[number] = marked[number]._replace(more=json.dumps(more))
        if not marks:
            return
        (rendered,) = self._render([(marked, own is None and not self._continued)])
        for mark, what in marks.items():
            if mark not in rendered:
                raise ValueError(f"the tokenizer's chat template leaves out {what}")

    def _answer(self, response: Response, last: Message, whole: str) -> AnswerText:
        """ValueError for a response that the template does not write as it is."""
        ending = self._template.ending
        for name in _REASONING:
            text = _more(last).get(name)
            if isinstance(text, str) and text.strip() not in whole:
                raise ValueError(
                    f"the tokenizer's chat template leaves out {name}: that of the {response.kind} response"
                )
        content = last.content
        if content.lstrip().startswith("<think>") and "</think>" not in content:
            raise ValueError(f"<think> is left open: the {response.kind} response never closes it")
        end, ended = len(whole), False
        if ending is None or ending.token is not None:
            token = self._end_token(whole)
            if token is not None:
                end, ended = token.end, True
        elif whole.endswith(ending.text):
            end -= len(ending.text)
        whole = whole[:end]
        thoughts, closed, _ = content.partition("</think>")
        thoughts = thoughts.rpartition("<think>")[2].strip() if closed else ""
        if whole.startswith(self.text):
            continues = whole[len(self.text) :]
        elif _OPENED.search(self.text) and closed:
            # Templates drop thoughts of earlier turns, often of the last one too; the model is to go on with them.
            kept = content.lstrip().removeprefix("<think>").lstrip() if "<think>" in content else content
            continues = kept + (ending.text if ending is not None and ending.token else "")
            whole, ended = self.text + continues, bool(ending and ending.token)
        else:
            continues = None
        if thoughts not in whole:
            raise ValueError(
                f"the tokenizer's chat template leaves out thoughts: those of the {response.kind} response"
            )
        return AnswerText(whole, continues, ended)

    def _end_token(self, whole: str) -> ControlToken | None:
        """The control token that ends the last turn of a rendered conversation.

        Turns may end in others than answers do: calls of tools in <|eom_id|> or <|call|>. The last <|eot_id|> is then
        one of an earlier turn, with further control tokens behind it, and the text ends in the turn's own.
        """
        ending, start = self._template.ending, len(self.text) if whole.startswith(self.text) else 0
        own = [token for token in self._encoder.find(whole) if token.start >= start]
        last = own[-1 - (ending.after if ending is not None else 0) :]
        found = next((token for token in reversed(last) if ending is None or token.name == ending.token), None)
        if found is None and own and not whole[own[-1].end :].strip():
            found = own[-1]
        return found


def without_end(text: str, ends: Sequence[str]) -> tuple[str, str | None]:
    """A text without end tokens, and white space after them, at its end; and the first of these tokens."""
    first, end = None, len(text)
    while True:
        bare = end
        while bare and text[bare - 1].isspace():
            bare -= 1
        token = next((token for token in ends if text.endswith(token, 0, bare)), None)
        if token is None:
            return text[:end], first
        end, first = bare - len(token), token


def hidden(message: Message, encoder: TextEncoder) -> Message:
    """The message with all control tokens in its texts marked, its reasoning under the names that templates read."""
    more = _more(message)
    reasoning = next((more[name] for name in _REASONING if more.get(name) is not None), None)
    if reasoning is not None:
        more = {"thinking": reasoning, **more, "reasoning_content": reasoning}
    return Message(message.role, encoder.hide(message.content), json.dumps(encoder.hide(more)) if more else "")


def _mark(*place: int) -> str:
    return f"check-{'-'.join(map(str, place))}-mark"  # plain, so that no template's JSON escapes it


def _more(message: Message) -> dict[str, Any]:
    return json.loads(message.more) if message.more else {}
