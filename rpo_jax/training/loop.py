"""The training loop: batches packed and placed ahead, metrics read one step late, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from rpo_jax.config import TrainConfig
from rpo_jax.core.records import Batch
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.packing import PackingPlan
from rpo_jax.hosts import processes
from rpo_jax.hosts.stopping import Stopped, Stopping
from rpo_jax.objectives import metrics as means
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.tracking import MetricsLog, Reporter, summary
from rpo_jax.training.diagnosis import Diagnosis
from rpo_jax.training.guard import FILE, Diverged, Guard, row_ids, some_rows
from rpo_jax.training.step import Params, Steps, TrainState, put_batch

Metrics = dict[str, float]

SAVED_BYTES_PER_SECOND = 2e8  # until a save has shown how fast the disk is


@dataclass
class _Step:
    """A step whose metrics are still on the device."""

    step: int
    num_tokens: int
    report: dict[str, Any]  # jax.Arrays, which say whether they are ready
    batch: Batch
    plan: PackingPlan
    limit: np.float32 | None = None  # of its gradient's norm
    finished: float | None = None

    def note_if_finished(self) -> None:
        """Take the time now if the step is done: where dispatch blocks, it is long done when its metrics are read."""
        if self.finished is None and all(value.is_ready() for value in self.report.values()):
            self.finished = time.perf_counter()

    def wait(self) -> float:
        """When the step was finished."""
        jax.block_until_ready(self.report)
        return self.finished or time.perf_counter()


@dataclass
class _Window:
    """What has been trained since the last line of metrics, to tell rates from."""

    since: float
    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    last: float | None = None  # when its newest step was finished

    def add(self, done: _Step, finished: float) -> float:
        """Returns how long the step took."""
        seconds = finished - (self.last or self.since)
        self.last = finished
        self.steps += 1
        self.pairs += int(np.sum(done.batch.sides["chosen"].valid))
        self.tokens += done.plan.num_tokens
        return seconds

    def rates(self, until: float) -> Metrics:
        seconds = until - self.since
        return {
            "tokens_per_second": self.tokens / seconds,
            "pairs_per_second": self.pairs / seconds,
            "step_seconds": seconds / self.steps,
        }


@dataclass
class TrainingLoop:
    """Trains from a state to `total_steps`.

    Args:
        held_out: batches of the held-out data; None where there are none.
        reference: parameters of a live reference; None where log-probs are in the data, or none are used.
        record: what each checkpoint says about its run, besides the number of tokens seen.
        guard: told of every step, in the order of steps.
        diagnosis: asked where a batch goes wrong, once the run gives up.
        stopping: asked after every step whether it was the last one for now.
        sampler: given the parameters and the step at every evaluation, to answer prompts with.
    """

    config: TrainConfig
    steps: Steps
    mesh: Mesh
    batches: PreferenceBatches
    held_out: PreferenceBatches | None
    reference: Params | None
    checkpoints: Checkpoints
    log: MetricsLog
    reporter: Reporter
    record: Mapping[str, Any]
    total_steps: int
    guard: Guard
    diagnosis: Diagnosis
    stopping: Stopping
    sampler: Callable[[Params, int], None] | None = None
    _told_uncalibrated: bool = field(default=False, init=False)
    _first: int = field(default=0, init=False)
    _longest_step: float = field(default=0.0, init=False)
    _guessed_save: float = field(default=0.0, init=False)

    def run(self, state: TrainState, start: int, num_tokens: int) -> tuple[Metrics, Metrics]:
        """Train from step `start`, and save and return early where the run is asked to stop.

        Returns the held-out metrics before the run's first step, and the last training and held-out ones together.
        Raises Stopped where the run is asked to stop before its first step, and Diverged, whose message is a report,
        after too many skipped steps in a row and where parameters that are not finite would have to be saved.
        """
        initial, last, last_eval = self._before(state, start)
        if start >= self.total_steps or self.stopping.reason is not None:
            return initial, {**last, **last_eval}
        self._first = start + 1
        here = [part.data.nbytes for leaf in jax.tree.leaves(state) for part in leaf.addressable_shards]
        self._guessed_save = 1 + sum(here) / SAVED_BYTES_PER_SECOND
        with (
            self.reporter.progress("train", self.total_steps, start) as progress,
            ThreadPoolExecutor(1, thread_name_prefix="packer") as packer,
        ):
            ahead = packer.submit(self._placed, start)
            waiting: _Step | None = None
            window = _Window(time.perf_counter())
            for step in range(start + 1, self.total_steps + 1):
                batch, plan, placed = ahead.result()
                if step < self.total_steps:
                    ahead = packer.submit(self._placed, step)
                num_tokens += plan.num_tokens
                if waiting is not None:
                    waiting.note_if_finished()
                limit = self.guard.limit(step)
                limited = {} if limit is None else {"limit": limit}
                state, report = self.steps.train(state, placed, self.reference, **limited)
                if waiting is not None:
                    # The device works on this step while the previous one is read and told.
                    last, window = self._tell(waiting, window, progress, last)
                    self._check(waiting, state, step, num_tokens)
                waiting = _Step(step, num_tokens, report, batch, plan, limit)
                if step == self._first:
                    waiting.finished = waiting.wait()
                    self.reporter.first_step()
                self._ask_whether_to_stop()
                saving, evaluating = self._due(self.config.save_every, step), self._evaluating(step)
                if evaluating or saving or self.stopping.reason:
                    last, window = self._tell(waiting, window, progress, last)
                    self._check(waiting, state, step, num_tokens)
                    waiting = None
                    evaluated = self._evaluate(state, step) if evaluating else {}
                    last_eval = evaluated or last_eval
                    if saving or self.stopping.reason:
                        self._save(state, step, num_tokens, evaluated, batch)
                    window = _Window(time.perf_counter())
                if self.stopping.reason:
                    break
        self.checkpoints.wait()
        if self.guard.bad_steps:
            self.reporter.say(f"{self.guard.bad_steps} steps of this run were skipped; {FILE} has their rows")
        return initial, {**last, **last_eval}

    def _before(self, state: TrainState, start: int) -> tuple[Metrics, Metrics, Metrics]:
        """Held-out metrics of step 0, the last training and the last held-out ones before the first step from here."""
        if start == 0:
            initial = self._evaluate(state, 0)
            if self.stopping.reason is not None:
                raise Stopped(self.stopping.reason)
            return initial, {}, initial
        told = self.log.earlier
        initial = next((line for line in told if line["step"] == 0), {})
        last = next((line for line in reversed(told) if "loss" in line), {})
        last_eval = next((line for line in reversed(told) if "eval_loss" in line), {})
        # A run that is asked to stop saves without the evaluation that the step should have.
        missed = self.held_out is not None and self._evaluating(start) and last_eval.get("step") != start
        if processes.from_main(lambda: missed):  # the others may still read an older state of the file
            last_eval = self._evaluate(state, start) or last_eval
        return initial, last, last_eval

    def _ask_whether_to_stop(self) -> None:
        """After each step; under a time limit, early enough for another step and twice the longest save so far."""
        if not self.stopping.has_limit:
            self.stopping.requested("steps")
            return
        seconds = 2 * self.checkpoints.longest_save(default=self._guessed_save)
        self.stopping.requested("steps", seconds + 2 * self._longest_step)

    def _placed(self, step: int) -> tuple[Batch, PackingPlan, Batch]:
        """The batch of this step, its plan, and the same on the devices: the transfer overlaps with the step before."""
        batch = self.batches.batch_at(step)
        return batch, self.batches.plan_at(step), put_batch(self.mesh, batch)

    def _evaluating(self, step: int) -> bool:
        # A checkpoint is ranked by an evaluation of its own.
        ranked = self.config.keep_best > 0 and self._due(self.config.save_every, step)
        return ranked or self._due(self.config.eval_every, step)

    def _due(self, every: int, step: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _tell(self, done: _Step, window: _Window, progress, last: Metrics) -> tuple[Metrics, _Window]:
        """Log a finished step if its turn has come; returns the newest metrics and the window for rates."""
        finished = done.wait()
        seconds = window.add(done, finished)
        if done.step != self._first:  # which was compiled besides
            self._longest_step = max(self._longest_step, seconds)
        skipped = self.guard.see(done.step, done.report, done.limit, lambda: row_ids(done.batch, self.batches.data))
        if skipped is not None:
            rows = some_rows(row_ids(done.batch, self.batches.data))
            self.reporter.say(f"step {done.step}  skipped: {skipped}; rows {rows}, all in {FILE}")
        if done.step != 1 and not self._due(self.config.log_every, done.step):
            progress(done.step, {})
            return last, window
        metrics: Metrics = {
            "step": done.step,
            "epoch": done.step / self.batches.steps_per_epoch,
            **{name: float(value) for name, value in done.report.items() if name != "skipped"},
            "guard/bad_steps": self.guard.bad_steps,
            "num_tokens": done.num_tokens,
            "packing/efficiency": done.plan.efficiency,
            **window.rates(finished),
        }
        self.log.write(metrics)
        progress(done.step, metrics)
        self._say_uncalibrated(metrics)
        return metrics, _Window(finished)

    def _say_uncalibrated(self, metrics: Metrics) -> None:
        """Say once why rows miss contrast.perplexity; how many they are is logged with every step."""
        missed = int(metrics.get("contrast/uncalibrated_rows", 0))
        if not missed or self._told_uncalibrated:
            return
        self._told_uncalibrated = True
        tied = int(metrics["contrast/tied_rows"])
        reasons = {
            "have fewer contrasts than that and weight all of them alike": missed - tied,
            "have more that are tied for the nearest and weight those alike": tied,
        }
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        self.reporter.say(
            f"step {int(metrics['step'])}  {missed} rows of the contrast matrix cannot reach contrast.perplexity: "
            f"{told}; said once, logged as contrast/uncalibrated_rows and contrast/tied_rows"
        )

    def _evaluate(self, state: TrainState, step: int) -> Metrics:
        """Held-out metrics over all of the held-out data, with `eval_` in front; logged.

        None of them where there is no held-out data, or the run is asked to stop.
        """
        if self.stopping.reason is not None:
            return {}
        if self.sampler is not None:
            self.sampler(state.params, step)
        if self.held_out is None:
            return {}
        started = time.perf_counter()
        total: dict[str, means.Mean] | None = None
        for index in range(self.held_out.steps_per_epoch):
            if self.stopping.requested("evaluation"):
                return {}  # made up for where the run goes on
            batch = put_batch(self.mesh, self.held_out.batch_at(index))
            found = self.steps.evaluate(state.params, batch, self.reference)
            total = found if total is None else means.combine(total, found)
        assert total is not None
        metrics = {f"eval_{name}": float(value) for name, value in means.finalize(total).items()}
        metrics = {"step": step, "epoch": step / self.batches.steps_per_epoch, **metrics}
        metrics["eval_seconds"] = time.perf_counter() - started
        self.log.write(metrics)
        self.reporter.say(f"step {step}  {summary(metrics)}")
        if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
            self._say_wrong(wrong, state, step)
        return metrics

    def _say_wrong(self, names: list[str], state: TrainState, step: int) -> None:
        """Say which held-out rows give numbers that are not finite, one batch after the other."""
        assert self.held_out is not None
        rows = []
        for index in range(self.held_out.steps_per_epoch):
            batch = self.held_out.batch_at(index)
            found = means.finalize(self.steps.evaluate(state.params, put_batch(self.mesh, batch), self.reference))
            if not all(math.isfinite(value) for value in found.values()):
                rows += row_ids(batch, self.held_out.data)
        self.guard.write({"step": step, "reason": f"{', '.join(names)} not finite", "rows": rows})
        self.reporter.say(f"step {step}  not finite: {', '.join(names)}; rows {some_rows(rows)}, all in {FILE}")

    def _check(self, done: _Step, state: TrainState, step: int, num_tokens: int) -> None:
        """End a run that has had too many bad steps in a row; `state` is that of `step`, `done` the last one told."""
        if not self.guard.gives_up:
            return
        count = f"{self.guard.in_a_row} steps in a row were skipped, the last of them step {done.step}"
        if not self.checkpoints.steps() and not self.diagnosis.parameters(state.params):
            # An earlier checkpoint is better: these parameters may be what made the numbers go wrong.
            self.guard.start_again()
            self._save(state, step, num_tokens, {}, done.batch)
        self._give_up(count, done.batch, state, done.step)

    def _give_up(self, why: str, batch: Batch, state: TrainState, step: int) -> NoReturn:
        data, rows = self.batches.data, row_ids(batch, self.batches.data)
        found = self.diagnosis.explain(state.params, self.reference, put_batch(self.mesh, batch), data)
        self.checkpoints.settle()
        saved = self.checkpoints.latest_step()
        self.guard.write({"step": step, "reason": why, "found": found, "rows": rows})
        kept = "no checkpoint was saved before" if saved is None else f"the checkpoint of step {saved} is whole"
        lines = [f"training stopped: {why}; {kept}", f"rows of that step: {some_rows(rows)}; all in {FILE}", *found]
        raise Diverged("\n  ".join(lines))

    def _save(self, state: TrainState, step: int, num_tokens: int, evaluated: Metrics, batch: Batch) -> None:
        if step in self.checkpoints.steps():
            return
        if self.guard.in_a_row and step < self.total_steps and not self.stopping.reason:
            # It would push out a checkpoint that is known to be good.
            self.reporter.say(f"step {step}  not saved, as it was skipped")
            return
        if names := self.diagnosis.parameters(state.params):
            self._give_up(f"after step {step} parameters are not finite ({names[0]})", batch, state, step)
        self.log.sync()
        score = None
        if evaluated:
            # By held-out accuracy of the rewards; by loss where there are none, as in sft.
            score = evaluated.get("eval_rewards/accuracies", -evaluated["eval_loss"])
            score = score if math.isfinite(score) else None
        record = {**self.record, "num_tokens": num_tokens, "guard": self.guard.record()}
        self.checkpoints.save(step, state, record, score)
