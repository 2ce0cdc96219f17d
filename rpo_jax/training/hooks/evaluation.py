"""Held-out metrics: before the first step, every so many steps, and after the last."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import processes
from rpo_jax.objectives import metrics as means
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.hooks.guard import FILE, Guard, row_ids, some
from rpo_jax.training.hooks.hook import Hook, Training
from rpo_jax.training.hooks.stopping import StopRequests
from rpo_jax.training.loop import Programs
from rpo_jax.training.step import Means


@dataclass
class Evaluation(Hook):
    """Evaluates all of the held-out data, unless the run is to stop; what is missed then is made up for on a resume.

    Args:
        every: steps between evaluations; several numbers where it is due at the multiples of each.
        held_out: None where there is none: then only the other hooks hear that an evaluation is due.
        evaluated: step of the newest evaluation that earlier parts of the run have logged.
        guard: keeps the rows whose numbers are not finite.
        stops: knows how long the save after it may take.
    """

    every: tuple[int, ...]
    held_out: PreferenceBatches | None
    programs: Programs
    evaluated: float | None
    guard: Guard
    reporter: Reporter
    stops: StopRequests

    def before_first_step(self, run: Training) -> None:
        missed = self.held_out is not None and self.wants_pause(run) and self.evaluated != run.step
        # Process 0 decides: the others may still read an older state of metrics.jsonl.
        if run.step == 0 or processes.from_main(lambda: missed):
            self.at_pause(run)

    def wants_pause(self, run: Training) -> bool:
        return any(run.due(every) for every in self.every)

    def at_pause(self, run: Training) -> None:
        due = run.step < run.first_step or self.wants_pause(run)
        if not due or run.stop_reason is not None:
            return
        for hook in run.hooks:
            hook.before_evaluation(run)
        if self.held_out is None:
            return
        started = time.perf_counter()
        total: Means | None = None
        for index in range(self.held_out.steps_per_epoch):
            if run.stopping.requested("evaluation", self.stops.save_seconds(run)):
                return
            batch = self.programs.evaluate(run.state.params, self.held_out.batch_at(index))
            total = batch if total is None else means.combine(total, batch)
        assert total is not None
        metrics = {f"eval_{name}": float(value) for name, value in means.finalize(total).items()}
        metrics = {**run.place(run.step), **metrics, "eval_seconds": time.perf_counter() - started}
        for hook in run.hooks:
            hook.after_evaluation(run, metrics)
        if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
            self._say_wrong(wrong, run)

    def _say_wrong(self, names: list[str], run: Training) -> None:
        """Say which held-out rows give numbers that are not finite, one batch after the other."""
        assert self.held_out is not None
        rows = []
        for index in range(self.held_out.steps_per_epoch):
            batch = self.held_out.batch_at(index)
            values = means.finalize(self.programs.evaluate(run.state.params, batch)).values()
            if not all(math.isfinite(value) for value in values):
                rows += row_ids(batch, self.held_out.data)
        self.guard.write({"step": run.step, "reason": f"{', '.join(names)} not finite", "rows": rows})
        self.reporter.say(f"step {run.step}  not finite: {', '.join(names)}; rows {some(rows)}, all in {FILE}")
