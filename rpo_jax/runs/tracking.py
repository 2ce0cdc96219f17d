"""What a run reports: console phases and progress, metrics.jsonl, and the dashboards asked for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from rpo_jax.config import TrackingConfig
from rpo_jax.core import files
from rpo_jax.core.command import SteadyStream
from rpo_jax.core.jsonl import GrowingFile, read_jsonl, to_line, write_jsonl
from rpo_jax.core.text import printable
from rpo_jax.runs import loggers
from rpo_jax.runs.notebook import NotebookProgress, clock, hush_libraries, in_notebook

METRICS = "metrics.jsonl"
TIED = "tied"  # in place of an accuracy
SPEED_SECONDS = 86_400.0  # that a bar remembers: two steps, however slow, or it knows no time left
FIRST_STEP = "first step"  # its key in phase_seconds

log = logging.getLogger(__name__)


def _rate(digits: int) -> Callable[[float], str]:
    """So many decimals, and two digits of what is below 1: a slow machine's rate is not 0."""
    return lambda value: f"{value:.{digits}f}" if value >= 1 else f"{value:.2g}"


# What the progress bar and the plain lines show where a run has it; a narrow terminal cuts the end.
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "{:.4f}".format),
    ("pairs_per_second", "pairs/s", _rate(1)),
    ("generated_per_second", "tokens/s", _rate(0)),
    ("rewards/accuracies", "accuracy", "{:.3f}".format),
    ("rewards/margins", "margin", "{:.3f}".format),
    ("eval_loss", "held-out loss", "{:.4f}".format),
    ("eval_rewards/accuracies", "held-out accuracy", "{:.3f}".format),
    ("eval_logps/accuracies", "held-out accuracy of log-probs", "{:.3f}".format),
)


def is_tied(name: str, metrics: Mapping[str, float]) -> bool:
    """Whether this is an accuracy of 0 because all pairs tie, as where the policy still is its reference."""
    accuracy = name.endswith("rewards/accuracies")
    return accuracy and metrics.get(name.replace("accuracies", "ties")) == 1.0


def summary(metrics: Mapping[str, float]) -> str:
    """The key metrics in one short line."""
    return "  ".join(
        f"{label} {TIED if is_tied(name, metrics) else form(metrics[name])}"
        for name, label, form in _SHOWN
        if name in metrics
    )


