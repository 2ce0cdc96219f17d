import gzip
import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from rpo_jax.core.records import Row
from rpo_jax.data import sources
from rpo_jax.data.faults import BadRow

RECORDS = [
    {"prompt": "Où?", "chosen": "Là.", "rejected": "Ici."},
    {"prompt": "q2", "chosen": "a", "rejected": "b"},
    {"prompt": "q3", "chosen": "c", "rejected": "d"},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def read_rows(path, **options):
    return list(sources.read_rows(path, **options))


def write(path, content):
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def values(rows):
    assert all(isinstance(row, Row) for row in rows)
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.v1.jsonl", LINES),
        ("rows.json", json.dumps(RECORDS, indent=2)),
        ("rows.json", json.dumps({"version": 1, "data": RECORDS})),
        ("rows.json", LINES),
        ("ROWS.JSONL", LINES),
    ],
)
def test_json_files_give_their_records_in_order(tmp_path, name, content, suffix):
    path = write(tmp_path / (name + suffix), content)
    rows = read_rows(path)
    assert values(rows) == RECORDS
    assert [row.row_id for row in rows] == [f"{path}:{number}" for number in (1, 2, 3)]


def test_a_json_file_of_one_line_is_one_record(tmp_path):
    assert values(read_rows(write(tmp_path / "one.json", json.dumps(RECORDS[0])))) == RECORDS[:1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    raw = b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()
    assert values(read_rows(write(tmp_path / name, raw))) == RECORDS


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = write(tmp_path / "rows.jsonl", "\n" + LINES.replace("\n", "\n \n"))
    assert [row.row_id for row in read_rows(path)] == [f"{path}:{line}" for line in (2, 4, 6)]


def test_parquet_round_trip(tmp_path):
    records = [
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        {"chosen": None, "label": False},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    rows = read_rows(path)
    assert values(rows) == records
    assert [row.row_id for row in rows] == [f"{path}:1", f"{path}:2"]


def test_a_tables_padding_of_calls_and_tools_is_no_part_of_them(tmp_path):
    import datasets

    def turn(name, **arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        }

    records = [{"chosen": [turn("f", a=1)], "tools": [{"name": "f", "more": {"x": 1}}]}]
    records += [{"chosen": [turn("g", b=[{"c": 2}, {"d": 3}])], "tools": [{"name": "g", "more": {"y": 1}}]}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "arrow")
    for name in ("rows.parquet", "arrow"):
        assert values(read_rows(tmp_path / name)) == records


def test_arrow_folder_round_trip_and_its_splits(tmp_path):
    import datasets

    train, test = datasets.Dataset.from_list(RECORDS[:2]), datasets.Dataset.from_list(RECORDS[2:])
    train.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "splits")
    assert values(read_rows(tmp_path / "single")) == RECORDS[:2]
    rows = read_rows(tmp_path / "splits", split="test")
    assert values(rows) == RECORDS[2:]
    assert rows[0].row_id == f"{tmp_path / 'splits'}[test]:1"
    with pytest.raises(ValueError, match=r"splits has no split 'dev'; it has train, test"):
        read_rows(tmp_path / "splits", split="dev")


def test_an_arrow_folder_that_is_damaged_or_holds_no_rows_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"chosen": []}).save_to_disk(tmp_path / "none")
    (tmp_path / "damaged").mkdir()
    write(tmp_path / "damaged" / "state.json", "{}")
    for name in ("none", "damaged"):
        with pytest.raises(ValueError, match=rf"{name} is no readable Arrow folder"):
            read_rows(tmp_path / name)


def test_a_folder_is_its_files_in_name_order(tmp_path):
    write(tmp_path / "b.json", json.dumps(RECORDS[1:]))
    write(tmp_path / "a.jsonl.gz", LINES)
    write(tmp_path / "README.md", "not data")
    write(tmp_path / "dataset_info.json", '{"mine": {"file_name": "b.json"}}')  # LLaMA-Factory's
    write(tmp_path / ".hidden.jsonl", "{")
    rows = read_rows(tmp_path)
    assert values(rows) == RECORDS + RECORDS[1:]
    assert rows[3].row_id == f"{tmp_path / 'b.json'}:1"


def test_the_split_of_a_shard_is_all_that_stands_before_its_number(tmp_path):
    for name, record in zip(("train_sft", "train_prefs", "ours-test_prefs"), RECORDS, strict=True):
        write(tmp_path / f"{name}-00000-of-00001.jsonl", json.dumps(record))
    assert values(read_rows(tmp_path, split="train_prefs")) == [RECORDS[1]]
    assert values(read_rows(tmp_path, split="test_prefs")) == [RECORDS[2]]
    with pytest.raises(ValueError, match=r"no file of the split 'train': it holds .*train_prefs.*; set the split"):
        read_rows(tmp_path)
    write(tmp_path / "ours_train-00000-of-00001.jsonl", json.dumps(RECORDS[0]))
    assert values(read_rows(tmp_path)) == [RECORDS[0]]
    for number, end in enumerate(("", "-a1b2c3d4e5f60718")):  # the hub's older names end in a hash
        (tmp_path / f"parts{number}").mkdir()
        write(tmp_path / f"parts{number}" / f"train-part-00000-of-00001{end}.jsonl", json.dumps(RECORDS[1]))
        write(tmp_path / f"parts{number}" / f"train_sft-00000-of-00001{end}.jsonl", json.dumps(RECORDS[0]))
        assert values(read_rows(tmp_path / f"parts{number}")) == [RECORDS[1]]


