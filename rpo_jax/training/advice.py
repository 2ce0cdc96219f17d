"""What a configuration makes of its data that nobody would want, in numbers: said before training, and by doctor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rpo_jax.config import Config
from rpo_jax.training.optimizer import MUON_RMS, learning_rates

# Of the standard deviation of new weights, 0.02 in most models: how far a run has to take a weight to teach it anything
# that can be measured. An epoch of DPO with the paper's rate of 5e-7 takes it by 6 % (2,500 steps); what is left of
# this share once an export rounds to bfloat16 is nothing.
LEAST_SHARE = 1e-3
LORA_FACTOR = 10.0  # a product of two small factors: LoRA needs about ten times the rate of full training
PRESETS = {False: ("configs/small_data.yaml", 5e-6), True: ("configs/small_data_lora.yaml", 2e-4)}


class Advice(NamedTuple):
    """A fact, and what to do about it."""

    fact: str
    fix: str

    def __str__(self) -> str:
        return f"warning: {self.fact}; {self.fix}"


def advise(config: Config, draws: int, steps: int, weight_scale: float) -> list[Advice]:
    """What to say of a run.

    Args:
        draws: pairs, or with unpaired data the responses of the more frequent kind.
        steps: optimizer steps.
        weight_scale: standard deviation of the model's new weights.
    """
    candidates = [_learning_rate(config, steps, weight_scale), _batch(config, draws)]
    return [advice for advice in candidates if advice is not None]


def _learning_rate(config: Config, steps: int, weight_scale: float) -> Advice | None:
    """Told where the run ends within its warm-up, and where it moves no weight far enough to teach anything."""
    optim, adapts = config.optim, config.lora.rank > 0
    rates = learning_rates(optim, steps)
    # The optimizers take a step of the learning rate along a gradient that stays the same, Muon of a share of it;
    # RMSprop of more at first, as it does not correct the bias of its running mean.
    seen = 1 - optim.decay ** np.arange(1, steps + 1)  # share of the mean that gradients have filled
    first = 1 / np.sqrt(np.maximum(seen, 1e-12))
    lengths = {"rmsprop": first, "muon": MUON_RMS}.get(optim.name, 1.0)
    distance, least = float(np.sum(rates * lengths)), weight_scale * LEAST_SHARE * (LORA_FACTOR if adapts else 1.0)
    warming = steps <= optim.warmup_steps
    peak = f"the highest learning rate of the run's {steps:,} steps is {rates.max():.2g}"
    if warming:
        peak += (
            f", {rates.max() / optim.learning_rate:.0%} of optim.learning_rate={optim.learning_rate:g}, as they end "
            f"within optim.warmup_steps={optim.warmup_steps}"
        )
    warmup = f"optim.warmup_steps={steps // 10}"
    if distance < least:
        preset, rate = PRESETS[adapts]
        moved = f"together they move a weight by {distance:.1g} at most, where weights are about {weight_scale:g}"
        fix = f"set optim.learning_rate={rate:g} or more" + (f" and {warmup}" if warming else "")
        return Advice(f"{peak}: {moved}, so that nothing will be learnt", f"{fix}, as {preset} does, or train longer")
    return Advice(peak, f"set {warmup}, or train longer") if warming else None


def _batch(config: Config, draws: int) -> Advice | None:
    pairs = config.batch.pairs
    if pairs <= draws:
        return None
    what = {"paired": "pairs", "unpaired": "responses of a kind", "grouped": "prompts"}[config.data.pairing]
    return Advice(
        f"batch.pairs={pairs} is more than the {draws:,} {what} of the training data: every step has all of them, and "
        f"{pairs - draws:,} of its slots stay empty",
        f"set batch.pairs to {draws} or less",
    )
