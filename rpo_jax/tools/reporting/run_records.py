"""What finished or running runs have left on disk, checked: configuration, metrics, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_jax.config import Config
from rpo_jax.config.reading import load_config
from rpo_jax.core.jsonl import read_jsonl
from rpo_jax.runs.folder import data_notes
from rpo_jax.runs.tracking import METRICS
from rpo_jax.training.hooks.samples import SAMPLES


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        name: what tells it from the other runs of a report: as few last parts of its path as do.
        metrics: lines of metrics.jsonl, as written.
        samples: lines of samples.jsonl; none where the run did not sample.
        data_notes: what of its data was cut, and what else is worth a word.
    """

    name: str
    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    data_notes: list[str]


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """The runs in these folders, in this order.

    Raises ValueError for a folder that holds no run, a run without metrics, a damaged file (with its line), and a
    folder given twice. A last line that a kill cut short is left out.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    for given, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"--run {given} is given more than once; give every run once.")
    names = _names(paths)
    return [_read_run(given, path, name) for given, path, name in zip(folders, paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths differ somewhere")


def _read_run(given: str, folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise ValueError(f"--run {given} is no folder; give the one that run.dir named.")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--run {given} holds no run: it has no config.yaml; give the folder that run.dir named.")
    try:
        config = load_config(folder / "config.yaml")
    except ValueError as error:  # YAML's own runs over several lines
        raise ValueError(" ".join(str(error).split())) from None
    metrics = read_jsonl(folder / METRICS, ("step",))
    if not metrics:
        raise ValueError(f"--run {given} has no metrics yet: {METRICS} is missing or empty; let it reach a first step.")
    samples = read_jsonl(folder / SAMPLES, ("step", "row_id", "prompt", "response"))
    return RunRecord(name, folder, config, metrics, samples, data_notes(folder, config.data.max_tokens))
