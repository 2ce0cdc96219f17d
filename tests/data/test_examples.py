from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.core.records import Message, Row
from rpo_jax.data.examples import LAYOUTS, detect_layout, embedding_text, make_examples, prompt_text
from rpo_jax.data.faults import BadRow, Faults
from rpo_jax.data.sources import read_rows

from .ragged import pair, text_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def rows_of(*records):
    return [Row(record, "rows.jsonl", line) for line, record in enumerate(records, start=1)]


def test_an_error_names_the_first_bad_row_and_counts_the_rest_by_kind():
    rows = rows_of(PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": None}, PAIR | {"chosen": " "})
    with pytest.raises(
        ValueError,
        match=r"^rows.jsonl:2: empty chosen response. 3 of 4 rows cannot be used \(empty chosen response: 2, "
        r"column 'rejected' is null: 1\); fix them, or set data.on_bad_row: skip",
    ):
        make_examples(rows)


def test_an_unreadable_row_is_an_error_by_its_line():
    rows = [*rows_of(PAIR), BadRow("rows.jsonl:2", "broken JSON: Expecting value at column 3")]
    with pytest.raises(ValueError, match=r"^rows.jsonl:2: broken JSON: Expecting .* 1 of 2 .*\(broken JSON: 1\)"):
        make_examples(rows)


def test_skip_keeps_the_good_rows_and_reports_the_bad_in_file_order():
    bad = BadRow("rows.jsonl:3", "broken JSON: Expecting value at column 3")
    good = rows_of(PAIR, PAIR | {"prompt": ""}, {}, PAIR, PAIR | {"prompt": None})
    rows = [*good[:2], bad, *good[3:]]
    result = make_examples(rows, on_bad_row="skip")
    assert [example.row_id for example in result.examples] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert [row.row_id for row in result.faults.rows] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:5"]
    assert result.faults.by_kind == {"empty prompt": 1, "broken JSON": 1, "column 'prompt' is null": 1}
    assert (result.layout, result.truncation_side) == ("preference", "keep_end")


@pytest.mark.parametrize(
    "rows",
    [rows_of(PAIR | {"chosen": "b"}), [BadRow("rows.jsonl:1", "broken JSON: nothing")]],
)
def test_skipping_every_row_is_an_error(rows):
    with pytest.raises(ValueError, match=r"^rows.jsonl:1: .* 1 of 1 rows cannot be used .*none is left"):
        make_examples(rows, on_bad_row="skip")


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_rows_without_a_preference_are_an_error(on_bad_row):
    message = {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter", "rank": None}
    with pytest.raises(ValueError, match=r"none of the 1 rows gave an example in the layout 'oasst1'"):
        make_examples(rows_of(message), on_bad_row=on_bad_row)


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="there are no rows"):
        make_examples([])


def test_an_unknown_layout_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"data.layout 'hh-rlfh' is unknown; did you mean 'hh_rlhf'\?.*sharegpt"):
        make_examples(rows_of(PAIR), "hh-rlfh")


def test_an_unknown_way_with_bad_rows_is_refused():
    with pytest.raises(ValueError, match=r"data.on_bad_row is 'drop'; use 'error' or 'skip'"):
        make_examples(rows_of(PAIR), on_bad_row="drop")  # pyright: ignore[reportArgumentType]


def test_unknown_columns_are_listed_with_what_each_layout_needs():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is checked below
        detect_layout(rows_of({"question": "q", "answer": "a"}))
    message = str(caught.value)
    assert message.startswith("rows.jsonl: the columns (question, answer) fit no layout; set data.layout")
    for name, layout in LAYOUTS.items():
        assert f"{name}: {', '.join(layout.columns)}" in message


def test_columns_of_two_layouts_are_ambiguous():
    both = PAIR | {"completion": "a", "label": True}
    with pytest.raises(ValueError, match=r"fit the layouts preference and unpaired alike; set data.layout"):
        detect_layout(rows_of(both))
    assert make_examples(rows_of(both), "unpaired").examples[0].first("rejected") is None


def test_a_broken_first_row_does_not_hide_the_layout():
    rows = rows_of({"note": "header"}, PAIR, PAIR)
    assert detect_layout(rows) == "preference"
    with pytest.raises(ValueError, match=r"^rows.jsonl:1: column 'chosen' is missing: the row has note"):
        make_examples(rows)


