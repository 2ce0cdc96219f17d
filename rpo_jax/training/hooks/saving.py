"""Checkpoints, and the end of a run whose numbers go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpo_jax.hosts import processes
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.training.hooks.guard import FILE, Diverged, Guard, row_ids, some
from rpo_jax.training.hooks.hook import FinishedStep, Hook, Metrics, Training
from rpo_jax.training.loop import Programs


@dataclass
class Saving(Hook):
    """Saves every so many steps, after the last, and where the run is to stop; only what is finite.

    Raises Diverged, whose message is a report, where the guard's limit of skipped steps is exceeded, and where
    parameters that are not finite would have to be saved.

    Args:
        every: steps between checkpoints.
        record: what each checkpoint says about its run, besides the number of tokens and what the guard knows.
    """

    every: int
    checkpoints: Checkpoints
    record: Mapping[str, Any]
    programs: Programs
    guard: Guard
    log: MetricsLog
    reporter: Reporter
    _newest: FinishedStep = field(init=False)
    _score: tuple[int, float] | None = None  # of which step
    _wanted: bool = False
    _refused: bool = False  # metrics.jsonl

    def after_evaluation(self, run: Training, metrics: Metrics) -> None:
        # By held-out accuracy of the rewards; by loss where there are none, as in sft.
        score = metrics.get("eval_rewards/accuracies", -metrics["eval_loss"])
        self._score = (run.step, score) if math.isfinite(score) else None

    def after_step(self, run: Training, finished: FinishedStep) -> None:
        self._newest = finished
        if not self.guard.exceeded:
            return
        count = f"{self.guard.in_a_row} steps in a row were skipped, the last of them step {finished.step}"
        if not self.checkpoints.steps() and not self.programs.diagnosis.parameters(run.state.params):
            # An earlier checkpoint is better: these parameters may be what made the numbers go wrong.
            self.guard.reset()
            self._save(run)
        raise self._diverged(count, run)

    def wants_pause(self, run: Training) -> bool:
        # Where metrics.jsonl is refused, what is trained is saved at once, in case that this still goes; several
        # processes, which save together, wait for the next checkpoint.
        refused, before = self.log.fault is not None, self._refused
        self._refused = refused
        self._wanted = run.due(self.every) or (refused and not before and processes.num_processes() == 1)
        return self._wanted

    def at_pause(self, run: Training) -> None:
        last = run.step == run.total_steps or run.stop_reason is not None
        if run.step not in self.checkpoints.steps() and (last or self._wanted):
            if self.guard.in_a_row and not last:
                # It would push out a checkpoint that is known to be good.
                self.reporter.say(f"step {run.step}  not saved, as it was skipped")
            elif names := self.programs.diagnosis.parameters(run.state.params):
                raise self._diverged(f"after step {run.step} parameters are not finite ({names[0]})", run)
            else:
                self._save(run)
        if last:
            self.checkpoints.wait()

    def keep(self, run: Training) -> None:
        """Save the step at hand, unless it is saved, and wait until it is on disk."""
        if run.step not in self.checkpoints.steps():
            self._save(run)
        self.checkpoints.wait()

    def _save(self, run: Training) -> None:
        self.log.sync()
        step, score = self._score or (None, None)
        record = {
            **self.record,
            "num_tokens": run.num_tokens,
            "guard": self.guard.memory(),
            "unwritten_metrics": self.log.unwritten,
        }
        self.checkpoints.save(run.step, run.state, record, score if step == run.step else None)

    def _diverged(self, why: str, run: Training) -> Diverged:
        rows = row_ids(self._newest.batch, self.programs.source.data)
        reasons = self.programs.explain(run.state.params, self._newest.batch)
        self.checkpoints.settle()
        saved = self.checkpoints.latest_step()
        self.guard.write({"step": self._newest.step, "reason": why, "found": reasons, "rows": rows})
        kept = "no checkpoint was saved before" if saved is None else f"the checkpoint of step {saved} is whole"
        lines = [f"training stopped: {why}; {kept}", f"rows of that step: {some(rows)}; all in {FILE}", *reasons]
        return Diverged("\n  ".join(lines))
