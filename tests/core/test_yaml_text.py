"""YAML that others wrote: what it may hold, and what is refused at once."""

import re

import pytest
import yaml

from rpo_jax import train
from rpo_jax.config.reading import load_config
from rpo_jax.core.yaml_text import parse_yaml, read_yaml
from rpo_jax.tools.comparing.study import read_study

TENS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
CHAIN = "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9))
BOMBS = {
    "aliases of aliases": ("a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + TENS, "aliases resolved"),
    "mappings of aliases": ("a0: &a0 {a: 1, b: 2}\n" + TENS, "aliases resolved"),
    "merges of merges": ("a0: &a0 {a: 1, b: 2}\n" + MERGES, "aliases resolved"),
    "a chain of aliases": ("a0: &a0 [1]\n" + CHAIN, "levels, aliases resolved"),
    "an alias within itself": ("a: &a [*a]", "within what it stands for"),
    "a merge of itself": ("a: &a {<<: *a}", "within what it stands for"),
    "20,000 brackets": ("a: " + "[" * 20_000, "nests more than 64"),
    "20,000 braces": ("a: " + "{a: " * 20_000, "nests more than 64"),
    "20,000 dashes": ("- " * 20_000, "nests more than 64"),
    "20,000 closed brackets": ("a: " + "[" * 20_000 + "]" * 20_000, "nests more than 64"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "line 3 names 'a' a second time"),
    "a key twice, deep": ("a:\n  b: {c: 1, c: 2}\n", "line 2 names 'c' a second time"),
    "a merge twice": ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", "a second time"),
    "infinity": ("a: .inf", "no number that can be used"),
    "minus infinity": ("a: [1, -.INF]", "no number that can be used"),
    "not a number": ("a: .NaN", "no number that can be used"),
    "1e400": ("a: 1e400", "'1e400', which is no number that can be used"),
    "many digits": ("a: " + "9" * 300, "no number that can be used"),
    "more digits": ("a: " + "9" * 9000, "which is no number"),
    "many digits to the base 16": ("a: 0x" + "f" * 9000, "no number that can be used"),
    "a number to the base 60 by its tag": ("a: !!int 1" + ":59" * 5000, "which is no number"),
    "a float to the base 60 by its tag": ("a: !!float 1" + ":59" * 5000 + ".5", "which is no number"),
    "a word with a number's tag": ("a: !!int x", "which is no number"),
    "code": ("a: !!python/object/apply:os.system [ls]", "holds a 'python/object/apply:os.system'"),
    "a name of code": ("a: !!python/name:os.system", "holds a 'python/name:os.system'"),
    "bytes": ("a: !!binary aGk=", "holds a 'binary'"),
    "a set": ("a: !!set {b, c}", "holds a 'set'"),
    "a tag of its own": ("a: !mine 1", "holds a '!mine'"),
    "too much": ("a: " + "x" * (1 << 20), "characters; no more than"),
    "very many values": ("a: [" + "1," * 25_000 + "]", "more than 20,000 values"),
    "more values still": ("a: [" + "1," * 300_000 + "]", "is beyond the first 20,000 values"),
    "two documents": ("a: 1\n---\na: 2\n", "single document"),
    "a list as a key": ("? [a]\n: 1", "unhashable key"),
    "control characters": ("a: \x00", "not valid YAML"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_what_no_one_would_write_is_refused_at_once_in_one_line(name, tmp_path, capsys):
    text, reason = BOMBS[name]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read in (read_yaml, load_config, read_study):
        with pytest.raises(ValueError, match="is not valid YAML: ") as caught:
            read(file)
        assert reason in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert train.main(["--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file}")
    assert told.count("\n") == 1


PLAIN = """
text: [a, 12:30, 1:60:60, 1_000:60:60, 2001-12-14, "1", 1e, =, <<a, 0o7, 08]
numbers: [1, -2, 1_000, 0x1F, 0b11, 017, 1.5, 1e-5, 5E3, .5, -1.5e+3, 0, 9223372036854775807]
others: [true, False, yes, off, ~, null, ""]
base: &base {a: 1, b: {c: [1, 2]}}
more:
  <<: *base
  a: 2
again: [*base, *base]
empty:
"""


def test_what_a_person_writes_is_read():
    found = parse_yaml(PLAIN)
    assert found["text"] == PLAIN.splitlines()[1].removeprefix("text: [").removesuffix("]").replace('"', "").split(", ")
    assert found["numbers"] == [1, -2, 1000, 31, 3, 15, 1.5, 1e-5, 5000.0, 0.5, -1500.0, 0, 2**63 - 1]
    assert found["others"] == [True, False, True, False, None, None, ""]
    assert found["more"] == {"a": 2, "b": {"c": [1, 2]}}
    assert found["again"] == [{"a": 1, "b": {"c": [1, 2]}}] * 2
    assert found["empty"] is None
    assert parse_yaml("") is parse_yaml("# nothing\n") is None
    assert parse_yaml(yaml.safe_dump(found)) == found


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("optim.learning_rate", "1e400", "no number that can be used"),
        ("optim.learning_rate", ".inf", "no number that can be used"),
        ("optim.learning_rate", "inf", "optim.learning_rate"),
        ("optim.learning_rate", "nan", "optim.learning_rate"),
        ("optim.learning_rate", "1:30", "optim.learning_rate"),
        ("optim.max_grad_norm", "9" * 400, "no number that can be used"),
        ("train.steps", "1" + "0" * 30, "no number that can be used"),
        ("train.steps", "1:60:60", "train.steps"),
        ("run.seed", "1" * 5000, "which is no number"),
        ("train.epochs", "1e999", "no number that can be used"),
        ("contrast.perplexity", ".nan", "no number that can be used"),
        ("data.template_arguments", "{a: {b: .inf}}", "no number that can be used"),
        ("data.template_arguments", "[" * 20_000, "nests more than 64"),
        ("data.columns", "{prompt: a, prompt: b}", "a second time"),
        ("data.ignore_columns", f"[{', '.join(map(str, range(200_000)))}]", "no more than"),
    ],
)
def test_a_number_is_one_that_can_be_used(key, value, reason, tmp_path):
    section, _, name = key.partition(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}:\n  {name}: {value}\n")
    for given in ((file, ()), (None, [f"{key}={value}"])):
        with pytest.raises(ValueError, match=re.escape(reason)) as caught:
            load_config(*given)
        assert "\n" not in str(caught.value)


def test_texts_that_are_no_yaml_stay_texts():
    for text in ("*.jsonl", "a: b: c", "[half", "{half", "'half", "@x", "a\tb", "{a}", "a:", "-", "12:30:45"):
        assert load_config(None, [f"data.path={text}"]).data.path == text


def test_a_grid_of_more_runs_than_anybody_has_is_refused(tmp_path):
    keys = {f"optim.b{n}": list(range(10)) for n in range(30)}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"seeds": [1], "tuning": {"grid": keys}, "methods": {"rpo": {}}, "tables": {}}))
    with pytest.raises(ValueError, match=r"rpo: grid: it asks for 1,0{3}.* runs, more than 10,000\."):
        read_study(file)
