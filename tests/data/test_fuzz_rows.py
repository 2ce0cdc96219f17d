"""Whatever a file of preferences holds, reading it gives examples, counted faults, or our own error."""

import csv
import gzip
import io
import itertools
import json
import traceback
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import rpo_jax
from rpo_jax.data.examples import LAYOUTS, embedding_text, make_examples
from rpo_jax.data.sources import read_rows
from rpo_jax.data.tokenize import TokenLimits, tokenize_examples
from tests.data.damage import ACCEPTED, DAMAGE, Source
from tests.runs import preference_rows

from .ragged import text_of

PACKAGE = Path(rpo_jax.__file__).parent
FEW, MANY = 60, pytest.param(5000, marks=pytest.mark.slow)
LAYOUT = st.sampled_from(["auto", "auto", "preference", *LAYOUTS])


def fuzz(body, examples, **strategies):
    """Run `body` on so many generated arguments, the same ones every time."""
    checks = list(HealthCheck)  # none of them is about what is tested here
    chosen = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks
    )
    chosen(given(**strategies)(body))()


def assert_ours(error):
    """A ValueError of this package's own, not one that a library's happens to be: they say nothing to a user."""
    assert type(error) is ValueError, repr(error)
    assert Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE), repr(error)
    assert str(error).isprintable(), repr(error)


def feed(path, layout, tokenizer):
    """A file's way to token ids, in both modes."""
    strict = None
    try:
        whole = make_examples(read_rows(path), layout)
    except ValueError as error:
        assert_ours(error)
        strict = str(error)
    try:
        found = make_examples(read_rows(path), layout, "skip")
    except ValueError as error:
        assert_ours(error)
        assert strict is not None
        return
    if strict is None:
        assert not found.faults
        assert whole == found
    else:
        assert strict.startswith(f"{found.faults.first.row_id}: {found.faults.first.reason}. {found.faults.total} of ")
    found.faults.report().encode()
    for example in found.examples:
        assert text_of(example, "chosen") != text_of(example, "rejected")
        embedding_text(example, "prompt_response", text_of(example, "chosen") or "").encode()
    tokenized, bad = tokenize_examples(found.examples, tokenizer, TokenLimits(40, 60, found.truncation_side))
    read, dropped = [example.row_id for example in found.examples], [row.row_id for row in bad.rows]
    assert [example.row_id for example in tokenized] == [row_id for row_id in read if row_id not in dropped]
    assert dropped == [row_id for row_id in read if row_id in dropped]
    assert all(0 < len(response.ids) < 60 for e in tokenized for response in e.responses)


KINDS = sorted((ACCEPTED | DAMAGE).items())
LINES = st.builds(
    lambda kind, seed: _bytes(kind[1].make(Source(seed, megabyte=3000))),
    st.sampled_from([kind for kind in KINDS if "nesting" not in kind[0] and "without end" not in kind[0]]),
    st.integers(0, 3),
)


