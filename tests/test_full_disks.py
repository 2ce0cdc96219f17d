"""Disks that are full, read-only or gone: told once with path and remedy, nothing hangs, and what can go on does."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rpo_jax
from rpo_jax.config import TrackingConfig
from rpo_jax.core import files
from rpo_jax.core.files import WriteFailed, atomic_directory, atomic_write, check_writable
from rpo_jax.core.jsonl import GrowingFile
from rpo_jax.data import embeddings
from rpo_jax.runs import loggers
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.tools.judging.cache import AnswerCache, JudgeAnswer
from tests.disks import filled, gone, small_files
from tests.processes import REPOSITORY
from tests.runs import configured, metric_lines, write_rows

FULL = "cannot be written: No space left on device; free some room there"
TOO_LARGE = "cannot be written: File too large; raise the limit of file sizes (ulimit -f)"
ROOM = 4 << 10


# What is written whole.


@pytest.mark.parametrize("content", ["x" * (2 * ROOM), b"x" * (2 * ROOM)])
def test_a_file_names_its_path_and_what_to_do(tmp_path, content):
    with small_files(ROOM), pytest.raises(WriteFailed) as refused:
        atomic_write(tmp_path / "report.html", content)
    assert str(refused.value) == f"{tmp_path / 'report.html'} {TOO_LARGE}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_names_its_path_and_what_to_do(tmp_path):
    with (
        small_files(ROOM),
        pytest.raises(WriteFailed) as refused,
        atomic_directory(tmp_path / "hf", overwrite=True) as new,
    ):
        (new / "model.safetensors").write_bytes(bytes(2 * ROOM))
    assert str(refused.value) == f"{tmp_path / 'hf'} {TOO_LARGE}"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocabulary"), atomic_directory(tmp_path / "hf", overwrite=True) as new:
        shutil.copyfile(tmp_path / "vocabulary", new / "vocabulary")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),  # safetensors
        (ValueError("RESOURCE_EXHAUSTED: ... [source: os_error_code='28' ...]"), FULL),  # tensorstore
        (OSError("OSError: [Errno 30] Read-only file system: '/cache/x'"), "Read-only file system; mount that disk"),
        (OSError(116, "Stale file handle"), "Stale file handle; see that its disk is still there"),
    ],
)
def test_every_library_s_words_give_the_same_line(error, told):
    assert told in str(files.refusal("/run/a", error))
    assert files.refusal("/run/a", ValueError("no number 7 is here")) is None


def test_a_read_only_disk_is_told(disk_of):
    disk = disk_of("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for check in (lambda: check_writable(disk / "run" / "below"), lambda: atomic_write(disk / "a", "x")):
        with pytest.raises(WriteFailed, match="cannot be written: Read-only file system; mount that disk for writing"):
            check()


def test_an_address_is_no_folder():
    with pytest.raises(ValueError, match="gs:/bucket/run is an address, not a folder; mount the bucket"):
        check_writable(pathlib.Path("gs://bucket/run"))


def test_a_full_disk_is_told(disk_of):
    disk = disk_of("1m")
    with filled(disk, 0), pytest.raises(WriteFailed, match=FULL):
        check_writable(disk / "run")
    check_writable(disk / "run")
    assert list(disk.iterdir()) == []


# What grows.


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("refusing", "reason"), [(None, TOO_LARGE), (gone, "see that its disk is still there")])
def test_lines_wait_until_the_disk_takes_them(tmp_path, refusing, reason):
    folder, said = tmp_path / "run", []
    folder.mkdir()
    file = GrowingFile(folder / "lines.jsonl", said.append)
    rows = [{"number": number, "text": "x" * 1500} for number in range(6)]
    file.add(rows[0])
    with small_files(ROOM) if refusing is None else refusing(folder):
        for row in rows[1:5]:
            file.add(row)
        file.flush(lasting=True)
        assert file.fault is not None
    on_disk = folder.joinpath("lines.jsonl").read_bytes()
    assert on_disk.endswith(b"\n"), "no half line"
    file.add(rows[5])
    assert rows_of(folder / "lines.jsonl") == rows
    assert file.fault is None
    assert len(said) == 2
    assert said[0].startswith(f"{folder / 'lines.jsonl'} cannot be written: ")
    assert reason in said[0]
    assert said[1] == f"{folder / 'lines.jsonl'} is written again, with the lines that had to wait"


def log_steps(run_dir, refusing, said):
    """Log 100 steps, of which the disk refuses those from the eleventh to the sixtieth."""
    log = MetricsLog(run_dir, TrackingConfig(), 0, "id", {}, say=said.append)
    for step in range(1, 11):
        log.write({"step": step, **{f"metric/{i}": float(step) for i in range(40)}})
    with refusing:
        for step in range(11, 61):
            log.write({"step": step, **{f"metric/{i}": float(step) for i in range(40)}})
    for step in range(61, 101):
        log.write({"step": step, "metric/0": float(step)})
    log.close()


def in_time(work):
    """It ends: what waits for ever does not in half a minute either."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "hangs"


