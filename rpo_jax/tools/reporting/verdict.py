"""What came out of a run in one sentence, which opens its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_jax.runs.folder import ranked_steps
from rpo_jax.runs.tracking import is_tied
from rpo_jax.tools.reporting.curves import finite
from rpo_jax.tools.reporting.run_records import RunRecord
from rpo_jax.training.hooks.guard import FILE

REWARDS, LOG_PROBS = "eval_rewards/accuracies", "eval_logps/accuracies"
WORSE = 0.01  # a held-out loss that has risen by more than this share of its least is past its best
NEAR = 0.005  # accuracies that differ by less are level, where nobody knows of how many pairs they are
# What decides which rows are held out, and what of them is read.
HELD_OUT_BY = (
    "path",
    "mix",
    "split",
    "eval_path",
    "eval_split",
    "eval_rows",
    "layout",
    "max_tokens",
    "max_prompt_tokens",
)


def verdict(records: Sequence[RunRecord]) -> str:
    """Of the first of these runs; of several, also which of the others is ahead of it.

    Accuracies are of held-out pairs. Runs are compared by log-probs, and only where they name the same held-out data;
    they are level where chance alone takes two accuracies on as many pairs as far apart in one case of twenty.
    """
    first, others = records[0], records[1:]
    parts = [_outcome(first)]
    parts += [part for part in (_past_its_best(first), _skipped(first), _beside(first, others)) if part]
    return "; ".join(parts) + "."


def _outcome(record: RunRecord) -> str:
    steps = max(line["step"] for line in record.metrics)
    opening = f"After {steps:,} step{'s' * (steps != 1)}, {record.config.objective.name}"
    training = [line for line in record.metrics if "loss" in line]
    trained, held_out = _values(record, "loss"), _values(record, "eval_loss")
    if training and finite(training[-1]["loss"]) is None:
        since = f"since step {trained[-1][0]:,}" if trained else "at all"
        return f"{opening} has diverged: no loss was a finite number {since}"
    moved = f"its held-out loss {_moved(held_out)}" if held_out else ""
    evaluated = [line["eval_loss"] for line in record.metrics if "eval_loss" in line]
    if evaluated and finite(evaluated[-1]) is None:
        moved = "its held-out loss is no finite number"
    if rewards := _values(record, "eval_reward"):  # of rounds
        distance = "".join(f" at a KL to the start of {kl:.3g} nats" for _, kl in _values(record, "eval_kl")[-1:])
        return f"{opening} is done: the reward of its answers to held-out prompts {_moved(rewards)}{distance}"
    if preferred := _preference(record):
        return f"{opening} {preferred}" + (f", and {moved}" if moved else "")
    if moved:
        return f"{opening} is done: {moved}"
    if trained:
        return f"{opening} is done: its training loss {_moved(trained)}, and no held-out data says what that is worth"
    return f"{opening} has logged no loss"


def _preference(record: RunRecord) -> str:
    """How often the chosen response is preferred: by rewards, where the objective has any, and by log-probs."""
    log_probs = _values(record, LOG_PROBS)
    before = f", {_percent(log_probs[0][1])} before" if len(log_probs) > 1 else ""
    rewarded = [line for line in record.metrics if finite(line.get(REWARDS)) is not None]
    if rewarded and is_tied(REWARDS, rewarded[-1]):
        return "ties on every held-out pair by rewards: it is where its reference is"
    pairs = "of the held-out pairs"
    if rewarded:
        share = f"prefers the chosen response of {_percent(rewarded[-1][REWARDS])} {pairs} by rewards"
        return f"{share} (by log-probs {_percent(log_probs[-1][1])}{before})" if log_probs else share
    return f"finds the chosen response likelier in {_percent(log_probs[-1][1])} {pairs}{before}" if log_probs else ""


def _values(record: RunRecord, key: str) -> list[tuple[int, float]]:
    """Step and value of every finite one."""
    return [(line["step"], line[key]) for line in record.metrics if finite(line.get(key)) is not None]


def _moved(values: Sequence[tuple[int, float]]) -> str:
    first, last = values[0][1], values[-1][1]
    if len(values) == 1:
        return f"is {first:.4g}"
    if f"{first:.3g}" == f"{last:.3g}":
        return f"has stayed at {last:.3g}"
    return f"{'fell' if last < first else 'rose'} from {first:.3g} to {last:.3g}"


def _past_its_best(record: RunRecord) -> str:
    losses = _values(record, "eval_loss")
    if len(losses) < 3:
        return ""
    step, least = min(losses, key=lambda point: point[1])
    risen = losses[-1][1] > least + WORSE * abs(least)
    if not risen or step == losses[0][0]:
        return ""
    sentence = f"that loss was least at step {step:,} ({least:.3g})"
    best, newest = ranked_steps(record.folder)
    return sentence if best == newest else f"{sentence}: `export --step best` takes the checkpoint of step {best:,}"


def _skipped(record: RunRecord) -> str:
    count = int((_values(record, "guard/bad_steps") or [(0, 0)])[-1][1])
    return f"{count} of the steps were skipped, {FILE} says why" if count else ""


def _beside(first: RunRecord, others: Sequence[RunRecord]) -> str:
    mine = _values(first, LOG_PROBS)
    by_name = {other.name: _values(other, LOG_PROBS) for other in others if _held_out(other) == _held_out(first)}
    rivals = {name: values[-1][1] for name, values in by_name.items() if values}
    if not mine or not rivals:
        return ""
    name = max(rivals, key=rivals.__getitem__)
    gap = mine[-1][1] - rivals[name]
    shares = f"{_percent(mine[-1][1])} against {_percent(rivals[name])}"
    if abs(gap) < _chance(mine[-1][1], rivals[name], first.held_out):
        of = f" of {first.held_out:,} pairs" if first.held_out else ""
        return f"by log-probs it is level with {name} ({shares}{of})"
    return f"by log-probs it is {'ahead of' if gap > 0 else 'behind'} {name} ({shares})"


def _chance(one: float, other: float, pairs: int | None) -> float:
    """What the difference of two shares of as many pairs has to reach to be more than chance, at 95 %."""
    return 1.96 * math.sqrt((one * (1 - one) + other * (1 - other)) / pairs) if pairs else NEAR


def _held_out(record: RunRecord) -> Mapping[str, Any]:
    return {name: getattr(record.config.data, name) for name in HELD_OUT_BY}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
