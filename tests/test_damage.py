"""Checkpoints, caches and exports that are damaged or do not fit on the disk: noticed, told, and done without."""

import contextlib
import errno
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import rpo_jax
from rpo_jax import export, models, train
from rpo_jax.core.manifest import NAME, fault, write_manifest
from rpo_jax.core.store import ByProduct
from rpo_jax.data import embeddings
from rpo_jax.runs.checkpoints import Checkpoints, SaveFailed, _why, faults, set_aside_damaged, step_fault
from rpo_jax.runs.folder import CHECKPOINTS
from rpo_jax.training.reference import FOLDER, cached_log_probs, read_cache, write_cache
from tests.disks import filled, small_files
from tests.runs import configured, metric_lines, settings, without_timings, write_rows
from tests.test_reference import BOTH, PARTS, made_up
from tests.worlds import random_data

# The storage's threads that a failed save leaves behind find their event loop closed, which is told of here alone.
leaves_threads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOM = 4 << 10  # bytes of a file that a full disk still takes here


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def deleted(path):
    path.unlink()


DAMAGES = {"truncated": truncated, "bit-flipped": flipped, "deleted": deleted}


def state_of(step, size=3000):
    return {"x": np.random.default_rng(step).normal(size=size).astype(np.float32), "count": np.full(1, step)}


def saved(folder, steps, **options):
    checkpoints = Checkpoints(folder, keep_last=9, **options)
    for step in steps:
        checkpoints.save(step, state_of(step), {"num_tokens": step}, 0.5)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two"), (1, 2))


def read(folder, step):
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return checkpoints.restore(step, state_of(0)), checkpoints.record(step)


def assert_is(folder, step):
    state, record = read(folder, step)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert record == {"num_tokens": step}


def test_every_file_of_a_checkpoint_has_a_checksum(two):
    recorded = json.loads((two / "2" / NAME).read_text())["files"]
    there = {path.relative_to(two / "2").as_posix() for path in (two / "2").rglob("*") if path.is_file()}
    # The storage's own note of when it was done, and that it was done, come last.
    assert there - set(recorded) <= {NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert {name.split("/")[0] for name in recorded} == {"state", "record", "metrics"}
    assert faults(two) == {}
    assert_is(two, 2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_found_and_named(two, tmp_path, damage):
    for path in sorted((two / "2").rglob("*")):
        if not path.is_file():
            continue
        folder = shutil.copytree(two, tmp_path / "copy")
        name = path.relative_to(two / "2").as_posix()
        DAMAGES[damage](folder / "2" / name)
        reason = step_fault(folder / "2")
        if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert reason is None
            assert_is(folder, 2)
        else:
            assert reason is not None
            assert name.split("/")[-1] in reason or name == NAME, "a checksum that is wrong is told as its file's"
            said = []
            set_aside_damaged(folder, said.append)
            assert len(said) == 1
            assert "step 2" in said[0]
            assert reason in said[0]
            assert {path.name for path in folder.iterdir()} >= {"1", "damaged-2"}
            with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
                assert checkpoints.steps() == [1]
            assert_is(folder, 1)
        shutil.rmtree(folder)


def test_none_left_is_an_error_and_nothing_is_touched(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    for step in (1, 2):
        truncated(folder / str(step) / "state" / "manifest.ocdbt")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=r"No checkpoint in .*step 2: .*bytes, not .*step 1: .*--overwrite"):
        set_aside_damaged(folder, print)
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder / "1")
    (folder / "2").rename(folder / "damaged-2")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be used"):
        set_aside_damaged(folder, print)


def test_a_checkpoint_from_before_there_were_checksums_is_used(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    (folder / "2" / NAME).unlink()
    assert step_fault(folder / "2") == f"{NAME} is missing"
    record = folder / "2" / "record" / "metadata"
    record.write_text(json.dumps({"num_tokens": 2}))
    assert step_fault(folder / "2") is None
    assert_is(folder, 2)


def test_a_damaged_step_is_refused_by_name_and_passed_over_as_the_newest(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "copy")
    (data,) = [path for path in (folder / "2" / "state").rglob("*") if path.is_file() and path.stat().st_size > 9000]
    flipped(data)
    warned = []
    with contextlib.closing(Checkpoints(folder, read_only=True, warn=warned.append)) as checkpoints:
        assert checkpoints.newest_whole() == 1
        with pytest.raises(ValueError, match=r"2 cannot be read, as it is damaged: .* there are also 1"):
            checkpoints.restore_params(2, {})
    (line,) = warned
    assert f"{data.name} does not match its checksum" in line


def test_a_manifest_that_names_other_folders_files_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "a" / "file").write_text("y")
    write_manifest(tmp_path / "a")
    assert fault(tmp_path / "a") is None
    for name in ("../secret", str(tmp_path / "secret")):
        (tmp_path / "a" / NAME).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
        assert "not in the folder" in str(fault(tmp_path / "a"))
    for content in ("[]", "{", '{"files": 3}', '{"files": {"file": 3}}', '{"files": {"file": {"bytes": "x"}}}'):
        (tmp_path / "a" / NAME).write_text(content)
        assert "cannot be used" in str(fault(tmp_path / "a"))


# Full disks. RLIMIT_FSIZE refuses what goes over a size with EFBIG, for every user; a small tmpfs is full for real.


def assert_a_full_disk_costs_that_save_alone(folder, full):
    warned = []
    checkpoints = Checkpoints(folder, keep_last=1, warn=warned.append)
    checkpoints.save(1, state_of(1, 30_000), {"num_tokens": 1})
    checkpoints.wait()
    with full:
        checkpoints.save(2, state_of(2, 30_000), {"num_tokens": 2})
        checkpoints.settle()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state_of(3, 30_000), {"num_tokens": 3})
    checkpoints.wait()
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []
    (line,) = warned
    assert line.startswith("the checkpoint of step 2 was not saved: ")
    assert line.endswith("the newest checkpoint is that of step 1")
    assert checkpoints.steps() == [3], "the older one is removed as ever"
    checkpoints.close()
    assert faults(folder) == {}
    with contextlib.closing(Checkpoints(folder, read_only=True)) as again:
        jax.tree.map(np.testing.assert_array_equal, again.restore(3, state_of(0, 30_000)), state_of(3, 30_000))


