"""CSV and TSV files: quoting, numbering, what their cells stand for, and damage."""

import csv
import gzip
import io
import json

import pytest

from rpo_jax.core.records import Message
from rpo_jax.data import csv_rows, lines
from rpo_jax.data.examples import make_examples
from rpo_jax.data.faults import BadRow
from rpo_jax.data.sources import read_rows

RECORDS = [
    {"prompt": 'Say "a, b".', "chosen": "one\r\ntwo", "rejected": "tab\there"},
    {"prompt": "Où?", "chosen": "Là.", "rejected": " Ici. "},
]


def table(records, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write(path, content):
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def bad_rows(path):
    return [row for row in read_rows(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "ROWS.TSV", "rows.v1.tsv.gz"])
def test_records_are_those_that_were_written_with_the_lines_they_begin_on(tmp_path, name, mark):
    path = write(tmp_path / name, mark + table(RECORDS, "\t" if "tsv" in name.lower() else ","))
    rows = list(read_rows(path))
    assert [dict(row.values) for row in rows] == RECORDS
    assert [row.row_id for row in rows] == [f"{path}:2", f"{path}:4"], "the first has two lines"
    assert make_examples(rows).examples[1].responses[0].text == "Là."


def test_cells_are_what_a_layout_wants_of_them(tmp_path):
    turns = [{"role": "user", "content": "[1] is a source"}]
    records = [
        {
            "prompt": json.dumps(turns),
            "completion": '{"a": 1}',
            "label": "TRUE",
            "score": "1.5",
            "tools": '[{"name": "f"}]',
        },
        {"prompt": "[1] and {2}", "completion": "0", "label": "0", "score": "-2", "tools": ""},
    ]
    rows = list(read_rows(write(tmp_path / "rows.csv", table(records))))
    first, second = make_examples(rows, scores={"chosen": "score", "rejected": "score"}).examples
    assert (first.prompt, first.template_arguments) == (
        (Message("user", "[1] is a source"),),
        '{"tools": [{"name": "f"}]}',
    )
    assert (second.prompt, type(second.prompt)) == ("[1] and {2}", str)
    assert [(one.kind, one.text, one.score) for e in (first, second) for one in e.responses] == [
        ("chosen", '{"a": 1}', 1.5),
        ("rejected", "0", -2.0),
    ]


def test_ranked_trees_of_a_csv_file(tmp_path):
    tree = [("a", "", "prompter", "Hi", "", "False"), ("b", "a", "assistant", "So.", "0", "False")]
    tree += [("c", "a", "assistant", "No.", "1.0", "False"), ("d", "a", "assistant", "Gone.", "2", "True")]
    records = [
        dict(zip(("message_id", "parent_id", "role", "text", "rank", "deleted"), one, strict=True)) for one in tree
    ]
    (example,) = make_examples(read_rows(write(tmp_path / "tree.csv", table(records)))).examples
    assert [response.text for response in example.responses] == ["So.", "No."]


def test_what_is_no_cell_of_its_column_is_named(tmp_path):
    printed = "[{'role': 'user', 'content': 'Hi'}]"
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "up": "1"}
    records = [good, good | {"prompt": printed}, good | {"up": "high"}, good | {"up": "1e400"}, good | {"up": ""}]
    path = write(tmp_path / "rows.csv", table(records))
    found = make_examples(read_rows(path), on_bad_row="skip", scores={"chosen": "up", "rejected": "up"})
    assert [(row.row_id, row.reason.partition(" (")[0]) for row in found.faults.rows] == [
        (f"{path}:3", "column 'prompt' has messages as Python prints them: write them with json.dumps"),
        (f"{path}:4", "column 'up' does not hold a number: got str"),
        (f"{path}:5", "column 'up' does not hold a finite number: got inf"),
        (f"{path}:6", "column 'up' does not hold a number: got str"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,b", "ragged row: it has 2 cells, the header 3"),
        (b"a,b,c,d", "ragged row: it has 4 cells, the header 3"),
        (b'a,"b"x,c', "broken CSV: ',' expected after '\"'"),
        (b"a,caf\xe9,c", "not UTF-8: byte 0xe9 in a cell"),
        (b"a," + b"b" * 300 + b",c", "too long: the line has more than"),
        (b'a,"' + b"b" * 60 + b"\n" + b"c" * 60 + b'",c', "broken CSV: field larger than field limit"),
    ],
)
def test_a_row_that_cannot_be_read_is_a_bad_row_between_good_ones(tmp_path, monkeypatch, line, reason):
    for module in (csv_rows, lines):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "rows.csv", b"prompt,chosen,rejected\nq,a,b\n" + line + b"\n\nq,a,b\n")
    found = list(read_rows(path))
    good = [row for row in found if not isinstance(row, BadRow)]
    assert [row.values["prompt"] for row in good][:: len(good) - 1] == ["q", "q"]
    assert found[1].row_id == f"{path}:3"
    assert found[1].reason.startswith(reason)


def test_the_tab_of_a_message_stands_as_its_escape(tmp_path):
    path = write(tmp_path / "rows.tsv", b'prompt\tchosen\trejected\n"q"x\ta\tb\n')
    assert bad_rows(path) == [BadRow(f"{path}:2", "broken CSV: '\\t' expected after '\"'")]
    path = write(tmp_path / "rows.tsv", b'"a"b\tc\n')
    with pytest.raises(ValueError, match=r"rows.tsv:1: the header is broken: '\\t' expected after"):
        list(read_rows(path))


def test_a_quote_without_end_is_one_bad_row(tmp_path):
    path = write(tmp_path / "rows.csv", 'prompt,chosen,rejected\nq,a,b\nq,"a,b\nq,a,b\n')
    lost = "broken CSV: unexpected end of data; its quotes make one row of lines 3 to 4"
    assert bad_rows(path) == [BadRow(f"{path}:3", lost)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows.csv is empty"),
        (b"prompt,chosen,rejected\n", r"rows.csv is empty"),
        (b"a,b,a\nq,r,s\n", r"rows.csv has 2 columns 'a'; keep one of them"),
        (b'"a"b,c\nq,r\n', r"rows.csv:1: the header is broken"),
        ("a,b\n".encode("utf-16"), r"rows.csv is not UTF-8: it is UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_rows(write(tmp_path / "rows.csv", content)))


def test_columns_that_are_not_a_header_are_listed(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt;chosen;rejected\nq;a;b\n")
    with pytest.raises(ValueError, match=r"the columns \(prompt;chosen;rejected\) fit no layout"):
        make_examples(read_rows(path))


def test_a_compressed_file_that_breaks_off_ends_in_one_bad_row(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(table(RECORDS * 4000).encode())[:-30])
    rows = list(read_rows(path))
    assert len(rows) > 1000
    assert rows[-1].reason.startswith("the file breaks off")
