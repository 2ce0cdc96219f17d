"""Other people's files: of rows damaged in every way that we know, exactly the good ones are read and trained on."""

import gzip
import json
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rpo_jax import train
from rpo_jax.config.reading import load_config
from rpo_jax.core.records import Row
from rpo_jax.data import lines
from rpo_jax.data.examples import make_examples
from rpo_jax.data.lines import MAX_LINE_BYTES
from rpo_jax.data.sources import read_rows
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.prepare import batches_of, prepare
from tests.data.damage import ACCEPTED, DAMAGE, write_document, write_lines, write_table
from tests.runs import metric_lines, preference_rows, settings, without_timings, write_rows

MANY = pytest.mark.slow
SMALL_MEGABYTE = 2**14
ROWS = [pytest.param(2000, SMALL_MEGABYTE, id="2000"), pytest.param(100_000, 2**20, id="100000", marks=MANY)]


def numbers(examples):
    return [int(example.row_id.rpartition(":")[2]) for example in examples]


def read(path):
    return make_examples(read_rows(path), on_bad_row="skip")


def check(written):
    """Skip mode uses exactly the good rows, and both modes count the others and name the first."""
    found = read(written.path)
    assert numbers(found.examples) == written.good
    assert found.faults.counts == dict(written.reasons)
    assert {reason: row.place[1] for reason, row in found.faults.firsts.items()} == written.firsts
    for reason, count in written.reasons.items():
        assert f" {count}  {reason}, first {written.path}:{written.firsts[reason]}\n" in found.faults.report() + "\n"
    with pytest.raises(ValueError, match=r"data\.on_bad_row: skip") as caught:
        make_examples(read_rows(written.path))
    message, first = str(caught.value), min(written.firsts, key=written.firsts.__getitem__)
    assert message.startswith(f"{written.path}:{written.firsts[first]}: {first}")
    bad = written.reasons.total()
    assert f"{bad} of {bad + len(written.good)} rows cannot be used" in message
    assert all(f"{reason}: {count}" in message for reason, count in written.reasons.items())
    assert message.isprintable()


def test_there_are_more_than_forty_kinds_of_damage():
    assert len(DAMAGE) >= 40
    assert not set(DAMAGE) & set(ACCEPTED)


