"""Tokenizers of strangers: what their rules do happens where it can be stopped, and the row is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.data import limited_tokenizer
from rpo_jax.data.control_tokens import TextEncoder
from rpo_jax.data.limited_tokenizer import LimitedTokenizer, TokenizerError, close_tokenizers, limited
from rpo_jax.data.tokenize import PromptEncoder, TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import decode, load_tokenizer, train_tokenizer

LIMITS = TokenLimits(16, 64, "keep_end")
TRIGGER = "q" * 40 + "!"


@pytest.fixture(scope="module", autouse=True)
def no_process_stays():
    yield
    close_tokenizers()
    assert not limited_tokenizer._kept


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "honest"
    train_tokenizer(["some words to learn from, and others"] * 3, 320, folder)
    return folder


@pytest.fixture
def strange(honest, tmp_path):
    """Makes a folder whose tokenizer.json differs from the honest one's."""

    def make(**changes) -> Path:
        folder = tmp_path / "strange"
        folder.mkdir(exist_ok=True)
        for file in honest.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (folder / "tokenizer.json").write_text(json.dumps(state | changes), encoding="utf-8")
        return folder

    return make


def examples(*prompts):
    responses = Response("chosen", "yes"), Response("rejected", "no")
    return [PreferenceExample(f"file:{n}", prompt, responses) for n, prompt in enumerate(prompts, start=1)]


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def rules(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def expression(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


STRANGE = {
    # More than ten million ways to fail: the library panics.
    "an expression that breaks": {"pre_tokenizer": expression("(?:q|q|q)+$b|\\w+|\\W")},
    "a thousand for one": {"normalizer": rules(replace({"String": "q"}, "q" * 1000))},
    "a thousand million for one": {"normalizer": rules(*[replace({"String": "q"}, "q" * 10)] * 9)},
    "an expression that multiplies": {"normalizer": rules(replace({"Regex": "q"}, "qa" * 1000))},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "million" in name else []) for name in STRANGE],
)
def test_the_row_is_named_and_the_others_are_used(name, strange, honest):
    tokenizer = load_tokenizer(strange(**STRANGE[name]))
    given = examples("Words here.", TRIGGER, "Other words.", "! " + TRIGGER)
    made, faults = tokenize_examples(given, tokenizer, LIMITS)
    assert [example.row_id for example in made] == ["file:1", "file:3"]
    assert [row.row_id for row in faults.rows] == ["file:2", "file:4"]
    assert {row.kind for row in faults.rows} == {"the tokenizer cannot encode a text"}
    (expected, _) = tokenize_examples(given, load_tokenizer(honest), LIMITS)
    assert decode(tokenizer, made[0].prompt_ids.tolist()) == decode(
        load_tokenizer(honest), expected[0].prompt_ids.tolist()
    )


def test_a_prompt_to_be_answered_is_named_too(strange):
    tokenizer = load_tokenizer(strange(**STRANGE["a thousand for one"]))
    for template, prompt in (("auto", TRIGGER), ("chat", (Message("user", TRIGGER),))):
        with pytest.raises(ValueError, match=r"the tokenizer cannot encode a text: it makes \d+,\d+ tokens of "):
            PromptEncoder(tokenizer, template, {}, 8, "keep_end").encode(prompt)


@pytest.mark.timeout(120)
def test_an_expression_that_takes_for_ever_is_stopped(strange, monkeypatch):
    """At each of thousands of places two million ways to fail: below what the library itself allows."""
    tokenizer = load_tokenizer(strange(pre_tokenizer=expression("(?:a|a){20}b|\\w+?|\\W")))
    assert limited(tokenizer).encode(["warm up"])
    monkeypatch.setattr(limited_tokenizer, "CALL_SECONDS", 3.0)
    long = "a" * 3000
    made, faults = tokenize_examples(examples("One.", long, "Two."), tokenizer, LIMITS)
    assert [example.row_id for example in made] == ["file:1", "file:3"]
    assert "it was stopped: it took more than" in faults.first.reason
    monkeypatch.setattr(limited_tokenizer, "WASTED_SECONDS", 5.0)
    with pytest.raises(TokenizerError, match=r"The tokenizer was stopped: it took more than .* use one that you trust"):
        tokenize_examples(examples(*(f"{n}{long}" for n in range(9))), tokenizer, LIMITS)


def test_a_vocabulary_of_words_without_one_for_the_others(tmp_path):
    words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, "red": 3, "blue": 4}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    made, faults = tokenize_examples(examples("red blue", "green", "blue"), tokenizer, LIMITS)
    assert [example.prompt_ids.tolist() for example in made] == [[3, 4], [4]]
    assert made[0].responses[0].ids.tolist() == [1, 0]
    assert faults.rows[0].row_id == "file:2"
    assert "WordLevel" in faults.rows[0].reason