def check_logged(run_dir, said):
    assert [row["step"] for row in rows_of(run_dir / "metrics.jsonl")] == list(range(1, 101))
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert {event.step for event in events.Scalars("metric/0")} >= set(range(61, 101)), "goes on when there is room"
    starts = sorted(line.partition(" ")[0] for line in said)
    assert starts == sorted(["TensorBoard's", "TensorBoard's", *[str(run_dir / "metrics.jsonl")] * 2]), said


@pytest.fixture
def at_once(monkeypatch):
    """What was refused is tried again with the next line, not after half a minute."""
    monkeypatch.setattr(loggers, "FLUSH_SECONDS", 0)


def test_a_full_disk_neither_hangs_tensorboard_nor_loses_a_line(tmp_path, at_once):
    said = []
    in_time(lambda: log_steps(tmp_path, small_files(ROOM), said))
    check_logged(tmp_path, said)


def test_a_disk_of_six_megabytes_neither_hangs_tensorboard_nor_loses_a_line(disk_of, at_once):
    disk, said = disk_of("6m"), []
    in_time(lambda: log_steps(disk, filled(disk, 1), said))
    check_logged(disk, said)
    assert any(FULL in line for line in said)


# Whole runs.

RUN = {
    "contrast.weights": "uniform",
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.num_layers": 1,
    "train.steps": 6,
    "train.save_every": 2,
    "train.eval_every": 2,
    "train.keep_best": 0,
    "train.sample_prompts": 1,
    "train.sample_tokens": 2,
}


class Between(rpo_jax.Hook):
    """Does something to the disk after one step, and undoes it after another."""

    def __init__(self, trouble, first, last=None, saved=None):
        self._trouble, self._first, self._last, self._saved = trouble, first, last, saved

    def after_step(self, run, finished):
        if finished.step == self._first:
            while self._saved is not None and not self._saved.exists():
                time.sleep(0.01)  # it is saved in the background
            self._trouble.__enter__()
        if finished.step == self._last:
            self._trouble.__exit__(None, None, None)


def run_on(disk, tmp_path, hook, **changes):
    data = write_rows(tmp_path / "pairs.jsonl")
    return rpo_jax.run(configured(data, disk / "run", tmp_path / "cache", RUN | changes), hooks=[hook])


def test_a_disk_that_is_full_for_a_while_costs_a_run_nothing(disk_of, tmp_path, capsys):
    disk = disk_of("6m")
    result = run_on(disk, tmp_path, Between(filled(disk, 0), 2, 14), **{"train.steps": 16})
    assert [line["step"] for line in metric_lines(disk / "run") if "loss" in line] == list(range(1, 17))
    assert result.checkpoint.name == "16"
    out = capsys.readouterr().out
    for told in (
        f"{disk / 'run' / 'metrics.jsonl'} {FULL}; its lines wait in memory, and it goes on",
        f"{disk / 'run' / 'metrics.jsonl'} is written again, with the lines that had to wait",
        f"TensorBoard's events are not kept: {disk / 'run' / 'tensorboard'} {FULL}",
        f"Samples are not kept: {disk / 'run' / 'samples.jsonl'} {FULL}",
        "was not saved: ",
    ):
        assert out.count(told) >= 1, told


