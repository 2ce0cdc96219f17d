"""Kills processes and looks at what they leave, for tests/test_crashes.py; prints what it found as JSON.

    python -m tests.killed run FOLDER KILLS SEED     # a whole run, killed at random instants and resumed each time
    python -m tests.killed writes FOLDER             # whatever writes a file or folder, killed at every file operation

Each process to be killed is a fork of this one, which has imported everything and never starts jax's backend: so a
start takes a second instead of ten.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from rpo_jax import export, models, train
from rpo_jax.config import TrackingConfig
from rpo_jax.core.files import atomic_directory, recover
from rpo_jax.core.locks import one_writer
from rpo_jax.data import embeddings
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.tracking import MetricsLog
from rpo_jax.training.reference import DECISIVE, FOLDER, cache_file_fault, read_cache, write_cache
from tests.runs import metric_lines, settings, without_timings, write_rows

RUN: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.intermediate_size": 16,
    "model.num_layers": 1,
    "contrast.weights": "uniform",
    "tracking.tensorboard": False,
    "train.save_every": 1,
    "train.keep_last": 2,
    "train.keep_best": 0,
    "run.resume": "auto",
}
STEPS_PER_KILL = 4
EXPORT_SHARE = 8  # every eighth kill hits an export
FAULT = 9  # status of a process that found something wrong
PATIENCE_SECONDS = 600


def forked(work: Callable[[], int | None], said: Path) -> int:
    """Process id of a fork that does this and ends with its status; what it says goes to a file."""
    process_id = os.fork()
    if process_id:
        return process_id
    status = FAULT
    try:
        with said.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(process_id: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


class KilledRun:
    """One run, and what is known of it without reading its checkpoints."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.run_dir, self.out = folder, folder / "run", folder / "hf"
        self.said, self.rng = folder / "said", random.Random(seed)
        self.steps, self.kills = STEPS_PER_KILL * kills, kills
        self.data = write_rows(folder / "pairs.jsonl")
        self.phases: Counter[str] = Counter()
        self.start_seconds, self.step_seconds = 2.0, 0.2

    def arguments(self, run_dir: Path, changes: dict[str, Any]) -> list[str]:
        changes = {**RUN, "train.steps": self.steps, **changes}
        return [f"--{setting}" for setting in settings(self.data, run_dir, self.folder / "cache", changes)]

    def logged(self) -> int:
        """Steps that its log has."""
        with contextlib.suppress(OSError):
            return (self.run_dir / "metrics.jsonl").read_text().count('"loss":')
        return 0

    def unfinished(self) -> set[int]:
        """Saves that were begun."""
        return {_inode(path) for path in (self.run_dir / "checkpoints").glob("*tmp*")} - {0}

    def check(self) -> None:
        """Everything that is listed can be read; in a process of its own, or before the run's clock starts."""
        checkpoints = Checkpoints(self.run_dir / "checkpoints", read_only=True)
        for step in checkpoints.steps():
            assert checkpoints.record(step)["num_tokens"] > 0
            self.params(checkpoints, step)
        checkpoints.close()
        for file in (self.folder / "cache" / FOLDER).glob("*.safetensors"):
            assert (fault := cache_file_fault(file)) is None, fault

    def params(self, checkpoints: Checkpoints, step: int) -> Any:
        config = models.read_config(self.run_dir / "model")
        return checkpoints.restore_params(step, models.abstract_params(config))

    def killed_once(self) -> bool:
        """Start or resume the run and kill it; whether it was killed before it finished."""
        ready, tell = os.pipe()

        def work() -> int:
            self.check()
            os.write(tell, b"r")
            return train.main(self.arguments(self.run_dir, {}))

        process_id = forked(work, self.said)
        os.close(tell)
        assert os.read(ready, 1) == b"r", self.said.read_text()[-3000:]
        os.close(ready)
        before, started, stale = self.logged(), time.monotonic(), self.unfinished()
        nearly_done = before > self.steps - 3 * STEPS_PER_KILL
        if nearly_done or self.rng.random() < 0.3:  # anywhere on the way to its first step
            time.sleep(self.rng.uniform(0, 0.9 * self.start_seconds))
        else:  # anywhere in its next steps and saves
            log, deadline = self.run_dir / "metrics.jsonl", started + PATIENCE_SECONDS
            old = _inode(log)
            self._until(lambda: _inode(log) not in (0, old), deadline)  # it opens its log anew
            kept = self.logged()
            self._until(lambda: self.logged() > kept, deadline)
            self.start_seconds = time.monotonic() - started
            time.sleep(self.rng.uniform(0, 2 * STEPS_PER_KILL * self.step_seconds))
        os.kill(process_id, signal.SIGKILL)
        status = status_of(process_id)
        assert status in (0, -signal.SIGKILL), self.said.read_text()[-3000:]
        gained = self.logged() - before
        # So that it gets on by about as many steps for each kill as there are.
        self.step_seconds *= 1.2 if gained < STEPS_PER_KILL else 0.7
        phase = "in a save" if self.unfinished() - stale else "in training" if gained > 0 else "in preparation"
        self.phases[phase] += status != 0
        return status != 0

    def _until(self, happened: Callable[[], bool], deadline: float) -> None:
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.002)

    def finish(self) -> None:
        """Let it run to its end, and a second run that is never stopped and saves once; compare them."""
        untouched = self.folder / "untouched"
        for run_dir, changes in ((self.run_dir, {}), (untouched, {"train.save_every": 0})):
            arguments = self.arguments(run_dir, changes)
            status = status_of(forked(lambda arguments=arguments: train.main(arguments), self.said))
            assert status == 0, self.said.read_text()[-3000:]
        assert without_timings(metric_lines(self.run_dir)) == without_timings(metric_lines(untouched))
        assert status_of(forked(self._compare, self.said)) == 0, self.said.read_text()[-3000:]

    def _compare(self) -> None:
        self.check()
        found = []
        for run_dir in (self.run_dir, self.folder / "untouched"):
            checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
            assert checkpoints.steps()[-1] == self.steps
            found.append(self.params(checkpoints, self.steps))
            checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, *found)

    def kill_exports(self, count: int) -> int:
        """Replace an exported folder again and again, killed at random instants; how many were."""
        arguments = ["--run", str(self.run_dir), "--out", str(self.out), "--overwrite"]

        def work() -> int:
            return export.main(arguments)

        started = time.monotonic()
        assert status_of(forked(work, self.said)) == 0, self.said.read_text()[-3000:]
        seconds, whole, killed = time.monotonic() - started, digest(self.out), 0
        for _ in range(count):
            process_id = forked(work, self.said)
            time.sleep(self.rng.uniform(0, seconds))
            os.kill(process_id, signal.SIGKILL)
            killed += status_of(process_id) != 0
            _recover(self.out)
            assert digest(self.out) == whole, "half an export"
        assert not list(self.folder.glob(".hf.*")), "something is left beside the export"
        return killed