def test_thirty_thousand_control_tokens_are_found_quickly(honest):
    tokenizer = load_tokenizer(honest)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    count, first = 30_000, len(tokenizer)
    state["added_tokens"] += [{**token, "id": first + n, "content": f"<|{n}|>"} for n in range(count)]
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    encoder = TextEncoder(large)
    text = "<|7|> and <|29999|> but not <|30000|>, <|, < or <<|12|>"
    assert [(found.name, text[found.start : found.end]) for found in encoder.find(text)] == [
        (name, name) for name in ("<|7|>", "<|29999|>", "<|12|>")
    ]
    assert encoder.find("<|" * 100_000) == []
    assert encoder.shown(encoder.hide(text)) == text
    given = examples(*(f"<|{n}|> {'<' * 200} {n}" for n in range(500)))
    made, faults = tokenize_examples(given, large, LIMITS)
    assert len(made) == 500
    assert not faults


LOADS = {
    "an expression that is none": {"pre_tokenizer": expression("(")},
    "an expression of many groups": {"pre_tokenizer": expression("(" * 30_000)},
    "a map that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a map without end": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
}


@pytest.mark.parametrize("name", LOADS)
def test_rules_that_cannot_be_loaded(name, strange):
    with pytest.raises(ValueError, match="cannot be read \\("):
        load_tokenizer(strange(**LOADS[name]))


DECODERS = {
    "a thousand for one": replace({"String": "a"}, "a" * 1000),
    "two for one, often": {"type": "Sequence", "decoders": [replace({"String": "a"}, "aa")] * 30},
    "an expression": replace({"Regex": "(a|a)+$"}, "a"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_rules_that_make_much_of_a_token_are_refused(name, strange):
    with pytest.raises(ValueError, match=r"decodes by expressions, or makes more than 8 characters of one"):
        load_tokenizer(strange(decoder=DECODERS[name]))


def test_tokens_longer_than_any_are_refused(strange, honest):
    state = json.loads((honest / "tokenizer.json").read_text(encoding="utf-8"))
    model = {**state["model"], "vocab": {**state["model"]["vocab"], "x" * 20_000: 320}}
    with pytest.raises(ValueError, match=r"has a token of 20,000 characters"):
        load_tokenizer(strange(model=model))
    added = [*state["added_tokens"], {**state["added_tokens"][0], "id": 320, "content": "<" * 300}]
    with pytest.raises(ValueError, match=r"has a token of 300 characters"):
        load_tokenizer(strange(added_tokens=added))


def test_a_panic_while_decoding_is_an_error_in_one_line(honest, monkeypatch):
    class Panic(BaseException):
        pass

    tokenizer = load_tokenizer(honest)

    def panics(*_, **__):
        raise Panic("index out of bounds")

    monkeypatch.setattr(tokenizer, "decode", panics)
    with pytest.raises(ValueError, match="cannot decode its own tokens: Panic: index out of bounds"):
        decode(tokenizer, [1])


TEXTS = [
    "",
    " ",
    "Hello, wörld!\n\n  ok",
    "</s> <s>",
    "日本語 \U0001f600",
    "a" * 5000,
    "\0\u200b\ufeff",
    "<|user|>\nHi",
]


def test_ids_are_those_of_the_library(honest):
    tokenizer = load_tokenizer(honest)
    worker = limited(tokenizer)
    assert worker is limited(tokenizer)
    for special in (False, True):
        found = worker.encode(TEXTS * 700, add_special_tokens=special)  # in several calls
        expected = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
        assert [ids.tolist() for ids in found] == expected * 700
        assert all(ids.dtype == np.int32 and ids.flags.owndata for ids in found)
    tokenizer.add_tokens(["wörld"])
    assert limited(tokenizer) is not worker
    (ids,) = limited(tokenizer).encode(["wörld"])
    assert ids.tolist() == tokenizer("wörld", add_special_tokens=False)["input_ids"]


def test_a_text_that_is_no_unicode_is_no_other_text_s_fault(honest):
    first, second, third = limited(load_tokenizer(honest)).encode(["one", "\ud800", "three"])
    assert isinstance(second, ValueError)
    assert len(first)
    assert len(third)


def test_a_process_that_dies_starts_again_and_sees_no_environment(honest, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    worker = limited(load_tokenizer(honest))
    before = worker.encode(["one"])[0].tolist()
    process = limited_tokenizer._kept[worker._key]._process
    assert b"a-secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    os.kill(process.pid, 9)
    process.wait()
    assert worker.encode(["one"])[0].tolist() == before


def test_no_more_processes_than_two_are_kept(honest):
    state = (honest / "tokenizer.json").read_text(encoding="utf-8")
    made = [LimitedTokenizer(state.replace('"version": "1.0"', f'"version": "1.0"{" " * n}')) for n in range(4)]
    assert [one.encode(["one"])[0].tolist() for one in made for _ in range(2)]
    assert len(limited_tokenizer._kept) == 2
