"""The judge command against endpoints that answer what no endpoint should: no traceback, bounded, counted, kept."""

import gzip
import itertools
import json
import time

import pytest

from tests.judge_server import Reply, completion, serving, serving_raw
from tests.test_judge import summary_of, verdicts_of
from tests.test_judge_endpoint import KEY, N, files, no_environment, prefers_good, run  # noqa: F401 (fixtures)

QUICK = ("--timeout-seconds", "0.5", "--retries", "1", "--concurrency", "4")
PICK = {"role": "assistant", "content": "Response 1"}


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunks(*pieces: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(pieces)


def slowly(start: bytes, rest: bytes):
    """A byte every while, for ever: each read succeeds in time."""
    yield start
    for number in itertools.count():
        time.sleep(0.05)
        yield rest[number % len(rest) :][:1]


def endlessly(start: bytes, piece: bytes):
    yield start
    yield from itertools.repeat(piece)


HEAD = b"HTTP/1.1 200 OK\r\n"
PACKED = gzip.compress(b" " * 50_000_000)
NO_ANSWERS = {
    "a drip of the body": (lambda: slowly(HEAD + b"content-length: 999999\r\n\r\n", b" "), "no answer within 0.5 s"),
    "a drip of headers": (lambda: slowly(HEAD, b"a: b\r\n"), "no answer within 0.5 s"),
    "a drip of chunks": (lambda: slowly(chunks(), b"1\r\n \r\n"), "no answer within 0.5 s"),
    "silence": (lambda: (time.sleep(0.1) or b"" for _ in range(50)), "no answer within 0.5 s"),
    "a body without end": (lambda: endlessly(HEAD + b"\r\n", b" " * 65536), "is longer than 4,194,304 bytes"),
    "chunks without end": (lambda: endlessly(chunks(), b"1000\r\n" + b" " * 4096 + b"\r\n"), "is longer than"),
    "headers without end": (lambda: endlessly(HEAD, b"a: b\r\n" * 100), "no connection ("),
    "a header without end": (lambda: endlessly(HEAD + b"a: ", b"b" * 4096), "no connection ("),
    "wait, wait, wait": (lambda: endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no answer within 0.5 s"),
    "a length that is not kept": (lambda: [HEAD + b"content-length: 99\r\n\r\n{}"], "no connection ("),
    "a length that is none": (lambda: [HEAD + b"content-length: -1\r\n\r\n{}"], "no connection ("),
    "chunks of a wrong size": (lambda: [chunks(b"zz\r\n{}\r\n0\r\n\r\n")], "no connection ("),
    "chunks of a huge size": (lambda: [chunks(b"fffffffffffffff\r\n{}")], "no connection ("),
    "no HTTP": (lambda: [b"SSH-2.0-OpenSSH_9.6\r\n"], "no connection ("),
    "nothing": (list, "no connection ("),
    "a bomb": (lambda: [answer(PACKED, "content-encoding: gzip")], "is no chat completion"),
    "a bomb of bombs": (
        lambda: [answer(gzip.compress(PACKED), "content-encoding: gzip, gzip")],
        "is no chat completion",
    ),
    "an unknown packing": (lambda: [answer(b"{}", "content-encoding: zz")], "is no chat completion"),
    "200,000 brackets": (lambda: [answer(b"[" * 200_000)], "is no chat completion"),
    "200,000 objects": (lambda: [answer(b'{"a":' * 200_000)], "is no chat completion"),
    "brackets of an error": (lambda: [answer(b"[" * 200_000, status="500 No")], "HTTP 500: [[["),
    "a charset that unpacks": (lambda: [answer(PACKED, "content-type: application/json; charset=zlib")], "is no chat"),
    "no choices": (lambda: [answer(b'{"choices": {"0": 1}}')], "is no chat completion"),
    "escape sequences": (lambda: [answer(b"\x1b[2Jno", status="500 No")], "HTTP 500: \\x1b[2Jno"),
    "a strange status": (lambda: [answer(b"{}", status="999 Odd")], "HTTP 999"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", NO_ANSWERS)
def test_what_is_no_answer_ends_in_one_line(case, files, tmp_path, capsys):  # noqa: F811
    made, told = NO_ANSWERS[case]
    with serving_raw(lambda question, number: iter(made())) as server:
        # A machine may take its time over what is not about time.
        patience = () if "0.5 s" in told else ("--timeout-seconds", "30")
        status, _, error = run(capsys, files, server, tmp_path, *QUICK, *patience)
    assert status == 3
    assert error.startswith(f"error: {server.url} failed 2 times in a row: ")
    assert told in error
    assert len(error) < 1000
    assert len(server.requests) <= 8
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_no_redirect_is_followed(status, files, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Neither the question nor the key goes to where an endpoint points."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(prefers_good) as other:
        for target in (f"{other.url}/chat/completions", "file:///etc/passwd", "//[", ""):
            moved = answer(b"", f"location: {target}", status=status)
            with serving_raw(lambda question, number, moved=moved: iter([moved])) as server:
                code, _, error = run(capsys, files, server, tmp_path, *QUICK)
            assert code == 3
            assert f"HTTP {status[:3]}: redirects to " in error
            assert "which is not followed" in error
        assert other.requests == []


WAITS = {
    "Fri, 31 Dec 99999 23:59:59 GMT": "asks to wait for years",
    "1e400": "asks to wait for years",
    "9" * 5000: "asks to wait for years",
    "Fri, 31 Dec 9999 23:59:59 GMT": "asks to wait for years",
    "86400": "asks to wait for 86400 s",
    "nan": "failed 2 times in a row",
    "-5": "failed 2 times in a row",
    "Fri, 99 Foo 1600 99:99:99 GMT": "failed 2 times in a row",
    "Mon, 1 Jan 2024 00:00:00 +9999999999999": "failed 2 times in a row",
    "soon": "failed 2 times in a row",
}


@pytest.mark.parametrize("value", WAITS)
def test_a_wait_is_obeyed_within_reason(value, files, tmp_path, capsys):  # noqa: F811
    limited = answer(b"{}", f"retry-after: {value}", status="429 Slow")
    with serving_raw(lambda question, number: iter([limited])) as server:
        status, _, error = run(capsys, files, server, tmp_path, *QUICK)
    assert status == 3
    assert WAITS[value] in error
    assert len(error) < 1000


def reply(**changes) -> bytes:
    return json.dumps(
        {"choices": [{"message": PICK}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}, **changes}
    )


ODD_ANSWERS = {
    "lone surrogates": (reply(choices=[{"message": {"content": "Response 1 \ud800 \udfff"}}]), 10),
    "a pair of surrogates": (reply(choices=[{"message": {"content": "Response 1 \U0001f600"}}]), 10),
    "a null character": (reply(choices=[{"message": {"content": "Response 1\0"}}]), 10),
    "usage beyond float64": (reply(usage={"prompt_tokens": 10**30, "completion_tokens": 10**4000}), 0),
    "usage of 5,000 digits": (reply(usage={}).replace("{}", '{"prompt_tokens": ' + "9" * 5000 + "}"), 0),
    "usage that is no number": (reply(usage={"prompt_tokens": [1], "completion_tokens": "7"}), 0),
    "usage not finite": (reply().replace("7", "NaN").replace("3", "1e400"), 0),
    "usage below zero": (reply(usage={"prompt_tokens": -5, "completion_tokens": -(10**30)}), 0),
    "usage that is no object": (reply(usage=[1]), 0),
    "keys twice": (reply()[:-1] + ', "usage": null, "id": 1, "id": 2}', 0),
    "integers of 5,000 digits beside": (reply(created=0).replace('"created": 0', '"created": ' + "9" * 5000), 10),
    "bytes that are no UTF-8": (reply().encode().replace(b"Response 1", b"Response 1 \xff\xfe"), 10),
    "a mark in front": (b"\xef\xbb\xbf" + reply().encode(), 10),
    "a charset that is none": (reply().encode(), 10),
}


@pytest.mark.parametrize("case", ODD_ANSWERS)
def test_an_odd_answer_is_counted_kept_and_paid_for_once(case, files, tmp_path, capsys):  # noqa: F811
    body, tokens = ODD_ANSWERS[case]
    sent = answer(body if isinstance(body, bytes) else body.encode(), "content-type: application/json; charset=rot13")
    with serving_raw(lambda question, number: iter([sent])) as server:
        assert run(capsys, files, server, tmp_path, "--judge", "openai:gpt-4-0613", "--max-cost", "100")[0] == 0
        first = summary_of(tmp_path / "out")
        assert first["judged_prompts"] == N
        assert first["usage"]["prompt_tokens"] + first["usage"]["answer_tokens"] == tokens * N
        assert run(capsys, files, server, tmp_path)[0] == 0
    assert summary_of(tmp_path / "out")["usage"]["known"] == N
    assert len(server.requests) == N
    assert {row["winner"] for row in verdicts_of(tmp_path / "out")} == {"a", "b"}


@pytest.mark.parametrize(
    "poison", [b"[" * 200_000, pytest.param(b"", marks=pytest.mark.slow)], ids=["brackets", "silence"]
)
def test_one_question_that_is_never_answered_does_not_keep_the_others(poison, files, tmp_path, capsys):  # noqa: F811
    """It is counted as refused, and asked again next time; the others are judged, and never asked again."""

    def behave(question, number):
        if "answer 3\n" not in question:
            yield answer(reply().encode())
        elif poison:
            time.sleep(0.5)  # others are answered meanwhile
            yield answer(poison)
        else:
            yield from slowly(HEAD, b"a")

    with serving_raw(behave) as server:
        assert run(capsys, files, server, tmp_path, *QUICK, "--timeout-seconds", "2")[0] == 0
        summary = summary_of(tmp_path / "out")
        assert (summary["refused"], summary["judged_prompts"]) == (1, N - 1)
        (refused,) = (row for row in verdicts_of(tmp_path / "out") if row["winner"] == "refused")
        assert refused["answer"].startswith("failed 2 times in a row: ")
        before = len(server.requests)
        server.behave = lambda question, number: iter([answer(reply().encode())])
        assert run(capsys, files, server, tmp_path)[0] == 0
        assert len(server.requests) == before + 1
    assert summary_of(tmp_path / "out")["judged_prompts"] == N


def test_rows_that_hold_lone_surrogates_and_odd_ids_are_judged(tmp_path, capsys):
    rows = [{"prompt": f"p {n}", "row_id": {"a": [n]}} for n in range(2)] + [{"prompt": "\ud800", "row_id": "\udfff"}]
    for name, text in (("a", "the good \ud800 answer"), ("b", "answer")):
        lines = (json.dumps({**row, "response": f"{text} {n}"}) for n, row in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with serving(lambda body, number: completion("Response 1")) as server:
        assert run(capsys, (tmp_path / "a.jsonl", tmp_path / "b.jsonl"), server, tmp_path)[0] == 0
    assert summary_of(tmp_path / "out")["judged_prompts"] == 3
    assert verdicts_of(tmp_path / "out")[0]["row_id"] == f"{tmp_path}/a.jsonl:1"


def test_a_short_answer_of_a_long_request_is_paid_for_once(files, tmp_path, capsys):  # noqa: F811
    """A usage that is no object made a good answer `no chat completion`, which was asked for again."""
    body = {"choices": [{"message": {"content": "Response 1"}}], "usage": "free"}
    with serving(lambda request, number: Reply(body)) as server:
        assert run(capsys, files, server, tmp_path)[0] == 0
        assert len(server.requests) == N