@pytest.mark.parametrize(("rows", "megabyte"), ROWS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_lines(tmp_path, name, rows, megabyte):
    written = write_lines(tmp_path / name, rows, megabyte=megabyte)
    assert set(written.kinds) == set(DAMAGE) | set(ACCEPTED)
    check(written)


@pytest.mark.parametrize("rows", [2000, pytest.param(100_000, marks=MANY)])
def test_a_json_list(tmp_path, rows):
    written = write_document(tmp_path / "rows.json", rows, megabyte=SMALL_MEGABYTE)
    assert len(set(written.kinds) & set(DAMAGE)) >= 40
    check(written)


@pytest.mark.parametrize(("rows", "megabyte"), ROWS)
@pytest.mark.parametrize("name", ["texts.parquet", "conversations_arrow"])
def test_tables(tmp_path, name, rows, megabyte):
    written = write_table(tmp_path / name, rows, megabyte=megabyte)
    assert len(set(written.kinds) & set(DAMAGE)) >= 9, "the kinds that a table's types leave possible"
    check(written)


# Damage of a file, not of a row


def whole_lines(raw):
    """How many lines of a gzip file's start can be had from it."""
    return zlib.decompressobj(wbits=31).decompress(raw).count(b"\n")


def test_a_gzip_file_that_breaks_off_ends_in_one_bad_row(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in preference_rows(5000)).encode())
    for cut in (len(whole) // 3, len(whole) - 4):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(whole[:cut])
        lines = whole_lines(whole[:cut])
        assert lines > 1000
        found = read(path)
        assert numbers(found.examples) == list(range(1, lines + 1))
        assert found.faults.counts == {"the file breaks off": 1}
        with pytest.raises(ValueError, match=rf"gz:{lines + 1}: the file breaks off: .*truncated.* 1 of {lines + 1} "):
            make_examples(read_rows(path))


def test_a_parquet_file_that_is_damaged_further_on_ends_in_one_bad_row(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(preference_rows(4000))
    parquet.write_table(table, path, row_group_size=1000, write_page_checksum=True)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    found = read(path)
    assert numbers(found.examples) == list(range(1, len(found.examples) + 1))
    assert 900 < len(found.examples) < 4000
    assert found.faults.counts == {"the file breaks off": 1}
    assert found.faults.first.row_id == f"{path}:{len(found.examples) + 1}"


def test_text_of_a_parquet_file_that_is_no_utf8_is_a_bad_row(tmp_path):
    rows = preference_rows(100)
    columns = {name: [row[name].encode() for row in rows] for name in rows[0]}
    columns["chosen"][69] = b"caf\xe9"
    arrays = {name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()) for name, values in columns.items()}
    parquet.write_table(pyarrow.table(arrays), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert numbers(found.examples) == [number for number in range(1, 101) if number != 70]
    assert found.faults.first.reason.startswith("unreadable value: UnicodeDecodeError")


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.table([column] * 3, ["prompt", "chosen", "chosen"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet has 2 columns 'chosen'"):
        read(tmp_path / "rows.parquet")


def test_a_parquet_column_whose_name_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(preference_rows(4)), path)
    path.write_bytes(path.read_bytes().replace(b"chosen", b"chose\x80"))
    with pytest.raises(ValueError, match=r"rows.parquet is no readable Parquet file .*write it again"):
        read(path)


def test_an_arrow_folder_whose_offsets_are_damaged_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_list(preference_rows(64)).save_to_disk(tmp_path / "rows")
    (file,) = (tmp_path / "rows").glob("*.arrow")
    raw = file.read_bytes()
    length = len(preference_rows(1)[0]["prompt"])
    offsets = raw.index((0).to_bytes(4, "little") + length.to_bytes(4, "little"))
    file.write_bytes(raw[: offsets + 4] + (2**31 - 1).to_bytes(4, "little") + raw[offsets + 8 :])
    with pytest.raises(ValueError, match=r"rows is a damaged Arrow folder"):
        read(tmp_path / "rows")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path, name, encoding):
    text = "\ufeff" * encoding.endswith("be") + json.dumps(preference_rows(1)[0])
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8: it is UTF-(16|32); save the file as UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_without_end_is_a_bad_row(tmp_path, end):
    good = json.dumps(preference_rows(1)[0]).encode()
    long = b'{"prompt": "' + b"a" * (3 * MAX_LINE_BYTES)
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + long + end + (good if end else b""))
    found = read(tmp_path / "rows.jsonl")
    assert numbers(found.examples) == ([1, 3] if end else [1])
    assert found.faults.first.reason == "too long: the line has more than 16 MiB"


def test_a_longest_line_is_read(tmp_path):
    row = preference_rows(1)[0]
    spare = MAX_LINE_BYTES - len(json.dumps(row)) - 1
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"chosen": row["chosen"] + "a" * spare}) + "\n")
    assert len(read(tmp_path / "rows.jsonl").examples) == 1


# What reaches the training


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from rpo_jax.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text for row in preference_rows() for text in row.values()], 300, folder)
    return folder


def configured(path, run_dir, tokenizer_folder, **changes):
    few = {"data.eval_rows": 0, "contrast.weights": "uniform", "tracking.tensorboard": False, "train.steps": 3}
    # Room for every sound row: a conversation whose last turns do not fit is refused.
    room = {"data.max_tokens": 200, "data.max_prompt_tokens": 160}
    own = {"model.tokenizer": tokenizer_folder, "data.on_bad_row": "skip", **room, **changes}
    return load_config(None, settings(path, run_dir, run_dir.parent / "cache", few | own))


@pytest.mark.parametrize(
    ("rows", "pairs"), [pytest.param(600, 8, id="600"), pytest.param(100_000, 64, id="100000", marks=MANY)]
)
def test_an_epoch_holds_exactly_the_good_rows(tmp_path, tokenizer_folder, rows, pairs, capsys):
    written = write_lines(tmp_path / "rows.jsonl", rows, megabyte=SMALL_MEGABYTE)
    config = configured(written.path, tmp_path / "run", tokenizer_folder, **{"batch.pairs": pairs})
    prepared = prepare(config, Reporter())
    said = capsys.readouterr().out
    assert f"{written.path}: {written.reasons.total()} unusable rows skipped" in said
    assert all(f" {count}  {reason}, first {written.path}:" in said for reason, count in written.reasons.items())
    batches = batches_of(config, prepared.train, prepared.responses, 1)
    served = Counter()
    for step in range(batches.steps_per_epoch):
        side = batches.batch_at(step).sides["chosen"]
        served.update(prepared.train.examples[i].row_id for i in side.example_index[side.valid])
    assert served == Counter(f"{written.path}:{number}" for number in written.good)


