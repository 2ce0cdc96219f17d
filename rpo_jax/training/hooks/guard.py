"""Steps whose numbers go wrong: counted, and logged with their rows in bad_steps.jsonl.

The step itself skips what is not finite, on all devices alike. What is kept here, on the host, follows from what every
process reads of a step, so all come to the same end. It is in each checkpoint's record, not in the training state:
checkpoints of runs without it stay readable, and a median costs no memory on the devices.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rpo_jax.config import GuardConfig
from rpo_jax.core.jsonl import GrowingFile, read_jsonl, write_jsonl
from rpo_jax.core.records import Batch, PreferenceData
from rpo_jax.hosts.processes import Agreed
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.hooks.hook import FinishedStep, Hook, Training

log = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"
NORMS = 64  # steps whose gradient norms the median is taken of
FEWEST_NORMS = 16  # of them before the median says anything
LAG = 2  # step n is begun before step n - 1 has been read, on every schedule of evaluations and saves
SHOWN_ROWS = 4


class Diverged(Agreed):
    """Numbers went wrong too often, on all processes alike; the message is the report."""


def row_ids(batch: Batch, data: PreferenceData) -> list[str]:
    """The rows that a batch holds, in the order of its slots."""
    valid, index = (np.concatenate([np.asarray(x) for x in batch.joined(name)]) for name in ("valid", "example_index"))
    return [data.examples[number].row_id for number in dict.fromkeys(index[valid].tolist())]


def some(names: list[str], shown: int = SHOWN_ROWS) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class Guard:
    """What a run remembers of its steps' numbers.

    Args:
        file: where skipped steps are written; None where another process does.
        start_step: steps done when this part of the run begins; later lines of the file are dropped.
        memory: what `memory` gave for the checkpoint of that step; empty for a new run.
        say: is told where the file cannot be written.

    Attributes:
        bad_steps: skipped so far.
        in_a_row: of them the newest, without a good one between.
    """

    def __init__(
        self,
        config: GuardConfig,
        file: Path | None = None,
        start_step: int = 0,
        memory: Mapping[str, Any] = {},
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self._config, self._file = config, None if file is None else GrowingFile(file, say)
        self.bad_steps: int = memory.get("bad_steps", 0)
        self.in_a_row: int = memory.get("in_a_row", 0)
        self._norms: deque[tuple[int, float]] = deque(map(tuple, memory.get("norms", ())), NORMS + LAG)
        if file is not None and file.exists():
            write_jsonl(file, [row for row in read_jsonl(file) if row["step"] <= start_step])

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        return {"bad_steps": self.bad_steps, "in_a_row": self.in_a_row, "norms": [list(pair) for pair in self._norms]}

    def limit(self, step: int) -> np.float32 | None:
        """Largest gradient norm with which this step is taken; None where there is none to any step.

        A step counts from `LAG` steps on, so that a resumed run, which has read all, skips what it would have skipped.
        """
        ratio = self._config.max_grad_norm_ratio
        if ratio is None:
            return None
        known = [norm for number, norm in self._norms if number <= step - LAG][-NORMS:]
        return np.float32(ratio * median(known) if len(known) >= FEWEST_NORMS else math.inf)

    def record(
        self, step: int, report: Mapping[str, Any], limit: np.float32 | None, rows: Callable[[], list[str]]
    ) -> str | None:
        """Take note of a finished step; why it was skipped, None where it was not."""
        if not report["skipped"]:
            self.in_a_row = 0
            if limit is not None:
                self._norms.append((step, float(report["grad_norm"])))
            return None
        self.bad_steps += 1
        self.in_a_row += 1
        loss, norm = float(report["loss"]), float(report["grad_norm"])
        if not math.isfinite(loss):
            reason = f"its loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the norm of its gradient is {norm}"
        else:
            reason = f"the norm of its gradient is {norm:.4g}, over the limit of {limit:.4g}"
        self.write({"step": step, "reason": reason, "in_a_row": self.in_a_row, "rows": rows()})
        return reason

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line to the file; it holds `step`."""
        if self._file is not None:
            self._file.add(line)

    def reset(self) -> None:
        """What is saved now has the bad steps behind it: a run that resumes from it counts anew."""
        self.in_a_row = 0

    @property
    def exceeded(self) -> bool:
        """Whether so many steps in a row were skipped that the run is to end."""
        return self.in_a_row >= self._config.max_bad_steps


@dataclass
class Guarding(Hook):
    """Has the guard take note of every step, and says which were skipped.

    Args:
        data: gives what the examples of the batch at hand are.
    """

    guard: Guard
    data: Callable[[], PreferenceData]
    reporter: Reporter

    def after_step(self, run: Training, finished: FinishedStep) -> None:
        rows = functools.partial(row_ids, finished.batch, self.data())
        skipped = self.guard.record(finished.step, finished.report, finished.limit, rows)
        if skipped is not None:
            self.reporter.say(f"step {finished.step}  skipped: {skipped}; rows {some(rows())}, all in {FILE}")

    def at_end(self, run: Training) -> None:
        if self.guard.bad_steps and run.step >= run.first_step:
            self.reporter.say(f"{self.guard.bad_steps} steps of this run were skipped; {FILE} has their rows")
