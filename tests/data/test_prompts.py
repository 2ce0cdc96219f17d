"""Prompts from every kind of file that holds them, and what is refused."""

import json

import pytest

from rpo_jax.core.records import Message
from rpo_jax.data.prompts import read_prompts
from tests.runs import preference_rows, write_rows

USER = Message("user", "Why?")
TURN = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?"}, "Why?"),
        ({"prompt": [TURN], "id": 3}, (USER,)),
        ({"messages": [TURN, REPLY]}, (USER,)),
        ({"messages": [{"role": "system", "content": "Be brief."}, TURN]}, (Message("system", "Be brief."), USER)),
        ({"instruction": "Why?", "output": "A reference."}, (USER,)),
        ({"question": "Why?"}, (USER,)),
        ({"query": "Why?", "system": "Be brief.", "id": 3}, (Message("system", "Be brief."), USER)),
        ({"conversations": [{"from": "human", "value": "Why?"}]}, (USER,)),
        ({"instruction": "Say why:", "input": "rain"}, (Message("user", "Say why:\n\nrain"),)),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?"),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, (USER,)),
        ({"prompt": "Why?", "completion": "So.", "label": True}, "Why?"),
    ],
)
def test_a_row_gives_its_prompt(tmp_path, row, prompt):
    file = write_rows(tmp_path / "rows.jsonl", [row])
    (found,) = read_prompts(file).rows
    assert (found.row_id, found.prompt, dict(found.values)) == (f"{file}:1", prompt, row)
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([row]), encoding="utf-8")
    assert read_prompts(listed).rows[0].prompt == prompt


def test_a_line_ends_where_a_line_feed_is(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("One\u2028and two\x0cand three?\r\n\nFour?\n".encode())
    rows = read_prompts(file).rows
    assert [row.prompt for row in rows] == ["One\u2028and two\x0cand three?", "Four?"]
    assert rows[1].row_id == f"{file}:3"


def test_prompts_take_columns_and_what_stands_beside_them(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Why?", "tools": [{"name": "f"}], "context": "Rain."}])
    (found,) = read_prompts(file, columns={"prompt": "text"}, ignore_columns=["context"]).rows
    assert (found.prompt, found.template_arguments) == ((USER,), '{"tools": [{"name": "f"}]}')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: column 'context' conditions the answers"):
        read_prompts(file, columns={"prompt": "text"})
    with pytest.raises(ValueError, match=r"data.columns.prompt is 'words', but the columns are text, tools, context"):
        read_prompts(file, columns={"prompt": "words"})
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"text": "Why?", "chosen": "So.", "rejected": "No."}])
    assert read_prompts(pairs, columns={"prompt": "text"}).rows[0].prompt == "Why?"


def test_the_columns_of_a_run_count_where_the_rows_have_them(tmp_path):
    usual = {"prompt": "text", "chosen": "good"}
    own = write_rows(tmp_path / "own.jsonl", [{"text": "Why?", "prompt": "No."}])
    assert read_prompts(own, usual_columns=usual).rows[0].prompt == "Why?"
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "How?"}])
    assert read_prompts(other, usual_columns=usual).rows[0].prompt == "How?"
    assert read_prompts(own, columns={}, usual_columns=usual).rows[0].prompt == "No.", "what is given counts alone"


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\ufeffOne?\n\n  \nTwo? \n", encoding="utf-8")
    assert [(row.row_id, row.prompt) for row in read_prompts(file).rows] == [
        (f"{file}:1", "One?"),
        (f"{file}:4", "Two? "),
    ]


def test_the_prompts_of_preferences_stay_in_order(tmp_path):
    rows = preference_rows(8)
    found = read_prompts(write_rows(tmp_path / "pairs.jsonl", rows))
    assert [row.prompt for row in found.rows] == [row["prompt"] for row in rows]
    assert found.truncation_side == "keep_end"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", '{"prompt": "Why?"}\n{"prompt": " "}\n', "rows.jsonl:2: empty prompt"),
        ("rows.jsonl", '{"prompt": "Why?"}\n{"prompt": 3}\n', "rows.jsonl:2: column 'prompt' does not hold"),
        ("rows.jsonl", '{"prompt": "Why?"}\n{"words": "Why?"}\n', "rows.jsonl:2: column 'prompt' is missing"),
        ("rows.jsonl", '{"messages": []}\n', "rows.jsonl:1: prompt does not end with a user turn"),
        ("rows.jsonl", '{"prompt": "Why?"}\n{"prompt\n', "rows.jsonl:2: broken JSON"),
        ("rows.jsonl", '{"words": "Why?"}\n', r'say which one does: --columns \'{"prompt": "words"}\', in a config'),
        (
            "rows.jsonl",
            '{"chosen": "a", "rejected": "b", "prompt": "c"}\n{"prompt": "d"}\n',
            r"rows.jsonl:2: column 'chosen' is missing: the row has prompt; mend the row",
        ),
        ("rows.jsonl", "", "is empty"),
        ("rows.txt", "\n \n", "is empty"),
        ("rows.xlsx", "prompt\n", "unknown suffix"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, name, content, named):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        read_prompts(tmp_path / name)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(tmp_path / "rows.txt")
