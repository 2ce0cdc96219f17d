"""Lines of metrics.jsonl, the progress bar, and what the console says of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from rpo_jax.hosts.memory import peak_memory
from rpo_jax.runs.tracking import MetricsLog, Reporter, summary
from rpo_jax.training.hooks.guard import Guard
from rpo_jax.training.hooks.hook import FinishedStep, Hook, Metrics, Training


@dataclass
class Logging(Hook):
    """Logs the first step, every so many and the last, with rates over all steps since the line before.

    Args:
        every: steps between lines.
        guard: counts skipped steps.
        closing: ends the progress bar.
    """

    every: int
    log: MetricsLog
    reporter: Reporter
    guard: Guard
    closing: contextlib.ExitStack
    _progress: Callable[[int, Mapping[str, float]], None] = field(init=False)
    _steps: int = 0  # this and the next three: since the last line
    _seconds: float = 0.0
    _pairs: int = 0
    _tokens_before: int = 0
    _said_uncalibrated: bool = False
    _said_nothing_compared: bool = False

    def before_first_step(self, run: Training) -> None:
        self._tokens_before = run.num_tokens
        if run.step < run.total_steps and run.stop_reason is None:
            bar = self.reporter.progress("train", run.total_steps, run.step)
            self._progress = self.closing.enter_context(bar)

    def after_step(self, run: Training, finished: FinishedStep) -> None:
        if finished.step == run.first_step:
            self.reporter.first_step()
        self._steps += 1
        self._seconds += finished.seconds
        self._pairs += int(np.sum(finished.batch.sides["chosen"].valid))
        if finished.step != 1 and not run.due(self.every, finished.step):
            self._progress(finished.step, {})
            return
        metrics = {
            **run.place(finished.step),
            **finished.metrics,
            "guard/bad_steps": self.guard.bad_steps,
            "num_tokens": finished.num_tokens,
            "packing/efficiency": finished.packing_efficiency,
            "tokens_per_second": (finished.num_tokens - self._tokens_before) / self._seconds,
            "pairs_per_second": self._pairs / self._seconds,
            "step_seconds": self._seconds / self._steps,
            **peak_memory(),
        }
        self._steps, self._seconds, self._pairs, self._tokens_before = 0, 0.0, 0, finished.num_tokens
        if not finished.report["compared"]:
            del metrics["loss"]  # the mean of nothing, which would be the run's result if this is its last step
            self._say_nothing_compared(finished)
        self.log.write(metrics)
        self._progress(finished.step, metrics)
        self._say_uncalibrated(metrics)

    def after_evaluation(self, run: Training, metrics: Metrics) -> None:
        self.log.write(metrics)
        self.reporter.say(f"step {run.step}  {summary(metrics)}")

    def _say_nothing_compared(self, finished: FinishedStep) -> None:
        if self._said_nothing_compared:
            return
        self._said_nothing_compared = True
        counts = {kind: int(np.sum(side.valid)) for kind, side in finished.batch.sides.items()}
        held = " and ".join(f"{counts[kind]} {kind}" for kind in ("chosen", "rejected") if kind in counts)
        self.reporter.say(
            f"step {finished.step}  had nothing to compare in its {held} responses: its line has no loss, and the "
            "run's result is a step's that had; said once; batch.order=shuffled or more batch.pairs mix the responses"
        )

    def _say_uncalibrated(self, metrics: Metrics) -> None:
        """Say once why rows miss contrast.perplexity; how many they are is logged with every step."""
        missed = int(metrics.get("contrast/uncalibrated_rows", 0))
        if not missed or self._said_uncalibrated:
            return
        self._said_uncalibrated = True
        tied = int(metrics["contrast/tied_rows"])
        reasons = {
            "have fewer contrasts than that and weight all of them alike": missed - tied,
            "have more that are tied for the nearest and weight those alike": tied,
        }
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        self.reporter.say(
            f"step {int(metrics['step'])}  {missed} rows of the contrast matrix cannot reach contrast.perplexity: "
            f"{counted}; said once, logged as contrast/uncalibrated_rows and contrast/tied_rows"
        )
