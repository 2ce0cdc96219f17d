"""Requests to stop: signals, and the time limit, under which a run stops early enough to save."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.training.hooks.hook import FinishedStep, Hook, Training

SAVED_BYTES_PER_SECOND = 2e8  # until a save has shown how fast the disk is


@dataclass
class StopRequests(Hook):
    """Asks after every step whether to stop; under a time limit, in time for a step and twice the longest save so far.

    The longest step is one without compilation: the first does not count.
    """

    checkpoints: Checkpoints
    _longest_step: float = 0.0
    _guessed_save: float = 0.0

    def before_first_step(self, run: Training) -> None:
        own = [part.data.nbytes for leaf in jax.tree.leaves(run.state) for part in leaf.addressable_shards]
        self._guessed_save = 1 + sum(own) / SAVED_BYTES_PER_SECOND

    def after_step(self, run: Training, finished: FinishedStep) -> None:
        if finished.step != run.first_step:
            self._longest_step = max(self._longest_step, finished.seconds)

    def wants_pause(self, run: Training) -> bool:
        return run.stopping.requested("steps", self.save_seconds(run) + 2 * self._longest_step) is not None

    def save_seconds(self, run: Training) -> float:
        """What must be left of a time limit for the last save."""
        return 2 * self.checkpoints.longest_save(default=self._guessed_save) if run.stopping.has_limit else 0.0
