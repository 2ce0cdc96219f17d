"""JSON Lines that a kill cut short, or that a line of damage is in."""

import pytest

from rpo_jax.core.jsonl import read_jsonl, write_jsonl

ROWS = [{"step": 1, "text": "a\u2028b\x85c"}, {"step": 2, "loss": float("inf")}]


def test_rows_come_back_whatever_characters_they_hold(tmp_path):
    for ascii_only in (True, False):
        path = tmp_path / f"{ascii_only}.jsonl"
        write_jsonl(path, ROWS, ascii_only=ascii_only)
        assert read_jsonl(path, ("step",)) == ROWS
        write_jsonl(path, read_jsonl(path), ascii_only=ascii_only)
        assert read_jsonl(path) == ROWS
    assert (tmp_path / "True.jsonl").read_bytes().isascii()


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert read_jsonl(path) == ROWS[: whole[:end].count(b"\n")]


def test_no_file_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "one"}', '{"step": 1.5}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is damaged: it should be a JSON object with step, got"):
        read_jsonl(path, ("step",))
