"""A judge behind an OpenAI-compatible endpoint: asked at once by several threads, patiently, and nothing twice."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import importlib.util
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rpo_jax.core.text import printable, well_formed
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
_MAX_BODY_BYTES = 1 << 22  # of an answer; thousands of tokens with all their alternatives take a tenth of that
_MAX_TOKENS = 10**9  # of one answer's usage; more is no count


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
        timeout_seconds: for one request, from the connection to the last byte of the answer.
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

    @property
    def most_answer_tokens(self) -> int:
        """The limit of an answer's length that is asked for, whatever name `request` gives it."""
        limits = (self.request.get(name) for name in ("max_completion_tokens", "max_tokens"))
        return next((limit for limit in limits if isinstance(limit, int)), self.answer_tokens)


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


class _Reply(NamedTuple):
    """An HTTP answer of any status."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class EndpointJudge:
    """Asks an endpoint the paper's question; to be closed, as it holds connections.

    An endpoint is a stranger: it gets the question and the key, and nothing else happens. No redirect is followed,
    nothing is unpacked, an answer is read up to a size and a time, and what it says is data.

    Raises ValueError where the HTTP client or the key is missing, or the address is none.
    """

    sees_order = True

    def __init__(
        self,
        settings: EndpointSettings,
        task: Task,
        cache: AnswerCache,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if importlib.util.find_spec("httpx2") is None:
            raise ValueError("--judge openai: needs the httpx2 package; run `pip install httpx2`.")
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
        # A server without keys still gets the header that some insist on; an answer that is packed could be a bomb.
        headers = {"Authorization": f"Bearer {key or 'none'}", "Accept-Encoding": "identity"}
        for name, variable in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
            if value := os.environ.get(variable):
                headers[name] = value
        self._headers = headers
        self._stack = contextlib.ExitStack()
        self._portal, self._client = self._stack.enter_context(_client(settings))
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._not_before, self._answered, self._refused = 0.0, 0, 0

    def close(self) -> None:
        self._stack.close()

    def known(self, comparison: Comparison) -> JudgeAnswer | None:
        """The answer to this very question, if it was given before."""
        return self._cache.get(answer_key(self.endpoint, self._request(self.question(comparison))))

    def question(self, comparison: Comparison) -> str:
        return question(self._task, comparison.pair.prompt, *comparison.responses)

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Known ones at once, then the others as they come. Raises EndpointError; what was answered is kept."""
        self._stop.clear()  # of an earlier call
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
        answered_before = answered
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
                    problem = f"failed {failures} times in a row: {error}"
                    if answered > answered_before:  # others were answered meanwhile: it is this question
                        raise _Refused(problem) from None
                    raise EndpointError(
                        f"{self.endpoint} {problem}. Answers so far are kept: the same command goes on from here."
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
                f"{self.endpoint} asks to wait for {_seconds(error.wait_seconds)} ({error}). Answers so far are kept: "
                "run the same command again then."
            ) from None
        with self._lock:
            until = time.monotonic() + error.wait_seconds
            if until > self._not_before + 1:
                self._say(f"{self.endpoint} asks to wait for {_seconds(error.wait_seconds)}")
            self._not_before = max(self._not_before, until)

    def _ask(self, request: dict[str, Any]) -> JudgeAnswer:
        import httpx2

        try:
            reply = self._portal.call(self._post, json.dumps(request).encode())
        except (TimeoutError, httpx2.TimeoutException):
            raise _Transient(f"no answer within {self.settings.timeout_seconds:g} s (--timeout-seconds)") from None
        except httpx2.ConnectError as error:
            raise _Transient(self._clean(f"no connection ({error})"), reached=False) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Transient(self._clean(f"no connection ({error or type(error).__name__})")) from None
        if 200 <= reply.status < 300:
            return self._read(reply.body)
        raise self._status(reply)

    async def _post(self, body: bytes) -> _Reply:
        """Runs in the event loop, for there a time limit holds whatever the request waits for."""
        import anyio

        with anyio.fail_after(self.settings.timeout_seconds):
            address = f"{self.endpoint}/chat/completions"
            headers = {"Content-Type": "application/json", **self._headers}
            async with self._client.stream("POST", address, content=body, headers=headers) as response:
                got = bytearray()
                async for piece in response.aiter_raw():
                    got += piece
                    if len(got) > _MAX_BODY_BYTES:
                        raise _Transient(f"the answer is longer than {_MAX_BODY_BYTES:,} bytes")
                return _Reply(response.status_code, response.headers, bytes(got))

    def _read(self, body: bytes) -> JudgeAnswer:
        """Text and usage of a chat completion; usage is optional in the protocol's imitations."""
        reply = _json(body)
        try:
            message = reply["choices"][0]["message"]
            text = message["content"]
        except (LookupError, TypeError):
            excerpt = body[:80].decode("utf-8", "replace")
            raise _Transient(self._clean(f"the answer is no chat completion: {excerpt!r}")) from None
        # With a text it is an answer and was paid for, whatever else is wrong with it.
        usage = reply.get("usage")
        tokens = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        return JudgeAnswer(self._clean(well_formed(text) if isinstance(text, str) else ""), *tokens)

    def _status(self, reply: _Reply) -> Exception:
        """What an HTTP error means: for this attempt, for this request, or for the run."""
        status, content = reply.status, _json(reply.body)
        error = content.get("error", content) if isinstance(content, dict) else None
        fields: dict[str, Any] = error if isinstance(error, dict) else {"message": error}
        if "location" in reply.headers and 300 <= status < 400:
            fields["message"] = f"redirects to {reply.headers['location']}, which is not followed"
        message = fields.get("message") or reply.body.decode("utf-8", "replace")
        problem = self._clean(f"HTTP {status}: {_first_line(message)}")
        if status in (401, 403) and not self._has_key:
            problem += f" (the environment variable {self.settings.key_variable} is not set)"
        if status in _FATAL or fields.get("code") == "insufficient_quota":
            return EndpointError(f"{self.endpoint} refuses the requests for {self.name}: {problem}.")
        if status in _RETRIED or status >= 500:
            return _Transient(problem, _retry_after(reply.headers.get("retry-after")), limited=status == 429)
        with self._lock:
            self._refused += 1
            if not self._answered and self._refused >= _REFUSALS_IN_A_ROW:
                return EndpointError(
                    f"{self.endpoint} refused the first {self._refused} requests and answered none: {problem}. "
                    "--request changes what is sent."
                )
        return _Refused(problem)

    def _clean(self, text: str) -> str:
        """Without the key, in case that a server sends it back."""
        return text if self._secret is None else text.replace(self._secret, "[secret]")


