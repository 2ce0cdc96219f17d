"""What a run calls at its events, and what it hands over then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rpo_jax.core.records import Batch
    from rpo_jax.hosts.stopping import Stopping
    from rpo_jax.training.step import TrainState

Metrics = dict[str, float]


@dataclass
class FinishedStep:
    """A step whose metrics can be read.

    Attributes:
        step: its number, from 1.
        batch: on the host.
        num_tokens: that the run has trained on, those of this step included.
        packing_efficiency: share of the batch's positions that hold a token.
        limit: of the gradient's norm; None where there was none.
        report: the step's metrics on the devices; `metrics` has them as floats.
        seconds: that the step took; pauses before it are left out.
    """

    step: int
    batch: Batch
    num_tokens: int
    packing_efficiency: float
    limit: np.float32 | None
    report: Mapping[str, Any]  # jax.Arrays, which say whether they are ready
    seconds: float = math.nan

    @cached_property
    def metrics(self) -> Metrics:
        """The step's own metrics, as metrics.jsonl names them; read from the devices the first time."""
        return {name: float(value) for name, value in self.report.items() if name not in ("skipped", "compared")}


@dataclass
class Training:
    """How far a run is.

    Attributes:
        state: that of `step`. The next step gives its arrays up: whoever keeps one copies it (jax.device_get).
        step: steps begun so far, those of earlier parts of the run included.
        num_tokens: that these steps train on.
        steps_per_epoch: None where the batches have no epochs.
        hooks: all of the run's, in the order in which they are called.
        first_step: the first one that this part of the run takes.
    """

    state: TrainState
    step: int
    num_tokens: int
    total_steps: int
    steps_per_epoch: int | None
    stopping: Stopping
    hooks: Sequence[Hook]
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.step + 1

    @property
    def stop_reason(self) -> str | None:
        """Why the run stops early; None where it goes on."""
        return self.stopping.reason

    def stop(self, reason: str) -> None:
        """Have the run save and end after the step that it is at; with several processes, all of them must call it."""
        self.stopping.reason = self.stopping.reason or reason

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether the step, `self.step` where none is given, is the last one or a multiple; 0 is the last one only."""
        step = self.step if step is None else step
        return step == self.total_steps or (every > 0 and step % every == 0)

    def place(self, step: int) -> Metrics:
        """What a line of metrics begins with."""
        epoch = {} if self.steps_per_epoch is None else {"epoch": step / self.steps_per_epoch}
        return {"step": step, **epoch}


class Hook:
    """Something that a run does besides its steps; override what is needed, the rest does nothing.

    A run calls its hooks one after another at each event, on every process, in the order that training/run.py lists:
    hooks given to `rpo_jax.run` come after those that log and evaluate, in the order given, and before the one that
    saves. What a hook wrote for a step is therefore there once that step's checkpoint is, and a resumed run goes on
    after both. An exception ends the run.

        class StopWhenLearned(rpo_jax.Hook):
            def after_evaluation(self, run, metrics):
                if metrics["eval_rewards/accuracies"] > 0.9:
                    run.stop("accuracy")

        rpo_jax.run(config, hooks=[StopWhenLearned()])
    """

    def before_first_step(self, run: Training) -> None:
        """Called once, with the state that this part of the run starts from; `run.step` is 0 for a new run.

        Also where all steps have been taken already.
        """

    def after_step(self, run: Training, finished: FinishedStep) -> None:
        """Called once for every step, in order, when its metrics can be read.

        The devices work on the next step by then, and `run.state` and `run.step` are that one's: reading the state here
        waits for it. A hook that wants the state of a certain step asks for a pause.
        """

    def wants_pause(self, run: Training) -> bool:
        """Whether to call all hooks' `at_pause` after `run.step`; asked once, as soon as that step has begun."""
        return False

    def at_pause(self, run: Training) -> None:
        """Called after a step that some hook wanted a pause after, when every step so far has had its `after_step`.

        `run.state` is the state of `run.step`. Every run pauses after its last step, and where it is to stop.
        """

    def before_evaluation(self, run: Training) -> None:
        """Called when an evaluation is due, before the first step's included, also where there is no held-out data."""

    def after_evaluation(self, run: Training, metrics: Metrics) -> None:
        """Called with the line of metrics.jsonl that an evaluation gives; its names begin with `eval_`."""

    def at_end(self, run: Training) -> None:
        """Called once where the run is finished or stops early, its last checkpoint on disk; not after an exception."""