class Reporter:
    """Phases and progress on the console: bars on a terminal or in a notebook, plain lines elsewhere.

    Args:
        silent: say nothing, where another process of the run does.

    Attributes:
        phase_seconds: wall time of each finished phase; under "first step", from the making of this reporter, which
            a run begins with, to the end of its first training step, the evaluation before it included.
    """

    def __init__(self, silent: bool = False) -> None:
        # In a notebook plain lines, which share one output; rich would make an output of each.
        stream: Any = SteadyStream(sys.stdout)
        self._console = Console(file=stream, highlight=False, soft_wrap=True, quiet=silent, force_jupyter=False)
        if in_notebook():
            hush_libraries()
        self._notebook = in_notebook() and not silent
        self._live = self._console.is_terminal and not silent
        self.phase_seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[list[str]]:
        """Time a phase; what is appended to the list that it yields ends the phase's line."""
        notes: list[str] = []
        started = time.perf_counter()
        yield notes
        seconds = time.perf_counter() - started
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        self.say("  ".join([f"{name:<22}{seconds:8.1f} s", *notes]))

    def first_step(self) -> None:
        """Report that the first training step of this run is done."""
        self.phase_seconds[FIRST_STEP] = seconds = time.perf_counter() - self._started
        self.say(f"{FIRST_STEP:<22}{seconds:8.1f} s  from the start of the run to the end of its first step")

    @contextmanager
    def progress(self, name: str, total: int, start: int = 0) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """Progress of `total` things; call what it yields with the number done and the newest metrics.

        On a terminal or in a notebook every call moves the bar; elsewhere a line is printed whenever there are metrics.
        """
        if self._notebook:
            shown = NotebookProgress(name, total, start)
            try:
                yield lambda done, metrics: shown.update(done, summary(metrics))
            finally:
                shown.draw()
            return
        if not self._live:
            first: tuple[int, float] | None = None  # its own time is that of compiling

            def plain(done: int, metrics: Mapping[str, float]) -> None:
                nonlocal first
                now = time.perf_counter()
                first = first or (done, now)
                if metrics:
                    timed = first[0] < done < total
                    left = (now - first[1]) / (done - first[0]) * (total - done) if timed else 0.0
                    ending = [f"{clock(left)} left"] if timed else []
                    self.say("  ".join([f"{name} {done}/{total}", summary(metrics), *ending]))

            yield plain
            return

        fixed = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
        )
        # What a narrow terminal cuts.
        shown = TextColumn("{task.fields[shown]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        with Progress(*fixed, shown, console=self._console, speed_estimate_period=SPEED_SECONDS) as bar:
            task = bar.add_task(name, total=total, completed=start, shown="")

            def update(done: int, metrics: Mapping[str, float]) -> None:
                fields: dict[str, Any] = {"shown": summary(metrics)} if metrics else {}
                bar.update(task, completed=done, **fields)

            yield update


class MetricsLog:
    """Writes metrics to `metrics.jsonl` in the run folder, and to the dashboards asked for (rpo_jax.runs.loggers).

    A run goes on where none of them takes what it is given: lines of metrics.jsonl wait in memory.

    Args:
        start_step: steps done when this part of the run begins; later lines of an earlier part are dropped,
            because they will be logged again.
        unwritten: lines of an earlier part that waited when it saved its checkpoint of `start_step`.
        writing: false on the processes of a run that only read what an earlier part logged.
        run_id: the same for all parts of a run, so that a resumed one goes on in the same chart.
        say: is told of what cannot be written.

    Attributes:
        initial: the evaluation before the run's first step; empty where there is none so far, as the next two.
        training: the newest line of a training step.
        held_out: the newest line of an evaluation.
        round: the newest line of a round's start.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        start_step: int,
        run_id: str,
        hyperparameters: dict[str, Any],
        *,
        unwritten: Sequence[dict[str, float]] = (),
        writing: bool = True,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        path = run_dir / METRICS
        # A run that starts over evaluates before its first step again, so even that line goes.
        first_step = start_step + 1 if start_step else 0
        self.initial: dict[str, float] = {}
        self.training: dict[str, float] = {}
        self.held_out: dict[str, float] = {}
        self.round: dict[str, float] = {}
        logged = read_jsonl(path)
        earlier = [row for row in logged if row["step"] < first_step]
        if unwritten:
            written = {to_line(row) for row in earlier}  # the disk may have taken them after that checkpoint
            earlier += [row for row in unwritten if to_line(row) not in written]
            earlier.sort(key=lambda row: row["step"])
        for row in earlier:
            self._note(row)
        self._file = None
        self._loggers: list[loggers.OptionalLogger] = []
        if not writing:
            return
        write_jsonl(path, earlier)
        self._file = GrowingFile(path, say)
        # What dashboards have of the steps that come again, and mostly cannot take twice.
        self._again = {_lines_name(row) for row in logged if row["step"] >= first_step}
        run = loggers.LoggedRun(run_dir, config, run_id, first_step, hyperparameters)
        self._loggers = [loggers.OptionalLogger(kind, run, say) for kind in loggers.asked_for(config).values()]

    def write(self, metrics: Mapping[str, float]) -> None:
        """Log one step; `metrics` holds `step`."""
        self._note(dict(metrics))
        if self._file is None:
            return
        self._file.add(metrics)
        scalars = {name: value for name, value in metrics.items() if name != "step"}
        for logger in self._loggers:
            if logger.takes_again or _lines_name(metrics) not in self._again:
                logger.write(scalars, int(metrics["step"]))

    def _note(self, line: dict[str, float]) -> None:
        if line["step"] == 0:
            self.initial = line
        if "loss" in line:
            self.training = line
        if "eval_loss" in line:
            self.held_out = line
        if "round" in line:
            self.round = line

    @property
    def unwritten(self) -> list[Mapping[str, float]]:
        """Lines that wait for the disk, for a checkpoint to keep."""
        return [] if self._file is None else list(self._file.waiting)

    @property
    def fault(self) -> files.WriteFailed | None:
        """Why lines are not on disk; None where all are."""
        return None if self._file is None else self._file.fault

    def sync(self) -> None:
        """Have all lines on disk, before a checkpoint that counts on them; see `fault`."""
        if self._file is not None:
            self._file.flush(lasting=True)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def _lines_name(line: Mapping[str, float]) -> tuple[int, frozenset[str]]:
    """What tells it from the other lines of a run: its step, and whether it is of training, evaluation or a round."""
    return int(line["step"]), frozenset(name for name in ("loss", "eval_loss", "round") if name in line)