STRING = pair("Why is it so?", "So.", "No.")
TALK = pair((Message("system", "Brief."), Message("user", "Hi"), Message("user", "Why?")), "So.", None)


def test_texts_for_the_encoder():
    assert prompt_text(STRING) == "Why is it so?"
    assert prompt_text(TALK) == "system: Brief.\n\nuser: Hi\n\nuser: Why?"
    for example in (STRING, TALK):
        assert embedding_text(example, "prompt", "So.") == prompt_text(example)
    assert embedding_text(STRING, "prompt_response", "No.") == "Why is it so?\n\nNo."
    assert embedding_text(TALK, "prompt_response", "So.") == prompt_text(TALK) + "\n\nassistant: So."
    assert embedding_text(STRING, "last_turn", "So.") == "Why is it so?"
    assert embedding_text(TALK, "last_turn", "So.") == "Why?"


COLUMNS = sorted({column for layout in LAYOUTS.values() for column in layout.columns} | {"system", "deleted"})
KEYS = ["role", "content", "from", "value", "type", "text", "subreddit", "title", "post"]
WORDS = ["", " ", "a", "b", "user", "assistant", "gpt", "\ud800", "\n\nHuman: a\n\nAssistant: b"]
SCALARS = st.none() | st.booleans() | st.integers(-1, 2) | st.just(10**400) | st.floats() | st.sampled_from(WORDS)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.sampled_from(COLUMNS), JUNK), min_size=1, max_size=4),
    layout=st.sampled_from(["auto", *LAYOUTS]),
    data=st.data(),
)
def test_junk_gives_bad_rows_or_a_value_error_and_nothing_else(records, layout, data):
    if layout != "auto":  # mostly rows that get past the check for missing columns
        for record in records:
            record.update({column: data.draw(JUNK) for column in LAYOUTS[layout].columns})
    rows = rows_of(*records)
    try:
        result = make_examples(rows, layout, "skip")
    except ValueError:
        with pytest.raises(ValueError, match=r"rows"):
            make_examples(rows, layout)
        return
    assert result.examples
    for example in result.examples:
        assert text_of(example, "chosen") != text_of(example, "rejected")
        assert all(response.text.strip() for response in example.responses)
        embedding_text(example, "prompt_response", text_of(example, "chosen") or "").encode()
    assert {row.row_id for row in result.faults.rows} <= {row.row_id for row in rows}


def shared(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here: the test needs that real data file")
    return SHARED / name


def test_raw_hh_transcripts():
    path = shared("hh-harmless-base-test.jsonl.gz")
    rows = list(read_rows(path))
    assert len(rows) == 2312
    result = make_examples(rows, on_bad_row="skip")
    assert (result.layout, result.truncation_side) == ("hh_rlhf", "keep_end")
    assert len(result.examples) == 2308
    assert result.faults.by_kind == {"empty chosen response": 4}
    assert [int(row.row_id.rpartition(":")[2]) for row in result.faults.rows] == [87, 517, 926, 1104]
    originals = {row.row_id: row.values for row in rows if isinstance(row, Row)}
    for example in result.examples:
        assert [message.role for message in example.prompt[::2]] == ["user"] * (len(example.prompt) // 2 + 1)
        assert [message.role for message in example.prompt[1::2]] == ["assistant"] * (len(example.prompt) // 2)
        for name in ("chosen", "rejected"):
            assert originals[example.row_id][name].rstrip().endswith(f"\n\nAssistant: {text_of(example, name)}")
    # Four chosen texts and one rejected one run on into another turn after the last shared one.
    runs_on = [
        e.row_id.rpartition(":")[2] for e in result.examples if "\n\nAssistant:" in "".join(r.text for r in e.responses)
    ]
    assert runs_on == ["1255", "1689", "1951", "1953", "2037"]
    with pytest.raises(ValueError, match=r"test.jsonl.gz:87: empty chosen response. 4 of 2312 rows"):
        make_examples(rows)


def test_sharegpt_preferences():
    result = make_examples(read_rows(shared("sharegpt-preference-demo.json")))
    assert (result.layout, len(result.examples), result.faults) == ("sharegpt", 300, Faults())
    systems = sum(example.prompt[0].role == "system" for example in result.examples)
    assert systems == 80
    assert all(example.prompt[-1].role == "user" for example in result.examples)
