"""What finished or running runs have left on disk, checked: configuration, metrics, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_jax.config import Config
from rpo_jax.config.reading import load_config
from rpo_jax.core.files import inside, shortest_names
from rpo_jax.core.jsonl import read_jsonl
from rpo_jax.runs.folder import data_notes, held_out_examples
from rpo_jax.runs.tracking import METRICS
from rpo_jax.training.hooks.samples import SAMPLES

MAX_STEP = 2**53  # a browser knows no larger integers


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        name: what tells it from the other runs of a report: as few last parts of its path as do.
        metrics: lines of metrics.jsonl, as written.
        samples: lines of samples.jsonl; none where the run did not sample.
        data_notes: what of its data was cut, and what else is worth a word.
        held_out: its held-out examples, where it says how many.
    """

    name: str
    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data_notes: list[str]
    held_out: int | None


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """The runs in these folders, in this order.

    Raises ValueError for a folder that holds no run, a run without metrics, a damaged file (with its line), and a
    folder given twice. A last line that a kill cut short is left out.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    for argument, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"--run {argument} is given more than once; give every run once.")
    names = shortest_names(paths)
    return [_read_run(argument, path, name) for argument, path, name in zip(folders, paths, names, strict=True)]


def _read_run(argument: str, folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise ValueError(f"--run {argument} is no folder; give the one that run.dir named.")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--run {argument} holds no run: it has no config.yaml; give the folder that run.dir named.")
    config_file, metrics_file, samples_file = (inside(folder, file) for file in ("config.yaml", METRICS, SAMPLES))
    try:
        config = load_config(config_file)
    except ValueError as error:  # YAML's own runs over several lines
        raise ValueError(" ".join(str(error).split())) from None
    metrics = read_jsonl(metrics_file, ("step",))
    _check(metrics_file, metrics, {})
    if not metrics:
        raise ValueError(
            f"--run {argument} has no metrics yet: {METRICS} is missing or empty; let it reach a first step."
        )
    kinds = {"row_id": str, "prompt": str, "response": str}
    samples = read_jsonl(samples_file, ("step", *kinds))
    _check(samples_file, samples, kinds)
    notes = data_notes(folder, config.data.max_tokens)  # refuses a damaged file of counts
    return RunRecord(name, folder, config, metrics, samples, notes, held_out_examples(folder))


def _check(file: Path, rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, type]) -> None:
    """ValueError for the first line, in a folder that others may have made, that is not what a run writes."""
    for number, row in enumerate(rows, start=1):
        wrong = [name for name, kind in kinds.items() if not isinstance(row[name], kind)]
        if not 0 <= row["step"] < MAX_STEP:
            wrong.append("step")
        if wrong:
            raise ValueError(f"{file}:{number} is damaged: its {wrong[0]!r} is none; remove that line.")