def test_a_disk_that_stays_full_ends_a_run_in_one_line_with_what_was_saved(disk_of, tmp_path):
    disk = disk_of("6m")
    with pytest.raises(
        OSError, match=rf"step 6 was not saved: {disk}/run/checkpoints/6 {FULL}; the newest.* of step 2"
    ):
        run_on(disk, tmp_path, Between(filled(disk, 0), 3, saved=disk / "run" / "checkpoints" / "2"))


@pytest.mark.slow
def test_lines_that_the_disk_never_took_are_in_the_checkpoint(tmp_path, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"

    @contextlib.contextmanager
    def elsewhere():
        metrics.rename(tmp_path / "aside")
        metrics.symlink_to("/dev/full")
        yield

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(WriteFailed, match=rf"{metrics} {FULL}.* saved in {tmp_path}/run/checkpoints/6"):
        run_on(tmp_path, tmp_path, Between(elsewhere(), 2))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()) == [
        "4",
        "6",
    ]
    metrics.unlink()
    (tmp_path / "aside").rename(metrics)
    assert [row["step"] for row in rows_of(metrics)][-1] < 6
    run_on(tmp_path, tmp_path, rpo_jax.Hook(), **{"run.resume": "auto"})
    written = [(row["step"], "loss" in row) for row in rows_of(metrics)]
    assert len(written) == len(set(written)), "without a double"
    assert [step for step, trained in written if trained] == list(range(1, 7)), "without a gap"


@pytest.mark.slow
def test_a_cache_folder_that_is_deleted_in_mid_run_costs_nothing(tmp_path, capsys):
    class Deleting(rpo_jax.Hook):
        def after_step(self, run, finished):
            if finished.step == 1:  # before the first evaluation and its samples have been compiled
                shutil.rmtree(tmp_path / "cache")

    result = run_on(tmp_path, tmp_path, Deleting(), **{"contrast.weights": "embedding"})
    assert result.checkpoint.name == "6"
    assert [line["step"] for line in metric_lines(tmp_path / "run") if "loss" in line] == list(range(1, 7))
    assert "Traceback" not in capsys.readouterr().err
    run_on(tmp_path, tmp_path, rpo_jax.Hook(), **{"contrast.weights": "embedding", "run.overwrite": True})


def test_a_disk_that_vanishes_ends_a_run_in_one_line_and_nothing_is_saved_where_it_was(disk_of, tmp_path):
    disk = disk_of("6m")

    @contextlib.contextmanager
    def unmounted():
        subprocess.run(["umount", "-l", str(disk)], check=True)
        yield

    with pytest.raises(OSError, match=r"step 6 was not saved: .*; see that its disk is still there"):
        run_on(disk, tmp_path, Between(unmounted(), 3))
    left = {path.name for path in disk.rglob("*") if path.is_file()}
    assert not left & {"metrics.jsonl", "samples.jsonl", "checksums.json"}, "nothing of it on the disk below"


# Caches.

ROWS = {bytes([i]) * 32: np.full(8, i, np.float32) for i in range(5)}


def test_a_damaged_file_that_cannot_be_removed_is_computed_again(tmp_path, caplog):
    embeddings._write_file(tmp_path, ROWS, "print")
    (tmp_path / "damaged.safetensors").mkdir()  # whoever unlinks it is refused, root too
    assert set(embeddings._read_store(tmp_path, "print")) == set(ROWS)
    assert "are computed again" in caplog.text


