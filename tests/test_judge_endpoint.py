"""The judge command against a real server on this machine: slow, failing, rate-limiting, malformed, down."""

import email.utils
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from rpo_jax import judge
from rpo_jax.tools.judging.endpoint import EndpointSettings
from tests.judge_server import Reply, completion, failure, serving
from tests.test_judge import responses, summary_of, verdicts_of

KEY = "sk-secret-0123456789abcdef"
N = 12


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    a = responses(tmp_path / "a.jsonl", [f"the good answer {i}" for i in range(N)])
    b = responses(tmp_path / "b.jsonl", [f"answer {i}" for i in range(N)])
    return a, b


def prefers_good(body, number):
    """Picks the response that says `good`, as a judge would that does not look at the order."""
    first = re.search(r"(?:Response|Summary) 1: (.*)", body["messages"][0]["content"])[1]
    return completion(f"Response {1 if 'good' in first else 2} is more helpful.")


def arguments(files, server, tmp_path, *more):
    url = server if isinstance(server, str) else server.url
    return [
        *("--a", str(files[0]), "--b", str(files[1]), "--task", "dialogue", "--judge", "openai:gpt-4-0613"),
        *("--base-url", url, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache" / "judge.sqlite")),
        *("--yes", "--backoff-seconds", "0.01", *map(str, more)),
    ]


def run(capsys, *given):
    status = judge.main(arguments(*given))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == (status != 0)
    return status, captured.out, captured.err


def test_the_question_is_asked_as_the_protocol_says(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(prefers_good) as server:
        status, printed, _ = run(capsys, files, server, tmp_path)
    assert status == 0
    assert len(server.requests) == N
    body = server.requests[0]
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "gpt-4-0613",
        "temperature": 0.0,
        "max_tokens": 256,
    }
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert "\nBetween these two responses, which response is more helpful" in server.questions[0]
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == f"Bearer {KEY}"
    summary = summary_of(tmp_path / "out")
    assert (summary["win"], summary["win_rate"]) == (N, 1.0)
    assert summary["usage"]["asked"] == N
    assert summary["usage"]["prompt_tokens"] == 100 * N
    assert summary["usage"]["dollars"] == pytest.approx((100 * N * 30 + 10 * N * 60) / 1e6)
    assert f"{N} requests to {server.url}, 0 known already: about " in printed
    assert "at most, at list prices of April 2026" in printed
    # Asked in both orders by chance, and understood in both.
    assert {line["first"] for line in verdicts_of(tmp_path / "out")} == {"a", "b"}


def test_a_rerun_asks_nothing_twice(files, tmp_path, capsys):
    with serving(prefers_good) as server:
        run(capsys, files, server, tmp_path)
        first = summary_of(tmp_path / "out")
        status, printed, _ = run(capsys, files, server, tmp_path)
        assert (status, len(server.requests)) == (0, N)
        assert f"0 requests to {server.url}, {N} known already" in printed
        again = summary_of(tmp_path / "out")
        assert again.pop("usage")["known"] == N
        assert first.pop("usage")["known"] == 0
        assert again == first
        run(capsys, files, server, tmp_path, "--both-orders")  # the other orders only
        assert len(server.requests) == 2 * N
        assert len(set(server.questions)) == 2 * N
        run(capsys, files, server, tmp_path, "--task", "summarization")  # another question
        assert len(server.requests) == 3 * N
        run(capsys, files, server, tmp_path, "--judge", "openai:other")  # another judge
        assert len(server.requests) == 4 * N
        changed = responses(tmp_path / "c.jsonl", ["answer 0", *(f"the good answer {i}" for i in range(1, N))])
        run(capsys, (changed, files[1]), server, tmp_path)  # one new response, now the same as the other: none asked
        assert len(server.requests) == 4 * N


def test_requests_run_at_once_and_no_more_than_allowed(files, tmp_path, capsys):
    with serving(lambda body, number: completion("Response 1", seconds=0.1)) as server:
        assert run(capsys, files, server, tmp_path, "--concurrency", 4)[0] == 0
    assert 2 <= server.most_at_once <= 4


def test_failures_that_pass_are_waited_for(files, tmp_path, capsys):
    """Each question fails once in one way or another before it is answered."""
    asked = {}
    ways = [
        failure(500, "oops"),
        failure(503, "busy"),
        Reply("<html>bad gateway</html>", 502, {"content-type": "text/html"}),
        Reply('{"choices": [{"mess'),
        Reply("[]"),
        Reply({"choices": []}),
        Reply({"error": {"message": "overloaded"}}),
        Reply("", headers={"content-type": "text/plain"}),
        Reply("nonsense", headers={"content-type": "text/html"}),
        failure(429, "slow down"),
        completion("Response 1", seconds=1.5),  # beyond the time allowed
        failure(408, "time"),
    ]

    def behave(body, number):
        text = body["messages"][0]["content"]
        asked[text] = asked.get(text, 0) + 1
        return ways[list(asked).index(text) % len(ways)] if asked[text] == 1 else prefers_good(body, number)

    with serving(behave) as server:
        status, _, _ = run(capsys, files, server, tmp_path, "--timeout-seconds", 1)
    assert status == 0
    assert summary_of(tmp_path / "out")["win"] == N
    assert min(asked.values()) >= 2  # more where this machine itself was slow


@pytest.mark.parametrize("form", ["seconds", pytest.param("date", marks=pytest.mark.slow)])
def test_retry_after_is_obeyed_by_all(form, files, tmp_path, capsys):
    def behave(body, number):
        if number > 0:
            return prefers_good(body, number)
        # A date has whole seconds: 2 to 3 s from now, more than the second that is asserted.
        value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 3, usegmt=True)
        return failure(429, "Rate limit reached", headers={"retry-after": value})

    with serving(behave) as server:
        status, printed, _ = run(capsys, files, server, tmp_path, "--concurrency", 1)
    assert status == 0
    assert len(server.requests) == N + 1
    assert server.times[1] - server.times[0] >= 1.0
    assert "asks to wait for" in printed or form == "seconds"