def _bytes(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@st.composite
def mutations(draw):
    """What is done to bytes: pieces cut out, repeated, overwritten, inserted."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["cut", "repeat", "write", "insert"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(1, 40),
                st.binary(min_size=1, max_size=6) | st.sampled_from([b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\\u"]),
            ),
            max_size=4,
        )
    )


def mutated(raw, changes):
    for what, place, length, new in changes:
        at = int(place * len(raw))
        if what == "cut":
            raw = raw[:at] + raw[at + length :]
        elif what == "repeat":
            raw = raw[: at + length] + raw[at:]
        elif what == "write":
            raw = raw[:at] + new + raw[at + len(new) :]
        else:
            raw = raw[:at] + new + raw[at:]
    return raw


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_lines_of_all_kinds_mutated(tmp_path, tokenizer, examples):
    def body(lines, document, inner, packed, outer, layout):
        raw = b"[" + b",".join(lines) + b"]" if document else b"\n".join(lines)
        raw = mutated(raw, inner)
        path = tmp_path / (("rows.json" if document else "rows.jsonl") + ".gz" * packed)
        path.write_bytes(mutated(gzip.compress(raw, 1), outer) if packed else raw)
        feed(path, layout, tokenizer)

    fuzz(
        body,
        examples,
        lines=st.lists(LINES, min_size=1, max_size=8),
        document=st.booleans(),
        inner=mutations(),
        packed=st.booleans(),
        outer=mutations(),
        layout=LAYOUT,
    )


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_any_bytes(tmp_path, tokenizer, examples):
    def body(raw, name, layout):
        path = tmp_path / name
        path.write_bytes(raw)
        feed(path, layout, tokenizer)

    names = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.csv", "rows.tsv.gz"]
    fuzz(body, examples, raw=st.binary(max_size=200), name=st.sampled_from(names), layout=LAYOUT)


COLUMNS = sorted(
    {name for layout in LAYOUTS.values() for name in (*layout.names, *itertools.chain(*layout.aliases.values()))}
    | {"deleted", "images", "words"}
)
KEYS = ["role", "content", "from", "value", "type", "text", "subreddit", "title", "post"]
WORDS = ["", " ", "a", "b", "user", "assistant", "gpt", "\ud800", "\0", "\x1b[2J", "\n\nHuman: a\n\nAssistant: b"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from([2**64, -(10**400), float("nan"), float("inf")])
    | st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=()), max_size=4)
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=8,
)
# Turns that are nearly sound reach further than junk does.
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "function_call"]), "content": SCALARS},
    optional={"tool_calls": JUNK, "name": JUNK},
)
VALUE = JUNK | st.lists(TURN, max_size=4) | st.sampled_from(WORDS)


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_any_json(tmp_path, tokenizer, examples):
    def body(records, layout, extra, document):
        if layout != "auto":  # mostly rows that get past the check for missing columns
            for record in records:
                record.update(dict(zip(LAYOUTS[layout].columns, extra, strict=False)))
        path = tmp_path / ("rows.json" if document else "rows.jsonl")
        path.write_text(json.dumps(records) if document else "\n".join(map(json.dumps, records)))
        feed(path, layout, tokenizer)

    fuzz(
        body,
        examples,
        records=st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUE), min_size=1, max_size=4),
        layout=LAYOUT,
        extra=st.lists(VALUE, min_size=5, max_size=5),
        document=st.booleans(),
    )


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_csv_files_mutated(tmp_path, tokenizer, examples):
    def body(header, cells, changes, name, layout):
        text = io.StringIO()
        rows = [cells[start : start + len(header)] for start in range(0, len(cells), len(header))]
        csv.writer(text, delimiter="," if "csv" in name else "\t").writerows([header, *rows])
        path = tmp_path / name
        path.write_bytes(mutated(text.getvalue().encode("utf-8", "surrogatepass"), changes))
        feed(path, layout, tokenizer)

    fuzz(
        body,
        examples,
        header=st.just(["prompt", "chosen", "rejected"]) | st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=5),
        cells=st.lists(st.sampled_from([*WORDS, "true", "0"]) | st.builds(json.dumps, VALUE), max_size=12),
        changes=mutations(),
        name=st.sampled_from(["rows.csv", "rows.tsv"]),
        layout=LAYOUT,
    )


def tables(tmp_path):
    """Two tables' bytes, of texts and of conversations."""
    rows = preference_rows(40)
    turns = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}] for name in row}
        for row in rows
    ]
    for number, records in enumerate((rows, turns)):
        path = tmp_path / f"whole{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=10)
        yield path.read_bytes()


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_parquet_files_mutated(tmp_path, tokenizer, examples):
    whole = list(tables(tmp_path))

    def body(which, changes, layout):
        path = tmp_path / "rows.parquet"
        path.write_bytes(mutated(whole[which], changes))
        feed(path, layout, tokenizer)

    fuzz(body, examples, which=st.integers(0, 1), changes=mutations(), layout=LAYOUT)


TYPES = {
    pyarrow.string(): st.none() | st.sampled_from([word for word in WORDS if word != "\ud800"]) | st.just("So."),
    pyarrow.binary(): st.none() | st.binary(max_size=4),
    pyarrow.int64(): st.none() | st.integers(-1, 2),
    pyarrow.float64(): st.none() | st.floats(),
    pyarrow.timestamp("s"): st.none() | st.integers(-(2**50), 2**50),  # most are in no calendar
    pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])): st.none()
    | st.lists(
        st.none()
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", None, "tool"]), "content": st.sampled_from([None, "", "a"])}
        ),
        max_size=3,
    ),
}


@st.composite
def columns(draw):
    names = draw(st.just(["prompt", "chosen", "rejected"]) | st.lists(st.sampled_from(COLUMNS), max_size=5))
    count = draw(st.integers(0, 4))
    arrays = []
    for _ in names:
        kind = draw(st.sampled_from([*TYPES, pyarrow.string()]))
        values = draw(st.lists(TYPES[kind], min_size=count, max_size=count))
        if kind == pyarrow.binary() and draw(st.booleans()):
            arrays.append(pyarrow.array(values, kind).view(pyarrow.string()))  # text that may be no UTF-8
        elif pyarrow.types.is_timestamp(kind):
            arrays.append(pyarrow.array(values, pyarrow.int64()).cast(kind))
        else:
            arrays.append(pyarrow.array(values, kind))
    return names, arrays


@pytest.mark.parametrize("examples", [FEW, MANY])
def test_any_table(tmp_path, tokenizer, examples):
    def body(content, layout):
        names, arrays = content
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.table(arrays, names), path)
        feed(path, layout, tokenizer)

    fuzz(body, examples, content=columns(), layout=LAYOUT)


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_arrow_folders_mutated(tmp_path, tokenizer, examples):
    import datasets

    datasets.Dataset.from_list(preference_rows(40)).save_to_disk(tmp_path / "rows")
    files = {file: file.read_bytes() for file in sorted((tmp_path / "rows").iterdir())}

    def body(which, changes, layout):
        for number, (file, raw) in enumerate(files.items()):
            file.write_bytes(mutated(raw, changes) if number == which else raw)
        feed(tmp_path / "rows", layout, tokenizer)

    fuzz(body, examples, which=st.integers(0, len(files) - 1), changes=mutations(), layout=LAYOUT)
