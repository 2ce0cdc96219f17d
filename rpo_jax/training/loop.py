"""The training loop: batches packed and placed ahead, metrics read one step late, and hooks called at every event."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rpo_jax.core.records import Batch, PreferenceData
from rpo_jax.hosts.stopping import Stopped
from rpo_jax.training.diagnosis import Diagnosis
from rpo_jax.training.hooks.hook import FinishedStep, Training
from rpo_jax.training.step import Means, Params, Steps, TrainState, put_batch


class BatchFacts(Protocol):
    """What is logged of a batch; the same on every process, whichever of its rows the process has."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def efficiency(self) -> float:
        """Share of the batch's positions that hold a token."""
        ...


class BatchSource(Protocol):
    """Where batches come from: a data set, or what earlier steps have made.

    A batch is a function of the step, counted from 0, and of what was done before it, or a resumed run is not the one
    that was never stopped. Called from one thread, in the order of steps, while the step before is under way, or, where
    the batch is not `ready` then, once that step and the pause after it are over.
    """

    @property
    def steps_per_epoch(self) -> int | None:
        """None where the source has no epochs."""
        ...

    @property
    def data(self) -> PreferenceData:
        """What the examples of the batch at hand are."""
        ...

    def ready(self, step: int) -> bool:
        """Whether the batch of this step can be made before the step before it is done."""
        ...

    def batch_at(self, step: int) -> Batch: ...

    def plan_at(self, step: int) -> BatchFacts: ...


@dataclass(frozen=True)
class Programs:
    """What a run computes on the devices.

    Args:
        reference: parameters of a live reference; None where log-probs are in the data, or none are used.
        diagnosis: asked where a batch goes wrong, once the run gives up.
        source: where the batches come from.
        say: is told of each compilation, which a shape of batches waits for the first time.
    """

    steps: Steps
    mesh: Mesh
    reference: Params | None
    diagnosis: Diagnosis
    source: BatchSource
    say: Callable[[str], None]
    _compiled: set[tuple[str, tuple[int, ...]]] = field(default_factory=set, init=False)

    def place(self, batch: Batch) -> Batch:
        """A batch of the host on the devices."""
        return put_batch(self.mesh, batch)

    def train(self, state: TrainState, placed: Batch, limit: np.float32 | None) -> tuple[TrainState, dict[str, Any]]:
        """The state after a step on a placed batch, and its metrics; `limit` is the gradient norm's, None for none."""
        limited = {} if limit is None else {"limit": limit}
        with self._compiling("step", placed):
            return self.steps.train(state, placed, self.reference, **limited)

    def evaluate(self, params: Params, batch: Batch) -> Means:
        """The metrics' means on a batch of the host."""
        with self._compiling("evaluation", batch):
            return self.steps.evaluate(params, self.place(batch), self.reference)

    @contextlib.contextmanager
    def _compiling(self, what: str, batch: Batch) -> Iterator[None]:
        """Say before and after a call that it compiles, which takes long; the call does not wait for the devices."""
        shape = batch.tokens.shape
        if (what, shape) in self._compiled:
            yield
            return
        self._compiled.add((what, shape))
        name = f"the {what} ({shape[0]} rows of {shape[1]} tokens)"
        self.say(f"compiling {name}")
        started = time.perf_counter()
        yield
        self.say(f"compiled {name} in {time.perf_counter() - started:.1f} s")

    @property
    def largest(self) -> str:
        """What has been compiled, or was to be, for the most tokens."""
        what, shape = max(self._compiled, key=lambda each: math.prod(each[1]), default=("step", (0, 0)))
        return f"the {what} on {shape[0]} rows of {shape[1]} tokens"

    def explain(self, params: Params, batch: Batch) -> list[str]:
        """What is not finite where a batch of the host is trained on, a line for each finding."""
        return self.diagnosis.explain(params, self.reference, self.place(batch), self.source.data)


@dataclass
class _Clock:
    """When steps are finished, what lies between them left out."""

    since: float
    finished: float | None = None

    def note_if_finished(self, late: FinishedStep) -> None:
        """Take the time now if the step is done: where dispatch blocks, it is long done when its metrics are read."""
        if self.finished is None and all(value.is_ready() for value in late.report.values()):
            self.finished = time.perf_counter()

    def seconds(self, late: FinishedStep) -> float:
        """How long the step took; waits for it."""
        jax.block_until_ready(late.report)
        finished = self.finished or time.perf_counter()
        seconds, self.since, self.finished = finished - self.since, finished, None
        return seconds


def train(run: Training, source: BatchSource, programs: Programs, limit_at: Callable[[int], np.float32 | None]) -> None:
    """Take all steps that are left, or those until the run is asked to stop, and call its hooks.

    Args:
        limit_at: from a step to the largest gradient norm with which it is taken; None where there is none.

    Raises Stopped where the run is asked to stop before its first step, and whatever a hook raises.
    """
    for hook in run.hooks:
        hook.before_first_step(run)
    if run.stop_reason is not None and run.step == 0:
        raise Stopped(run.stop_reason)
    if run.step < run.total_steps and run.stop_reason is None:
        _take_steps(run, source, programs, limit_at)
    for hook in run.hooks:
        hook.at_end(run)


def _take_steps(run: Training, source: BatchSource, programs: Programs, limit_at: Callable[[int], Any]) -> None:
    def prepared(step: int) -> tuple[Batch, BatchFacts, Batch]:
        """A batch, what is logged of it, and the same on the devices: the transfer overlaps with the step before."""
        batch = source.batch_at(step)
        return batch, source.plan_at(step), programs.place(batch)

    def read(late: FinishedStep) -> None:
        late.seconds = clock.seconds(late)
        for hook in run.hooks:
            hook.after_step(run, late)

    with ThreadPoolExecutor(1, thread_name_prefix="packer") as packer:
        ahead: Future[tuple[Batch, BatchFacts, Batch]] | None = packer.submit(prepared, run.step)
        late: FinishedStep | None = None
        clock = _Clock(time.perf_counter())
        while run.step < run.total_steps and run.stop_reason is None:
            batch, facts, placed = (ahead or packer.submit(prepared, run.step)).result()
            step = run.step + 1
            ahead = packer.submit(prepared, step) if step < run.total_steps and source.ready(step) else None
            if late is not None:
                clock.note_if_finished(late)
            limit = limit_at(step)
            run.state, report = programs.train(run.state, placed, limit)
            run.step, run.num_tokens = step, run.num_tokens + facts.num_tokens
            if late is not None:
                read(late)  # while the devices work on this step
            late = FinishedStep(step, batch, run.num_tokens, facts.efficiency, limit, report)
            if step == run.first_step:
                read(late)  # at once: how long compiling took is reported first
                late = None
            wanted = [hook.wants_pause(run) for hook in run.hooks]  # all are asked, on every process alike
            if any(wanted) or run.stop_reason is not None:
                if late is not None:
                    read(late)
                    late = None
                for hook in run.hooks:
                    hook.at_pause(run)
                clock = _Clock(time.perf_counter())