@leaves_threads
def test_a_file_that_the_disk_refuses_costs_that_save_alone(tmp_path):
    assert_a_full_disk_costs_that_save_alone(tmp_path / "checkpoints", small_files(ROOM))


@leaves_threads
def test_a_disk_that_is_full_costs_that_save_alone(disk_of):
    tmpfs = disk_of("2m")
    assert_a_full_disk_costs_that_save_alone(tmpfs / "checkpoints", filled(tmpfs))


@leaves_threads
def test_the_last_save_failing_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, state_of(1, 30_000), {"num_tokens": 1})
    checkpoints.wait()
    with small_files(ROOM):
        checkpoints.save(2, state_of(2, 30_000), {"num_tokens": 2})
        with pytest.raises(SaveFailed, match=r"step 2 was not saved: .*the newest checkpoint is that of step 1"):
            checkpoints.wait()
    checkpoints.close()
    assert faults(tmp_path) == {}
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as again:
        assert again.steps() == [1]


# Whole runs.

RUN = {
    "contrast.weights": "uniform",
    "tracking.tensorboard": False,
    "train.steps": 6,
    "train.save_every": 2,
    "train.keep_best": 0,
}


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.data = write_rows(folder / "pairs.jsonl")

    def run(self, name, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return rpo_jax.run(configured(self.data, self.folder / name, self.cache, {**RUN, **changes}))

    def main(self, name, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        words = settings(self.data, self.folder / name, self.cache, {**RUN, **changes})
        return train.main([f"--{word}" for word in words])

    def params(self, name):
        shapes = models.abstract_params(models.read_config(self.folder / name / "model"))
        folder = self.folder / name / CHECKPOINTS
        with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
            return checkpoints.restore_params(6, shapes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.run("whole")
    return world


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_save_says_what_the_disk_refused_and_not_that_a_process_waited(tmp_path):
    def commit():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise TimeoutError("DEADLINE_EXCEEDED: Barrier timed out")

    with pytest.raises(TimeoutError) as caught:
        commit()
    assert f"{tmp_path} cannot be written: No space left on device" in _why(caught.value, tmp_path)
    assert _why(TimeoutError("it took\nlong"), tmp_path) == "it took long"


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[] if name == "truncated" else [pytest.mark.slow]) for name in DAMAGES]
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(world, damage, capsys):
    world.run(damage, train__steps=4)
    folder = world.folder / damage / CHECKPOINTS
    victim = largest(folder / "4")
    DAMAGES[damage](victim)
    capsys.readouterr()
    world.run(damage, run__resume="auto")
    said = capsys.readouterr().out
    assert "the checkpoint of step 4 is damaged and not used: " in said
    assert victim.name in said
    assert "resuming after step 2 of 6" in said
    assert (folder / "damaged-4").is_dir()
    jax.tree.map(np.testing.assert_array_equal, world.params(damage), world.params("whole"))
    trained = [
        [line for line in without_timings(metric_lines(world.folder / name)) if "loss" in line]
        for name in (damage, "whole")
    ]
    assert trained[0] == trained[1]


def test_a_run_without_a_whole_checkpoint_says_so_and_keeps_all(world, capsys):
    world.run("none", train__steps=4)
    for step in ("2", "4"):
        flipped(largest(world.folder / "none" / CHECKPOINTS / step))
    before = sorted((world.folder / "none").rglob("*"))
    capsys.readouterr()
    assert world.main("none", run__resume="auto") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: No checkpoint in ")
    assert "step 4: the content of" in line
    assert sorted((world.folder / "none").rglob("*")) == before
    assert world.main("none", run__overwrite=True) == 0


@pytest.mark.slow
def test_an_export_of_a_damaged_checkpoint_takes_the_one_before(world, tmp_path, capsys, caplog):
    world.run("damaged")
    flipped(largest(world.folder / "damaged" / CHECKPOINTS / "6"))
    run, out = str(world.folder / "damaged"), str(tmp_path / "hf")
    assert export.main(["--run", run, "--out", out, "--step", "6"]) == 2
    assert "is damaged: the content of" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    with caplog.at_level(logging.WARNING):
        assert export.main(["--run", run, "--out", out]) == 0
    assert "6 is damaged and not used: the content of" in caplog.text
    assert export.main(["--run", run, "--out", str(tmp_path / "four"), "--step", "4"]) == 0
    four, taken = (models.load_pretrained(tmp_path / name)[1] for name in ("four", "hf"))
    jax.tree.map(np.testing.assert_array_equal, four, taken)


def refuse_saves(monkeypatch, *steps):
    """The disk takes no large file while these steps are saved."""
    save = Checkpoints.save

    def saving(checkpoints, step, *arguments):
        checkpoints.settle()
        with small_files(ROOM) if step in steps else contextlib.nullcontext():
            save(checkpoints, step, *arguments)
            checkpoints.settle()

    monkeypatch.setattr(Checkpoints, "save", saving)


@leaves_threads
def test_a_run_trains_on_when_a_checkpoint_does_not_fit(world, monkeypatch, capsys):
    refuse_saves(monkeypatch, 4)
    result = world.run("full")
    said = capsys.readouterr().out
    assert "the checkpoint of step 4 was not saved: " in said
    assert "training goes on, the newest checkpoint is that of step 2" in said
    assert result.checkpoint.name == "6"
    assert faults(result.checkpoint.parent) == {}
    jax.tree.map(np.testing.assert_array_equal, world.params("full"), world.params("whole"))


@pytest.mark.slow
@leaves_threads
def test_a_run_whose_last_checkpoint_does_not_fit_ends_with_an_error(world, monkeypatch, capsys):
    refuse_saves(monkeypatch, 6)
    assert world.main("full at last") == 2
    assert "error: the checkpoint of step 6 was not saved: " in (said := capsys.readouterr().err)
    assert "the newest checkpoint is that of step 4" in said
    monkeypatch.undo()
    world.run("full at last", run__resume="auto")
    jax.tree.map(np.testing.assert_array_equal, world.params("full at last"), world.params("whole"))


def test_an_export_that_does_not_fit_leaves_the_earlier_one(world, tmp_path, capsys):
    run, out = str(world.folder / "whole"), tmp_path / "hf"
    assert export.main(["--run", run, "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    capsys.readouterr()
    with small_files(ROOM):
        assert export.main(["--run", run, "--out", str(out), "--overwrite"]) == 2
        assert export.main(["--run", run, "--out", str(tmp_path / "new")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Caches.


def foreign(path):
    save_file({"log_probs": np.zeros(3, np.float32)}, path)


def emptied(path):
    path.write_bytes(b"")


CACHE_DAMAGES = {**DAMAGES, "foreign": foreign, "empty": emptied}


def test_a_bit_flipped_anywhere_in_a_file_of_reference_log_probs_is_found(tmp_path):
    path = tmp_path / "cache.safetensors"
    parts = {**PARTS, "format": "f", "response": "chosen", "tokens": "t"}
    write_cache(path, parts, np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(read_cache(path, parts, 5), np.arange(5, dtype=np.float32))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert read_cache(path, parts, 5) is None, place


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_reference_log_probs_are_computed_again_where_their_file_is_damaged(tmp_path, damage, caplog):
    data = random_data(20)
    said, asked = [], []

    def compute(missing):
        asked.append(missing)
        return made_up(data, missing)

    def get():
        return cached_log_probs(data, BOTH, PARTS, tmp_path, compute, said.append)

    first, _ = get()
    for path in (tmp_path / FOLDER).iterdir():
        CACHE_DAMAGES[damage](path)
        with caplog.at_level(logging.WARNING):
            again, (name,) = get()
        assert asked[-1] == (name,)
        np.testing.assert_array_equal(again.reference_log_probs, first.reference_log_probs)
        if damage != "deleted":
            assert f"{path} are computed again" in caplog.text
    assert get()[1] == (), "what was written again is whole"


ROWS = {bytes([i]) * 32: np.full(8, i, np.float32) for i in range(5)}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_embeddings_are_left_out_where_their_file_is_damaged(tmp_path, damage, caplog):
    store = tmp_path / "store"
    embeddings._write_file(store, ROWS, "print")
    assert set(embeddings._read_store(store, "print")) == set(ROWS)
    (path,) = store.iterdir()
    CACHE_DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert embeddings._read_store(store, "print") == {}
    if damage != "deleted":
        assert f"{path} are computed again" in caplog.text
    embeddings._write_file(store, ROWS, "print")
    assert set(embeddings._read_store(store, "print")) == set(ROWS)


def test_embeddings_of_another_encoder_are_no_embeddings(tmp_path, caplog):
    embeddings._write_file(tmp_path / "store", ROWS, "another")
    with caplog.at_level(logging.WARNING):
        assert embeddings._read_store(tmp_path / "store", "print") == {}
    assert "not {'rpo_jax.embeddings.1': 'print'}" in caplog.text


def test_caches_that_do_not_fit_are_done_without(tmp_path, caplog):
    rows = {key: np.zeros(4 * ROOM, np.float32) for key in ROWS}
    data = random_data(ROOM)
    with small_files(ROOM), caplog.at_level(logging.WARNING):
        ByProduct("Embeddings").write(lambda: embeddings._write_file(tmp_path / "store", rows, "print"))
        filled_in, _ = cached_log_probs(data, BOTH, PARTS, tmp_path, lambda names: made_up(data, names), print)
    for what, folder, times in (("Embeddings", tmp_path / "store", 1), ("Reference log-probs", tmp_path / FOLDER, 1)):
        assert caplog.text.count(f"{what} are not kept: {folder}/") == times, "a kind is told of once"
    assert caplog.text.count("cannot be written: File too large; raise the limit of file sizes (ulimit -f)") == 2
    assert np.isfinite(filled_in.reference_log_probs).all()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