def test_a_strict_rate_limit_is_not_a_failure(files, tmp_path, capsys):
    """Three of four requests are turned away, more often for one question than --retries allows in a row."""

    def behave(body, number):
        if number % 4:
            return failure(429, "Rate limit reached", headers={"retry-after": "0.02"})
        return prefers_good(body, number)

    with serving(behave) as server:
        assert run(capsys, files, server, tmp_path, "--concurrency", 8, "--retries", 4)[0] == 0
    assert len(server.requests) > 3 * N


def test_an_endpoint_that_stays_down_is_one_error_and_answers_are_kept(files, tmp_path, capsys):
    with serving(lambda body, number: prefers_good(body, number) if number < 5 else failure(500, "oops")) as server:
        status, _, error = run(capsys, files, server, tmp_path, "--concurrency", 1, "--retries", 2)
        assert status == 3
        assert f"error: {server.url} failed 3 times in a row: HTTP 500: oops" in error
        assert "the same command goes on from here" in error
        assert not (tmp_path / "out").exists()
        server.behave = prefers_good
        assert run(capsys, files, server, tmp_path)[0] == 0
        assert summary_of(tmp_path / "out")["usage"]["known"] == 5
        assert len(server.requests) == N + 3


def test_nobody_there(files, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    status, _, error = run(capsys, files, url, tmp_path, "--backoff-seconds", 0.2)
    assert status == 3
    assert error.startswith(f"error: {url} failed 3 times in a row: no connection (")
    assert time.monotonic() - started < 10
    status, _, error = run(capsys, files, "http://no-such-host.invalid/v1", tmp_path)
    assert (status, "no connection (" in error) == (3, True)


FATAL = {
    "wrong key": (failure(401, "Incorrect API key provided: sk-..."), "HTTP 401: Incorrect API key"),
    "no such model": (failure(404, "The model does not exist"), "HTTP 404: The model does not exist"),
    "no money": (failure(429, "You exceeded your quota", "insufficient_quota"), "You exceeded your quota"),
    "come back tomorrow": (failure(429, "Daily limit", headers={"retry-after": "86400"}), "asks to wait for 86400 s"),
    "no chat": (Reply("<html></html>", headers={"content-type": "text/html"}), "the answer is no chat completion"),
    "always malformed": (Reply('{"choices": [{'), "the answer is no chat completion: '{\"choices\": [{'"),
    "too slow": (completion("Response 1", seconds=0.6), "no answer within 0.2 s (--timeout-seconds)"),
    "refuses a parameter": (
        failure(400, "max_tokens is not supported"),
        "refused the first 5 requests and answered none",
    ),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_does_not_pass_ends_the_run(case, files, tmp_path, capsys):
    reply, told = FATAL[case]
    with serving(lambda body, number: reply) as server:
        status, _, error = run(
            capsys, files, server, tmp_path, "--retries", 1, "--timeout-seconds", 0.2, "--concurrency", 2
        )
    assert status == 3
    assert told in error
    assert len(server.requests) <= 8


def test_one_question_refused_is_counted_apart(files, tmp_path, capsys):
    def behave(body, number):
        refused = "answer 3\n" in body["messages"][0]["content"]
        return failure(400, "content filter") if refused else prefers_good(body, number)

    with serving(behave) as server:
        status, printed, _ = run(capsys, files, server, tmp_path)
        assert status == 0
        summary = summary_of(tmp_path / "out")
        assert (summary["refused"], summary["judged_prompts"], summary["win"]) == (1, N - 1, N - 1)
        assert "| comparisons refused by the endpoint | 1 |" in printed
        assert run(capsys, files, server, tmp_path)[0] == 0  # a refusal is no answer: asked again
        assert len(server.requests) == N + 1


def test_answers_that_say_nothing_are_counted_apart(files, tmp_path, capsys):
    nothing = ["I cannot say.", None, ""]

    def behave(body, number):
        return completion(nothing[number]) if number < 3 else prefers_good(body, number)

    with serving(behave) as server:
        status, printed, _ = run(capsys, files, server, tmp_path)
        assert status == 0
        assert summary_of(tmp_path / "out")["unparsable"] == 3
        assert "| answers that cannot be read | 3 |" in printed
        server.behave = lambda body, number: completion("Purple.")
        status, _, error = run(capsys, files, server, tmp_path, "--judge", "openai:mad")
    assert status == 4
    assert f"mad gave no verdict that can be read: {N} of {N} answers name no response" in error
    assert {line["answer"] for line in verdicts_of(tmp_path / "out")} == {"Purple."}


def test_a_key_that_is_missing(files, tmp_path, capsys):
    given = arguments(files, "https://api.openai.com/v1", tmp_path)
    del given[given.index("--base-url") : given.index("--base-url") + 2]
    assert judge.main(given) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert judge.main([*given, "--key-variable", "MY_KEY"]) == 2
    assert "MY_KEY is not set" in capsys.readouterr().err
    with serving(lambda body, number: failure(401, "You must provide a key")) as server:
        status, _, error = run(capsys, files, server, tmp_path)
    assert status == 3
    assert "(the environment variable OPENAI_API_KEY is not set)" in error
    assert run(capsys, files, "localhost:8000", tmp_path)[0] == 2


def test_no_secret_is_ever_written(files, tmp_path, capsys, monkeypatch, caplog):
    """The server sends the key back wherever it can; a password in the address is refused."""
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level("DEBUG")
    password = "pass-word-9876"
    echoes = [
        lambda: completion(f"Response 1. Your key is {KEY}."),
        lambda: failure(400, f"bad {KEY}"),
        lambda: failure(500, f"trace: {KEY}"),
        lambda: failure(401, f"Incorrect API key provided: {KEY}"),
        lambda: Reply(f'{{"key": "{KEY}"'),
    ]
    told = ""
    for number, echo in enumerate(echoes):
        with serving(lambda body, number, echo=echo: echo()) as server:
            more = ("--key-variable", "MY_KEY", "--retries", 1, "--judge", f"openai:m{number}")
            _, printed, error = run(capsys, files, server, tmp_path, *more)
            told += printed + error
            assert all(KEY in str(header) for header in server.headers)
            for secret in (f"user:{password}@127.0.0.1:1/v1", f"127.0.0.1:1/v1?key={password}"):
                status, printed, error = run(capsys, files, f"http://{secret}", tmp_path)
                assert (status, "holds a user, password or query" in error) == (2, True)
                told += printed + error
    assert "[secret]" in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"verdicts.jsonl", "summary.json", "summary.md", "judge.sqlite"} <= {path.name for path in written}
    everything = told.encode() + caplog.text.encode() + b"".join(path.read_bytes() for path in written)
    assert b"Your key is [secret]" in everything
    for secret in (KEY, password):
        assert secret.encode() not in everything


def test_the_cost_is_agreed_on_first(files, tmp_path, capsys, monkeypatch):
    with serving(prefers_good) as server:
        given = arguments(files, server, tmp_path)
        given.remove("--yes")

        def refused(*more):
            status = judge.main([*given, *more])
            captured = capsys.readouterr()
            assert status == 2
            assert not server.requests
            return captured.err

        assert "nobody is here to agree" in refused()
        assert "more than --max-cost 0.0001" in refused("--max-cost", "0.0001")
        assert "--max-cost needs a price" in refused("--max-cost", "1", "--judge", "openai:unknown")
        assert "together or not at all" in refused("--price-in", "1")
        monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr("builtins.input", lambda question: "n")
        assert "did not agree" in refused()
        # The server counts 110 tokens a question at a dollar a token: the first answer is beyond what was allowed.
        dear = ("--price-in", "1", "--price-out", "900000", "--answer-tokens", "1", "--max-cost", "20")
        assert judge.main([*given, *dear, "--concurrency", "1"]) == 3
        assert "the estimate was too low" in capsys.readouterr().err
        assert len(server.requests) < N
        assert judge.main([*given, "--max-cost", "1", "--judge", "openai:gpt-4o"]) == 0
        monkeypatch.setattr("builtins.input", lambda question: "y")
        assert judge.main([*given, "--judge", "openai:gpt-4.1"]) == 0


def test_the_estimate_is_near_what_is_sent(tmp_path, capsys):
    a = responses(tmp_path / "a.jsonl", ["word " * 200 + str(i) for i in range(N)])
    b = responses(tmp_path / "b.jsonl", ["other words " * 50 + str(i) for i in range(N)])
    with serving(prefers_good) as server:
        _, printed, _ = run(capsys, (a, b), server, tmp_path)
    told = int(re.search(r"about ([\d,]+) tokens of questions", printed)[1].replace(",", ""))
    assert told == pytest.approx(sum(map(len, server.questions)) / 4, rel=0.05)
    assert f"up to {256 * N:,} of answers" in printed


def test_further_fields_are_sent_and_null_removes(files, tmp_path, capsys):
    more = '{"max_tokens": null, "max_completion_tokens": 9, "temperature": null, "top_k": 1}'
    with serving(prefers_good) as server:
        assert run(capsys, files, server, tmp_path, "--request", more)[0] == 0
        assert {name: server.requests[0].get(name) for name in ("max_completion_tokens", "top_k")} == {
            "max_completion_tokens": 9,
            "top_k": 1,
        }
        assert not {"max_tokens", "temperature"} & server.requests[0].keys()
        settings = EndpointSettings(model="m", request=json.loads(more))
        assert settings.most_answer_tokens == 9, "what a cost is estimated by"
        assert EndpointSettings(model="m", request={"max_tokens": 7}).most_answer_tokens == 7
        assert run(capsys, files, server, tmp_path, "--request", "[1]")[0] == 2


def test_the_address_may_come_from_the_environment(files, tmp_path, capsys, monkeypatch):
    with serving(prefers_good) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        given = arguments(files, server, tmp_path)
        del given[given.index("--base-url") : given.index("--base-url") + 2]
        assert judge.main(given) == 0
    assert len(server.requests) == N


def test_answers_outlive_a_kill(files, tmp_path, capsys):
    """kill -9 while questions are under way: what was answered is not asked again."""

    def slow(body, number):
        return prefers_good(body, number)._replace(seconds=0 if number < 5 else 30)

    with serving(slow) as server:
        given = arguments(files, server, tmp_path, "--concurrency", 2)
        process = subprocess.Popen([sys.executable, "-m", "rpo_jax.judge", *given], stdout=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while len(server.requests) < 7 and time.monotonic() < deadline:  # five answered, two under way
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert len(server.requests) == 7
        server.behave = prefers_good
        assert run(capsys, files, server, tmp_path)[0] == 0
    assert summary_of(tmp_path / "out")["usage"] | {"dollars": 0} == {
        "asked": N - 5, "known": 5, "identical": 0, "prompt_tokens": 100 * (N - 5), "answer_tokens": 10 * (N - 5),
        "dollars": 0,
    }  # fmt: skip
    assert len(server.requests) == 7 + N - 5


def test_a_cache_that_is_none_is_refused(files, tmp_path, capsys):
    for content in (b"not a database at all, but long enough to be looked at" * 50, None):
        cache = tmp_path / ("file" if content else "folder")
        cache.write_bytes(content) if content else cache.mkdir()
        status, _, error = run(capsys, files, "http://127.0.0.1:1/v1", tmp_path, "--cache", cache)
        assert status == 2
        assert f"--cache {cache}" in error


def test_verdicts_are_whole_lines_of_json(files, tmp_path, capsys):
    with serving(prefers_good) as server:
        run(capsys, files, server, tmp_path)
    for line in (tmp_path / "out" / "verdicts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"row_id", "prompt", "a", "b", "first", "winner", "answer", "cached"}
        assert row["winner"] == "a"