def test_a_run_on_damaged_rows_is_the_run_on_the_good_ones(tmp_path, tokenizer_folder):
    written = write_lines(tmp_path / "rows.jsonl", 200, megabyte=SMALL_MEGABYTE)
    lines = written.path.read_bytes().split(b"\n")
    clean = tmp_path / "clean.jsonl"
    clean.write_bytes(b"\n".join(lines[number - 1] for number in written.good))
    runs = [
        train.run(configured(path, tmp_path / path.stem, tokenizer_folder, **{"data.on_bad_row": mode})).run_dir
        for path, mode in ((written.path, "skip"), (clean, "error"))
    ]
    damaged, whole = (without_timings(metric_lines(run)) for run in runs)
    assert damaged == whole
    assert [line["step"] for line in damaged] == [1, 2, 3]


def test_prompts_that_the_template_refuses_are_counted(tmp_path, tokenizer_folder, capsys):
    import shutil

    folder = shutil.copytree(tokenizer_folder, tmp_path / "strict")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    answers = {"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "d"}]}
    rows = [{"prompt": turns[-number:], **answers} for number in (1, 2, 1, 2, 1, 1)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prepared = prepare(configured(path, tmp_path / "run", folder), Reporter())
    assert numbers(prepared.train.examples) == [1, 3, 5, 6]
    reason = "the tokenizer's chat template refuses the messages"
    assert f"2 examples that cannot be tokenised skipped\n  2  {reason}, first {path}:2\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"^{path}:2: {reason}: roles system, user: no system. 2 of 6 examples "):
        prepare(configured(path, tmp_path / "run", folder, **{"data.on_bad_row": "error"}), Reporter())


# Memory

READ = """
import sys
from rpo_jax.data.examples import make_examples
from rpo_jax.data.sources import read_rows

def high_water_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = high_water_bytes()
found = make_examples(read_rows(sys.argv[1]), on_bad_row="skip")
print(high_water_bytes() - before, len(found.examples))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark that Linux keeps")
@pytest.mark.parametrize(("rows", "name"), [(4000, "rows.jsonl"), pytest.param(100_000, "rows.jsonl.gz", marks=MANY)])
def test_memory_is_that_of_the_good_rows(tmp_path, rows, name):
    written = write_lines(tmp_path / name, rows)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(written.path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(train.__file__).parents[1],
    )
    grown, examples = map(int, done.stdout.split())
    size = written.path.stat().st_size
    print(f"{rows} rows, {size / 2**20:.0f} MiB: {grown / 2**20:.0f} MiB for {written.good_bytes / 2**20:.0f} MiB")
    assert examples == len(written.good)
    # Strings and their objects; the rows that the layout is told by; one row being parsed.
    assert grown < 1.2 * written.good_bytes + 1000 * examples + 64 * 2**20


def test_what_a_template_would_get_too_deep_is_named():
    """Rows may nest as deep as JSON is read; functions that call themselves would end on it."""
    deep = json.loads("[" * 300 + "]" * 300)
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for column, value in (("tools", [{"a": deep}]), ("chat_template_kwargs", {"a": deep})):
        found = make_examples([Row(row, "file", 1), Row({**row, column: value}, "file", 2)], on_bad_row="skip")
        assert [example.row_id for example in found.examples] == ["file:1"]
        assert found.faults.first.reason.startswith(f"column '{column}' is nested too deep: ")


def test_a_compressed_document_that_grows_as_no_text_does_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "FREE_BYTES", 2**20)
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[" + b"[]," * 2**22 + b"[]]"))
    with pytest.raises(ValueError, match=r"rows.json.gz grows to more than [\d.]+ MiB when it is decompressed"):
        list(read_rows(str(path)))
    path.write_bytes(gzip.compress(json.dumps(preference_rows(500)).encode()))
    assert len(list(read_rows(str(path)))) == 500, "what data looks like is read"
    monkeypatch.setattr(lines, "FREE_BYTES", 2**60)
    assert len(list(read_rows(str(path)))) == 500, "memory is taken as it is read"
