"""The curves of runs: which metrics share a panel, and their points over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rpo_jax.runs.tracking import TIED, is_tied
from rpo_jax.tools.reporting.run_records import RunRecord

MOST_SHOWN = 1e300  # an integer may be beyond any float
MOST_POINTS = 4000  # of a curve: more than a screen has columns, and a page of 100,000 is slow


class Panel(NamedTuple):
    """A chart of one metric of training, and of the held-out data where it is evaluated too."""

    section: str
    title: str
    key: str
    unit: str
    about: str


_LEARNING, _CONTRAST, _EXPERTS = "Learning", "Contrast", "Use of experts"
_SPEED, _ROUNDS = "Throughput, packing and memory", "Rounds"

PANELS = (
    Panel(_LEARNING, "Loss", "loss", "", "What the objective minimises"),
    Panel(_LEARNING, "Reward margin", "rewards/margins", "", "Reward of chosen minus rejected; rewards grow with beta"),
    Panel(_LEARNING, "Reward accuracy", "rewards/accuracies", "share of pairs", "Chosen reward higher"),
    Panel(_LEARNING, "Log-prob accuracy", "logps/accuracies", "share of pairs", "Chosen response likelier"),
    Panel(_LEARNING, "KL", "kl", "nats", "Distance from the reference: KTO's estimate; in rounds, of sampled answers"),
    Panel(_LEARNING, "Gradient norm", "grad_norm", "", "Before it is clipped"),
    Panel(_LEARNING, "Reward of chosen", "rewards/chosen", "", "beta times the log-ratio to the reference"),
    Panel(_LEARNING, "Reward of rejected", "rewards/rejected", "", "beta times the log-ratio to the reference"),
    Panel(_LEARNING, "Log-prob of chosen", "logps/chosen", "nats", "Summed over a response, averaged over responses"),
    Panel(_LEARNING, "Log-prob of rejected", "logps/rejected", "nats", "Summed over a response, averaged"),
    Panel(_LEARNING, "Learning rate", "learning_rate", "", "After warm-up and schedule"),
    Panel(
        _CONTRAST, "Weight on the own pair", "contrast/diagonal_weight", "", "1 is DPO; the rest is on other prompts"
    ),
    Panel(_CONTRAST, "Effective contrasts", "contrast/perplexity", "", "Perplexity of a row's weights"),
    Panel(_CONTRAST, "Temperature", "contrast/temperature", "", "tau, in units of cosine distance"),
    Panel(_CONTRAST, "Weight on related prompts", "contrast/related_weight", "", "Other prompts with cosine above 0.5"),
    Panel(_EXPERTS, "Load-balancing loss", "aux_loss", "", "Without its weight; experts a token if use is even"),
    Panel(_EXPERTS, "Largest share", "experts/largest_share", "", "Of a layer's choices: the expert that is used most"),
    Panel(_EXPERTS, "Smallest share", "experts/smallest_share", "", "Of a layer's choices: the one that is used least"),
    Panel(_EXPERTS, "Entropy of shares", "experts/entropy", "nats", "Mean over layers; log of their number if even"),
    Panel(_ROUNDS, "Reward of answers", "reward", "", "Mean score of what a round sampled; held out: of other prompts"),
    Panel(_ROUNDS, "Length of answers", "completions/mean_length", "tokens", "Of what a round sampled"),
    Panel(_ROUNDS, "Rows", "rounds/rows", "", "That a round trains on"),
    Panel(_SPEED, "Packing efficiency", "packing/efficiency", "", "Share of all positions that hold a token"),
    Panel(_SPEED, "Tokens", "tokens_per_second", "per second", "Packed tokens trained on"),
    Panel(_SPEED, "Pairs", "pairs_per_second", "per second", ""),
    Panel(_SPEED, "Step time", "step_seconds", "seconds", "Between two logged steps, averaged"),
    Panel(_SPEED, "Peak host memory", "memory/host_gib", "GiB", "Of the first process, from its start"),
    Panel(_SPEED, "Peak device memory", "memory/device_gib", "GiB", "Of the first process's fullest device"),
)


def finite(value: Any) -> float | None:
    """A number that JSON has; None leaves a gap in the curve."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MOST_SHOWN < value < MOST_SHOWN:  # NaN is not between
        return None
    return float(f"{value:.6g}")


def points(record: RunRecord, key: str) -> list[list[Any]]:
    """[step, value] of every line that has this metric, ascending; of a step logged twice the last.

    An accuracy that is 0 because all pairs tie has a word besides, which is shown in its place. Of more than
    MOST_POINTS every second one, or every third, and so on, back from the newest.
    """
    lines = {line["step"]: line for line in record.metrics if key in line}
    steps = sorted(lines, reverse=True)
    steps = steps[:: -(-len(steps) // MOST_POINTS) or 1][::-1]
    return [[step, finite(lines[step][key]), *([TIED] if is_tied(key, lines[step]) else [])] for step in steps]


def make_panels(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The panels for which any run has logged something, with a training and a held-out curve of each run.

    Losses of different objectives are different quantities: each objective has a panel of its own for them.
    """
    panels = []
    for panel in PANELS:
        keys = {"train": panel.key, "held_out": f"eval_{panel.key}"}
        curves = [{part: points(record, key) for part, key in keys.items()} for record in records]
        for title, runs in _panels_of(panel, records).items():
            own = [curve if run in runs else {part: [] for part in keys} for run, curve in enumerate(curves)]
            if any(curve["train"] or curve["held_out"] for curve in own):
                panels.append({**panel._asdict(), "title": title, "curves": own})
    return panels


def _panels_of(panel: Panel, records: Sequence[RunRecord]) -> dict[str, set[int]]:
    """The titles under which a metric is shown, and which runs belong to each."""
    objectives = [record.config.objective.name for record in records]
    if panel.key != "loss" or len(set(objectives)) == 1:
        return {panel.title: set(range(len(records)))}
    return {
        f"{panel.title} of {name}": {run for run, own in enumerate(objectives) if own == name}
        for name in dict.fromkeys(objectives)
    }


def final_values(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Rows of the table that opens a report: the newest value of a metric in training and on the held-out data."""
    return [
        {
            "title": panel["title"],
            "unit": panel["unit"],
            "about": panel["about"],
            "values": [{part: _newest(curve[part]) for part in curve} for curve in panel["curves"]],
        }
        for panel in make_panels(records)
        if panel["key"] != "learning_rate"
    ]


def _newest(curve: list[list[Any]]) -> float | str | None:
    if not curve:
        return None
    return "not finite" if curve[-1][1] is None else curve[-1][-1]
