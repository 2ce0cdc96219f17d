"""Names and texts of others on their way to a terminal or a file."""

import json
import logging
import os

import pytest
from hypothesis import given, strategies

from rpo_jax import doctor, train
from rpo_jax.core.command import print_error, print_text, run_command
from rpo_jax.core.files import atomic_write
from rpo_jax.core.text import printable, well_formed
from rpo_jax.runs.tracking import Reporter
from tests.runs import write_rows

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202egpj.\ud800"


@given(strategies.text(strategies.characters(exclude_categories=[])))
def test_what_is_printed_moves_no_cursor_and_can_be_encoded(text):
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert shown.encode() is not None
    assert printable(shown) == shown
    assert well_formed(text).encode() is not None


def test_honest_text_stays_as_it_is():
    text = "Grüße, 日本語\n\tand more \U0001f600"
    assert printable(text) == well_formed(text) == text
    assert well_formed("\ud83d\ude00 \ud83d") == "\U0001f600 \ufffd"


def test_every_way_to_the_terminal_is_clean(capsys, monkeypatch):
    print_error(ValueError(f"no {EVIL}"))
    print_text(f"page {EVIL}")
    Reporter().say(f"rows of {EVIL}")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def warn() -> None:
        logging.getLogger("rpo_jax.core.store").warning("Embeddings in %s are damaged", EVIL)

    assert run_command(warn) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert printable(text) == text
        assert text.count("\\x1b[2J") == 2


@pytest.mark.parametrize("command", [train, doctor])
def test_names_keys_and_rows_of_files_are_clean(command, tmp_path, capsys):
    folder = tmp_path / EVIL.replace("/", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    folder.mkdir()
    data = write_rows(folder / "data.jsonl", [{"prompt": "p", EVIL: "x", "chosen": EVIL}] * 3)
    (folder / "config.yaml").write_text(json.dumps({"data": {"a\x1b[2J": 1}}))
    for arguments in ([f"--config={folder / 'config.yaml'}"], [f"--data.path={data}"], [f"--data.path={folder}"]):
        more = [] if command is doctor else [f"--run.dir={tmp_path / 'run'}"]
        assert command.main([*arguments, *more]) == 2
        printed = capsys.readouterr()
        for text in (printed.out, printed.err):
            assert printable(text) == text
        assert "\\x1b" in printed.out + printed.err


def test_a_file_s_name_that_is_no_utf_8_can_be_written(tmp_path):
    name = os.fsdecode(b"\xff.jsonl")
    atomic_write(tmp_path / "x.json", json.dumps({"file": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"file": name}