def test_a_folder_with_train_and_test_files_is_read_by_split(tmp_path):
    for name, record in zip(("train-00000", "test_prefs", "contest"), RECORDS, strict=True):
        write(tmp_path / f"{name}.jsonl", json.dumps(record))
    assert values(read_rows(tmp_path)) == [RECORDS[2], RECORDS[0]]
    assert values(read_rows(tmp_path, split="test")) == [RECORDS[2], RECORDS[1]]
    (tmp_path / "contest.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no file of the split 'validation': it holds test_prefs.jsonl, train"):
        read_rows(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', r"broken JSON: Expecting ',' delimiter at column \d+"),
        (b"nonsense", "broken JSON: Expecting value at column 1"),
        (b"[1, 2]", "not a JSON object: got list"),
        (b"null", "not a JSON object: got NoneType"),
        (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 11 of the line"),
        (b"[" * 100_000, "broken JSON: .*recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: .*digits"),
    ],
)
def test_an_unreadable_line_is_a_bad_row_between_good_ones(tmp_path, line, reason):
    first, *rest = LINES.encode().splitlines()
    path = write(tmp_path / "rows.jsonl", b"\n".join([first, line, *rest]))
    rows = read_rows(path)
    bad = rows.pop(1)
    assert values(rows) == RECORDS
    assert isinstance(bad, BadRow)
    assert bad.row_id == f"{path}:2"
    assert re.match(reason, bad.reason)


def test_an_element_that_is_no_object_is_a_bad_row(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps([RECORDS[0], 3]))
    assert read_rows(path)[1] == BadRow(f"{path}:2", "not a JSON object: got int")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"rows.jsonl is empty"),
        ("rows.jsonl", b"\n\n", r"rows.jsonl is empty"),
        ("rows.json", b" ", r"rows.json is empty"),
        ("rows.json", b"[]", r"rows.json is empty"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', r"rows.json:2: broken JSON: Expecting value at column 8"),
        ("rows.json", b'[{"a": 1},\n {"a": "\xff"}]', r"rows.json:2: not UTF-8: byte 0xff"),
        ("rows.json", b"[" * 100_000, r"rows.json is broken JSON: .*recursion"),
        ("rows.json", b'{"rows": [\n]}', r"neither a list of objects nor"),
        ("rows.json", b'{"data": {"a": 1}}', r"neither a list of objects nor"),
        ("rows.json", b"3", r"neither a list of objects nor"),
        (
            "rows.json",
            b'{"prompt": {"0": "a", "1": "b"}, "chosen": {"0": "c", "1": "d"}}',
            r"is a table column by column",
        ),
        (
            "rows.json",
            b'{"prompt": ["a", "b"],\n"chosen": ["c", "d"]}',
            r"column by column; .* to_json\(orient='records'",
        ),
        ("rows.xlsx", b"a,b\n", r"unknown suffix '.xlsx'; rows are read from .jsonl, .jsonl.gz, .json"),
        ("rows.pkl", b"\x80\x04N.", r"unknown suffix '.pkl'"),
        ("rows", b"{}", r"unknown suffix ''"),
        ("rows.parquet", b"PAR1 no more", r"rows.parquet is no readable Parquet file"),
        ("rows.parquet", b"", r"rows.parquet is no readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_truncated_or_uncompressed_gzip_file_is_named(tmp_path, name):
    whole = gzip.compress(json.dumps(RECORDS * 50).encode())
    for content in (whole[:-20], whole[:60] + b"\xff" * 40 + whole[100:], LINES.encode()):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is truncated or no gzip file"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize("path", ["missing.jsonl", "owner/missing.jsonl", "word", "/no/such/place", "a/b/c"])
def test_a_missing_file_is_named_with_the_kinds_that_can_be_read(path):
    with pytest.raises(ValueError, match=rf"no such file: data path '{path}' .*\.jsonl.*owner/name"):
        read_rows(path)


def test_a_folder_without_data_is_named(tmp_path):
    write(tmp_path / "notes.txt", "")
    with pytest.raises(ValueError, match=r"holds no data files"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-data.v1", "nobody/no-such-data:part"])
def test_a_hub_out_of_reach_is_a_readable_error(monkeypatch, name):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"'{name}' is no local file or folder, and split 'train' .*; check"):
        read_rows(name)


def test_a_hub_name_goes_through_load_dataset_with_its_configuration(tmp_path, monkeypatch):
    import datasets

    repository = tmp_path / "source" / "owner" / "name"
    repository.mkdir(parents=True)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    write(repository / "README.md", f"---\nconfigs:\n{configs}---\n")
    write(repository / "one.jsonl", json.dumps(RECORDS[0]))
    write(repository / "two.jsonl", json.dumps(RECORDS[1]))
    load = datasets.load_dataset  # reads a local repository as one of the hub
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split: load(
            str(tmp_path / "source" / name), config, split=split, cache_dir=str(tmp_path / "cache")
        ),
    )
    rows = read_rows("owner/name:two")
    assert values(rows) == RECORDS[1:2]
    assert rows[0].row_id == "owner/name:two[train]:1"
    with pytest.raises(ValueError, match=r"'owner/name:three' .* split 'train' .*three"):
        read_rows("owner/name:three")
    with pytest.raises(ValueError, match=r"split 'dev' of the hub data set .*dev"):
        read_rows("owner/name:one", split="dev")