def test_a_damaged_file_on_a_read_only_disk_is_computed_again(disk_of, caplog):
    disk = disk_of("1m")
    embeddings._write_file(disk, ROWS, "print")
    (disk / "damaged.safetensors").write_bytes(b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert set(embeddings._read_store(disk, "print")) == set(ROWS)
    assert "are computed again" in caplog.text


COMPILES = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from rpo_jax.hosts.compiled import keeping_compiled
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if sys.argv[2] != "whole":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
with keeping_compiled(Path(sys.argv[1]), print):
    for size in (3, 4):
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((size, size)))
"""


def compile_in(folder, limit):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, str(folder), str(limit)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_compiled_programs_that_do_not_fit_are_told_of_once_and_leave_nothing(tmp_path):
    said = compile_in(tmp_path, 512)
    assert said == f"compiled programs are not kept: {tmp_path} {TOO_LARGE}; it goes on without them\n"
    assert [path for path in tmp_path.iterdir() if path.stat().st_size] == []
    assert compile_in(tmp_path, "whole") == ""
    programs = {path: path.read_bytes() for path in tmp_path.glob("*-cache")}
    assert programs
    for path in programs:
        path.write_bytes(programs[path][:100])
    said = compile_in(tmp_path, "whole")
    assert said.startswith(f"compiled programs in {tmp_path} are compiled again: ")
    assert said.count("\n") == 1
    assert {path: len(path.read_bytes()) > 100 for path in tmp_path.glob("*-cache")} == dict.fromkeys(programs, True)
    assert compile_in(tmp_path, "whole") == ""


# The judge's answers.


def test_answers_that_the_disk_refuses_are_known_until_the_end(tmp_path, caplog):
    path = tmp_path / "judge.sqlite"
    cache = AnswerCache(path)
    answers = {f"key {i}": JudgeAnswer("x" * 3000, i, 1) for i in range(9)}
    with small_files(path.stat().st_size):
        for key, answer in answers.items():
            cache.put(key, answer)
        assert {key: cache.get(key) for key in answers} == answers
    assert caplog.text.count("Answers of the judge are not kept: ") == 1
    assert f"{path} cannot be written" in caplog.text
    cache.put("another", JudgeAnswer("", 0, 0))
    cache.close()
    again = AnswerCache(path)
    assert {key: again.get(key) for key in answers} == answers, "what was refused is written with the next"
    again.close()


def test_a_full_or_read_only_disk_keeps_no_judge_from_going_on(disk_of, caplog):
    disk = disk_of("1m")
    path = disk / "judge.sqlite"
    cache = AnswerCache(path)
    cache.put("first", JudgeAnswer("a", 1, 1))
    with filled(disk, 0):
        for i in range(9):
            cache.put(f"key {i}", JudgeAnswer("x" * 3000, i, 1))
        assert cache.get("key 8") == JudgeAnswer("x" * 3000, 8, 1)
    cache.close()
    assert f"{path} {FULL}" in caplog.text
    caplog.clear()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    read_only = AnswerCache(path)
    assert read_only.get("first") == JudgeAnswer("a", 1, 1)
    read_only.put("second", JudgeAnswer("b", 1, 1))
    assert read_only.get("second") == JudgeAnswer("b", 1, 1)
    read_only.close()
    assert f"{path} cannot be written: Read-only file system" in caplog.text


# The console.

TALKS = """
import sys
from rpo_jax.core.command import run_command
from rpo_jax.runs.tracking import Reporter

def work():
    reporter = Reporter()
    for number in range(300):
        reporter.say(f"line {number} " + 80 * "x")
        print(f"printed {number}")
    open(sys.argv[1], "w").close()

raise SystemExit(run_command(work))
"""


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_a_console_that_is_full_or_gone_ends_nothing(tmp_path, reader):
    arguments = [sys.executable, "-c", TALKS, str(tmp_path / "done")]
    if reader == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        status, said = done.returncode, done.stderr
    else:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr:
            said, status = process.stderr.read(), process.wait()
    assert (tmp_path / "done").exists(), said
    assert status == 0, said
    assert said.count("\n") == 1, said
    assert said.startswith("error: standard output cannot be written: ")


def test_a_reporter_of_a_script_outlives_its_console(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        reporter = Reporter()
        for _ in range(3):
            reporter.say("x" * 9000)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().err.count("standard output cannot be written") == 1
