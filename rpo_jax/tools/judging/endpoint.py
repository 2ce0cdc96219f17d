"""A judge behind an OpenAI-compatible endpoint: asked at once by several threads, patiently, and nothing twice."""

from __future__ import annotations

import email.utils
import importlib.util
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rpo_jax.tools.judging.cache import AnswerCache, JudgeAnswer, answer_key
from rpo_jax.tools.judging.comparisons import Comparison, Verdict
from rpo_jax.tools.judging.questions import Task, question, read_answer

OPENAI_URL = "https://api.openai.com/v1"
_MAX_WAIT_SECONDS = 600.0  # an endpoint that asks for longer is reported to the user
_MAX_BACKOFF_SECONDS = 60.0
_RETRIED = (408, 409, 425, 429)  # and all from 500
_FATAL = (401, 403, 404)  # true of every request
_REFUSALS_IN_A_ROW = 5  # without a single answer, no prompt's fault
_FIRST_CONTACT_ATTEMPTS = 3


class EndpointError(RuntimeError):
    """The endpoint is down, refuses everything, or is no chat endpoint. The message is complete and holds no secret."""


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """How an endpoint is asked.

    Args:
        model: as the endpoint names it.
        base_url: of the endpoint, `/v1` included; OPENAI_BASE_URL or OpenAI itself where not given.
        key_variable: environment variable that holds the API key; the only place that a key is read from.
        concurrency: requests under way at once.
        retries: of a request that failed in a way that may pass: no connection, time-out, rate limit, server error, an
            answer that is no chat completion.
        timeout_seconds: for one request.
        backoff_seconds: before the first retry; doubled every time, up to a minute, and shortened at random by up to a
            half. A Retry-After header is obeyed instead.
        temperature: of the judge.
        answer_tokens: limit of an answer's length.
        request: further fields of the request's body; null removes one of ours.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 6
    timeout_seconds: float = 120.0
    backoff_seconds: float = 1.0
    temperature: float = 0.0
    answer_tokens: int = 256
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("--judge openai: names no model; write --judge openai:gpt-4-0613, for example.")
        for name in ("concurrency", "timeout_seconds", "backoff_seconds", "answer_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be greater than 0.")
        if self.retries < 0:
            raise ValueError(f"--retries {self.retries} must not be negative.")


class _Transient(Exception):
    """What may pass if tried again, after `wait_seconds` if the endpoint said so."""

    def __init__(
        self, reason: str, wait_seconds: float | None = None, *, limited: bool = False, reached: bool = True
    ) -> None:
        super().__init__(reason)
        self.wait_seconds, self.limited, self.reached = wait_seconds, limited, reached


class _Refused(Exception):
    """This one request is not answered, however often it is made."""


class _Stopped(Exception):
    """Another thread met an error that ends the run."""


class EndpointJudge:
    """Asks an endpoint the paper's question; to be closed, as it holds connections.

    Raises ValueError where the openai package or the key is missing, or the address is none.
    """

    sees_order = True

    def __init__(
        self,
        settings: EndpointSettings,
        task: Task,
        cache: AnswerCache,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ValueError("--judge openai: needs the openai package; run `pip install openai`.")
        import openai

        self.name = settings.model
        self._task: Task = task
        self.settings, self._cache, self._say = settings, cache, say
        url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.endpoint, host = _address(url)
        key = os.environ.get(settings.key_variable, "").strip()
        if not key and host == urlsplit(OPENAI_URL).hostname:
            raise ValueError(
                f"the environment variable {settings.key_variable} is not set, and {self.endpoint} wants a key; export "
                "it, or name another with --key-variable."
            )
        self._has_key = bool(key)
        # A short word such as EMPTY is no secret, and blotting it out would garble answers.
        self._secret = key if len(key) >= 8 else None
        # A server without keys still gets the header that the client insists on.
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self.endpoint, max_retries=0, timeout=settings.timeout_seconds
        )
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._not_before, self._answered, self._refused = 0.0, 0, 0

    def close(self) -> None:
        self._client.close()

    def known(self, comparison: Comparison) -> JudgeAnswer | None:
        """The answer to this very question, if it was given before."""
        return self._cache.get(answer_key(self.endpoint, self._request(self.question(comparison))))

    def question(self, comparison: Comparison) -> str:
        return question(self._task, comparison.pair.prompt, *comparison.responses)

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Known ones at once, then the others as they come. Raises EndpointError; what was answered is kept."""
        asked: dict[str, list[int]] = {}
        for index, comparison in enumerate(comparisons):
            answer = self.known(comparison)
            if answer is None:
                asked.setdefault(self.question(comparison), []).append(index)
            else:
                yield index, _verdict(answer, cached=True)
        executor = ThreadPoolExecutor(self.settings.concurrency)
        try:
            futures = {executor.submit(self._judged, text): indices for text, indices in asked.items()}
            for future in as_completed(futures):
                first, *others = futures[future]
                try:
                    verdict = future.result()
                except _Stopped:  # the error that stopped it comes from its own future
                    continue
                yield first, verdict
                for index in others:  # the same question twice is asked once
                    yield index, verdict._replace(cached=True, prompt_tokens=0, answer_tokens=0)
        finally:
            self._stop.set()
            executor.shutdown(cancel_futures=True)

    def _judged(self, text: str) -> Verdict:
        request = self._request(text)
        try:
            answer = self._patiently(request)
        except _Refused as refusal:
            return Verdict(None, str(refusal), refused=True)
        except EndpointError:
            self._stop.set()
            raise
        self._cache.put(answer_key(self.endpoint, request), answer)
        return _verdict(answer, cached=False)

    def _request(self, text: str) -> dict[str, Any]:
        ours = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.answer_tokens,
        }
        return {name: value for name, value in {**ours, **self.settings.request}.items() if value is not None}

    def _patiently(self, request: dict[str, Any]) -> JudgeAnswer:
        """The answer, after as many attempts as are allowed."""
        attempts, failures, answered = self.settings.retries + 1, 0, self._answered
        while True:
            self._wait_until_allowed()
            try:
                answer = self._ask(request)
            except _Transient as error:
                # An endpoint that limits the rate and answers others in between has not failed.
                failures = 1 if error.limited and self._answered > answered else failures + 1
                answered = self._answered
                # A server that was never reached is not there; do not keep a user waiting for minutes.
                if failures >= (attempts if error.reached or answered else min(attempts, _FIRST_CONTACT_ATTEMPTS)):
                    raise EndpointError(
                        f"{self.endpoint} failed {failures} times in a row: {error}. Answers so far are kept: the same "
                        "command goes on from here."
                    ) from None
                self._delay(failures, error)
            else:
                with self._lock:
                    self._answered += 1
                return answer

    def _wait_until_allowed(self) -> None:
        while (seconds := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(seconds)
        if self._stop.is_set():
            raise _Stopped

    def _delay(self, failures: int, error: _Transient) -> None:
        """Wait before the next attempt; where the endpoint named a time, all threads wait."""
        if not error.wait_seconds:
            backoff = min(self.settings.backoff_seconds * 2 ** (failures - 1), _MAX_BACKOFF_SECONDS)
            self._stop.wait(backoff * random.uniform(0.5, 1.0))
            return
        if error.wait_seconds > _MAX_WAIT_SECONDS:
            raise EndpointError(
                f"{self.endpoint} asks to wait for {error.wait_seconds:.0f} s ({error}). Answers so far are kept: run "
                "the same command again then."
            ) from None
        with self._lock:
            until = time.monotonic() + error.wait_seconds
            if until > self._not_before + 1:
                self._say(f"{self.endpoint} asks to wait for {error.wait_seconds:.0f} s")
            self._not_before = max(self._not_before, until)

    def _ask(self, request: dict[str, Any]) -> JudgeAnswer:
        import openai

        try:
            reply = self._client.chat.completions.with_raw_response.create(**_known(request))
            return self._read(reply.text)
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APITimeoutError:
            raise _Transient(f"no answer within {self.settings.timeout_seconds:g} s (--timeout-seconds)") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Transient(self._clean(f"no connection ({cause})"), reached=False) from None
        except (openai.OpenAIError, UnicodeDecodeError) as error:
            raise _Transient(self._clean(f"{type(error).__name__}: {error}")) from None

    def _read(self, body: str) -> JudgeAnswer:
        """Text and usage of a chat completion; usage is optional in the protocol's imitations."""
        try:
            reply = json.loads(body)
            text = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Transient(self._clean(f"the answer is no chat completion: {body[:80]!r}")) from None
        return JudgeAnswer(self._clean(text if isinstance(text, str) else ""), *tokens)

    def _status(self, error: Any) -> Exception:
        """What an HTTP error means: for this attempt, for this request, or for the run."""
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        told = self._clean(f"HTTP {status}: {_first_line(body.get('message') or error.message)}")
        if status in (401, 403) and not self._has_key:
            told += f" (the environment variable {self.settings.key_variable} is not set)"
        if status in _FATAL or body.get("code") == "insufficient_quota":
            return EndpointError(f"{self.endpoint} refuses the requests for {self.name}: {told}.")
        if status in _RETRIED or status >= 500:
            return _Transient(told, _retry_after(error.response.headers), limited=status == 429)
        with self._lock:
            self._refused += 1
            if not self._answered and self._refused >= _REFUSALS_IN_A_ROW:
                return EndpointError(
                    f"{self.endpoint} refused the first {self._refused} requests and answered none: {told}. --request "
                    "changes what is sent."
                )
        return _Refused(told)

    def _clean(self, text: str) -> str:
        """Without the key, in case that a server sends it back."""
        return text if self._secret is None else text.replace(self._secret, "[secret]")


def _address(url: str) -> tuple[str, str | None]:
    """An address and its host. Refuses one with a password or a query: the client's log shows addresses."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"--base-url is no address ({error}); write http://host:port/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("--base-url is no address of a server; write http://host:port/v1.")
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "--base-url holds a user, password or query; a key goes into the environment (--key-variable)."
        )
    return url.rstrip("/"), parts.hostname


def _known(request: dict[str, Any]) -> dict[str, Any]:
    """A request as the client takes it: fields that it may not know go into `extra_body`."""
    ours = ("model", "messages", "temperature", "max_tokens")
    extra = {name: value for name, value in request.items() if name not in ours}
    return {**{name: request[name] for name in ours if name in request}, "extra_body": extra}


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or ["no message"])[0][:300]


def _verdict(answer: JudgeAnswer, *, cached: bool) -> Verdict:
    tokens = (0, 0) if cached else (answer.prompt_tokens, answer.answer_tokens)
    return Verdict(read_answer(answer.text), answer.text, False, cached, *tokens)
