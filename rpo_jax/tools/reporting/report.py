"""The page of training runs: what they logged, and what their data and checkpoints show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpo_jax.config import resolve
from rpo_jax.core.files import atomic_write, check_writable, inside
from rpo_jax.runs.folder import MODEL, newest_record
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.reporting import contrast_panel, rewards_panel
from rpo_jax.tools.reporting.report_page import make_page
from rpo_jax.tools.reporting.run_records import RunRecord, read_runs
from rpo_jax.training.prepare import Prepared, prepare

LEFT_OUT = "Left out on request."


def write_report(
    runs: Sequence[str],
    out: str | Path = "report.html",
    *,
    with_matrix: bool = True,
    with_rewards: bool = True,
    batch_step: int = 1,
    base: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write the page of these run folders and return where it is; the last of them, the newest as a rule, comes first.

    Args:
        batch_step: the training step, counted from 1, whose contrast matrix is shown.
        base: of the LoRA runs among these: where the model that they started from is now, if it has moved.

    Raises ValueError for a folder that holds no run, a run without metrics, damaged files, data or checkpoints that
    cannot be used, and an `out` that cannot be written.
    """
    reporter = reporter or Reporter()
    out = Path(out).expanduser()
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} must be a file in a folder that exists; give another.")
    check_writable(out.parent)
    if batch_step < 1:
        raise ValueError(f"--batch-step {batch_step} must be at least 1, the first training step.")
    records = read_runs(runs)[::-1]
    if base is not None and not any(record.config.lora.rank for record in records):
        raise ValueError(f"--base {base} is for LoRA runs, and none of these is one; leave it out.")
    matrices, scores = [], []
    for record in records:
        prepared = _prepared(record, reporter) if with_matrix or with_rewards else None
        matrices.append(_matrix(record, prepared, batch_step) if with_matrix and prepared else LEFT_OUT)
        scores.append(_rewards(record, prepared, reporter, base) if with_rewards and prepared else LEFT_OUT)
    atomic_write(out, make_page(records, matrices, scores))
    return out


def _prepared(record: RunRecord, reporter: Reporter) -> Prepared:
    reporter.say(f"{record.name}: reading its data again: {record.config.data.name}")
    try:
        return prepare(record.config, reporter, inside(record.folder, MODEL))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{record.folder}: the contrast matrix and the rewards need the run's data: {error} (with --no-matrix "
            "--no-rewards the report does without)"
        ) from None


def _matrix(record: RunRecord, prepared: Prepared, step: int) -> dict[str, Any] | str:
    method = resolve(record.config)
    if record.config.train.rounds:
        return "The run samples its data in rounds; its folder has them."
    if method.weights is None:
        described = method.objective.description
        return f"{described[0].upper()}{described[1:]} has no contrast matrix."
    _check_data(record, prepared)
    found = contrast_panel.batch_contrast(record.config, prepared, step)
    if not found.weights.size:  # as where ranked answers are chosen and rejected by a threshold
        missing = "chosen" if not len(found.chosen) else "rejected"
        return f"The batch of step {step} has no {missing} response; `--batch-step` takes another."
    return contrast_panel.for_page(found)


def _check_data(record: RunRecord, prepared: Prepared) -> None:
    """ValueError for data that the run was not trained on: prompts of some other file that a stranger's folder names
    are not to be shown."""
    path, now = record.config.data.name, prepared.origins["train"]["data"]
    trained_on = (newest_record(record.folder) or {}).get("data")
    at_home = Path(record.config.run.dir).expanduser().resolve() == record.folder
    if trained_on is None and not at_home:
        raise ValueError(
            f"{record.folder} was made in another place, and has no checkpoint that tells whether it was trained on "
            f"{path}; with --no-matrix the report does without."
        )
    if trained_on not in (None, now):
        raise ValueError(
            f"{path} does not hold the data that {record.folder} was trained on; with --no-matrix the report does "
            "without."
        )


def _rewards(record: RunRecord, prepared: Prepared, reporter: Reporter, base: str | None) -> dict[str, Any] | str:
    if resolve(record.config).objective.uses_reward_head:
        return "The run trains a reward model: its held-out rewards are among the curves."
    if record.config.train.rounds:
        return "The run samples its data in rounds: the rewards of its answers are among the curves."
    if prepared.held_out is None:
        return "The run has no held-out data."
    try:
        own_base = base if record.config.lora.rank else None
        found = rewards_panel.held_out_scores(record.folder, record.config, prepared, reporter, own_base)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} (with --no-rewards the report does without)") from None
    return rewards_panel.for_page(*found, rewards=resolve(record.config).reference is not None)