@contextlib.contextmanager
def _client(settings: EndpointSettings) -> Iterator[tuple[Any, Any]]:
    """An event loop in a thread of its own, to be called from others, and an HTTP client that lives there."""
    import httpx2
    from anyio.from_thread import start_blocking_portal

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
    with start_blocking_portal() as portal:
        client = httpx2.AsyncClient(timeout=settings.timeout_seconds, limits=limits, follow_redirects=False)
        try:
            yield portal, client
        finally:
            portal.call(client.aclose)


def _json(body: bytes) -> Any:
    """What an answer's body says, None where it is no JSON. An integer of any length is a float."""
    try:
        return json.loads(body.decode("utf-8-sig", "replace"), parse_int=float)
    except (ValueError, RecursionError):
        return None


def _count(usage: Any, name: str) -> int:
    """Tokens as an answer's usage has them; 0 where it has no number that can be one."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return int(value) if isinstance(value, float) and 0 <= value <= _MAX_TOKENS else 0


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


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; None where it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        date = email.utils.parsedate_tz(value)
    if date is None:
        return None
    if date[0] > datetime.MAXYEAR:
        return math.inf
    try:
        return max(0.0, email.utils.mktime_tz(date) - time.time())
    except (ValueError, OverflowError):
        return None


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 1e9 else "years"


def _first_line(text: object) -> str:
    return printable((str(text).strip().splitlines() or ["no message"])[0][:300])


def _verdict(answer: JudgeAnswer, *, cached: bool) -> Verdict:
    tokens = (0, 0) if cached else (answer.prompt_tokens, answer.answer_tokens)
    return Verdict(read_answer(answer.text), answer.text, False, cached, *tokens)