def _recover(path: Path) -> None:
    """As its next writer does."""
    with one_writer(path):
        recover(path)


def _inode(path: Path) -> int:
    """Which file this is; 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return 0


def digest(folder: Path) -> str:
    load_file(folder / "model.safetensors")
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


def kill_run(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    run = KilledRun(folder, kills, seed)
    exports = kills // EXPORT_SHARE
    started = time.monotonic()
    done = 0
    while done < kills - exports:
        assert run.killed_once(), "the run was finished before it was killed often enough"
        done += 1
        print(f"{done} kills, {run.logged()} steps, {dict(run.phases)}", file=sys.stderr, flush=True)
    run.finish()
    run.phases["in an export"] = run.kill_exports(exports)
    return {
        "kills": dict(run.phases),
        "resumed": run.said.read_text().count("resuming after step"),
        "steps": run.steps,
        "seconds": round(time.monotonic() - started),
    }


# Every file operation that Python tells of; each is an instant before which the process is killed once.
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "tempfile.mkstemp"}


def killed_at_each_operation(work: Callable[[], None], check: Callable[[], None], said: Path) -> int:
    """Do it again and again, killed before its first, second, ... operation, until it ends; check what each leaves.

    Returns how often it was killed.
    """

    def dying(number: int) -> None:
        left = [number]

        def count(event: str, _: Any) -> None:
            if event in OPERATIONS:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    for number in itertools.count(1):
        status = status_of(forked(functools.partial(dying, number), said))
        check()
        if status == 0:
            return number - 1
        assert status == -signal.SIGKILL, said.read_text()[-3000:]
    raise AssertionError("counts on without end")


def kill_writes(folder: Path) -> dict[str, int]:
    counts = {}
    for name, write in WRITES.items():
        (folder / name).mkdir()
        counts[name] = write(folder / name, folder / "said")
    return counts


def _embeddings(place: Path, said: Path) -> int:
    rows = {bytes([i]) * 32: np.full(4, i, np.float32) for i in range(3)}

    def check() -> None:
        there = len(list(place.glob("*.safetensors")))  # reading removes what is damaged
        found = embeddings._read_store(place, "encoder")
        assert len(found) == there * len(rows), "a file that is there is whole"
        assert all(row.tolist() == rows[key].tolist() for key, row in found.items())

    kills = killed_at_each_operation(lambda: embeddings._write_file(place, rows, "encoder"), check, said)
    assert len(embeddings._read_store(place, "encoder")) == len(rows)
    return kills


def _reference(place: Path, said: Path) -> int:
    parts, file = dict.fromkeys(("slot", "response", *DECISIVE), "x"), place / "x.safetensors"
    values = np.arange(7, dtype=np.float32)

    def check() -> None:
        found = read_cache(file, parts, len(values))
        assert (found is None) == (not file.exists()), "a file that is there is whole"
        assert found is None or found.tolist() == values.tolist()

    kills = killed_at_each_operation(lambda: write_cache(file, parts, values), check, said)
    assert file.exists()
    return kills


def _folder(place: Path, said: Path) -> int:
    path, states = place / "out", set()

    def write(text: str) -> None:
        with atomic_directory(path, overwrite=True) as new:
            (new / "below").mkdir()
            for name in ("a", "b", "below/c"):
                (new / name).write_text(text)

    def check() -> None:
        _recover(path)
        assert not list(place.glob(".out.*")), "what was left is cleared up"
        states.add("".join(sorted(file.read_text() for file in path.rglob("*") if file.is_file())))
        write("0")

    write("0")
    kills = killed_at_each_operation(lambda: write("1"), check, said)
    assert states == {"000", "111"}, "the old folder or the new one, nothing between"
    return kills


def _metrics(place: Path, said: Path) -> int:
    file = place / "metrics.jsonl"
    early = [{"step": step, "loss": step / 3} for step in range(4)]
    text = "".join(json.dumps(line) + "\n" for line in early)

    def work() -> None:
        log = MetricsLog(place, TrackingConfig(tensorboard=False), 2, "id", {})
        assert log.initial == early[0]
        log.write(early[3])
        log.close()

    def check() -> None:
        kept = file.read_text()
        assert kept.count("\n") >= 3, "the lines up to the checkpoint stay"
        assert text.startswith(kept.rpartition("\n")[0])
        file.write_text(text + '{"step": 4, "lo')  # a line that a kill has cut short

    file.write_text(text)
    return killed_at_each_operation(work, check, said)


WRITES = {"embeddings": _embeddings, "reference": _reference, "folder": _folder, "metrics": _metrics}


def main(kind: str, folder: str, *numbers: str) -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    found = kill_writes(place) if kind == "writes" else kill_run(place, *map(int, numbers))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
