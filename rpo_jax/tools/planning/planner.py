"""A plan from a configuration: what is compiled, which micro-batch fits, and what is printed and written of it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from rich.console import Console

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.core.command import print_error
from rpo_jax.core.files import atomic_write, check_writable
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.tools.planning.compiled import OutOfMemory, compile_step
from rpo_jax.tools.planning.estimate import Estimate, counted, shape_of
from rpo_jax.tools.planning.printing import assumptions, print_assumptions, print_plan, print_ranking
from rpo_jax.tools.planning.search import Trial, judged, largest_micro_batch, ranked, search, with_micro_rows
from rpo_jax.tools.planning.targets import Target, target_of
from rpo_jax.tools.planning.workload import Lengths, assumed_lengths, planned_model

_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned besides a configuration; the options of `rpo_jax.plan` say what each of these is."""

    topology: str | None = None
    devices: int | None = None
    device_memory: str | None = None
    chip: str | None = None
    model: str | None = None
    rows: int | None = None
    row_tokens: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    lengths: Path | None = None
    search: bool = False
    find_largest: bool = True
    json: Path | None = None


@dataclass(frozen=True)
class Planner:
    """Compiles a training step for a target, with the batches that the assumed lengths give.

    Attributes:
        fixed: rows and row tokens, where given.
        asked: the attention that the user's configuration names.
    """

    config: Config
    model: ModelConfig
    target: Target
    lengths: Lengths
    fixed: tuple[int, int] | None
    asked: str

    def compile_one(self, config: Config) -> Estimate:
        """Compile and count. Raises as compile_step does."""
        batch = shape_of(config, self.lengths, self.target, self.fixed)
        done = compile_step(config, self.model, self.target, batch)
        return counted(config, self.model, self.target, self.lengths, batch, done)

    def rows_of(self, config: Config) -> tuple[int, int]:
        """Rows of a configuration's batch, and how many devices share them."""
        mesh = sharding.make_mesh(config.mesh, self.target.devices)
        return shape_of(config, self.lengths, self.target, self.fixed).rows, sharding.row_shards(mesh)

    @property
    def attention(self) -> str:
        name = self.config.model.attention
        if name != self.asked:
            return f"{name}, in place of {self.asked}, whose library cannot be asked here"
        if name != "auto":
            return name
        tokens = shape_of(self.config, self.lengths, self.target, self.fixed).row_tokens
        asked = models.Asked.of(self.model, self.config.model.compute_dtype, tokens)
        chosen = models.attention_name("auto", self.target.platform, asked)
        return f"{chosen}, the best for this platform and rows of {tokens}"

    def largest(self, planned: Trial) -> tuple[str, list[Trial]]:
        """The largest micro-batch that fits, in words, and what was compiled to find it."""
        config = self.config
        if planned.fits and config.batch.micro_rows is None:
            return "the whole batch: no micro-batches are needed", []
        rows, shards = self.rows_of(with_micro_rows(config, None))
        largest, tried = largest_micro_batch(self.compile_one, planned, rows, shards)
        if largest is None:
            return "none: not even one row per device fits", tried
        assert largest.estimate is not None
        micro = largest.config.batch.micro_rows
        if micro is None:
            return f"the whole batch of {rows} rows: no micro-batches are needed", tried
        return f"{micro} rows of {largest.estimate.row_tokens} tokens", tried


def parse_bytes(text: str) -> float:
    """80GiB, 80GB or 81920MiB in bytes."""
    match = re.fullmatch(r"([\d.]+) *([A-Za-z]+)", text)
    if not match or match.group(2).lower() not in _UNITS or not float(match.group(1)):
        raise ValueError(f"--device-memory {text} is no size; write it as 80GB or 76GiB.")
    return float(match.group(1)) * _UNITS[match.group(2).lower()]


def make_planner(config: Config, options: PlanOptions) -> Planner:
    """ValueError for whatever cannot be planned; nothing is compiled yet."""
    models.check_choices(config.model, config.lora)
    if (options.topology is None) == (options.devices is None):
        raise ValueError("give one of --topology (h100:8, v5p:4x4x4) and --devices (a number of GPUs).")
    sizes = [size for size in (options.rows, options.row_tokens) if size is not None]
    if len(sizes) == 1 or min(sizes, default=1) < 1:
        raise ValueError("--rows and --row-tokens belong together, both positive.")
    fixed = (sizes[0], sizes[1]) if sizes else None
    lengths = assumed_lengths(config, options.prompt_tokens, options.response_tokens, options.lengths)
    model = planned_model(config, options.model)
    memory = parse_bytes(options.device_memory) if options.device_memory else None
    target, asked = target_of(_topology(options), memory), config.model.attention
    # A kernel of a library that only a GPU's machine has is planned as one that is as sparing.
    stand_in = models.attention_kind(asked, target.platform).stand_in
    if stand_in:
        config = replace(config, model=replace(config.model, attention=stand_in))
    return Planner(config, model, target, lengths, fixed, asked)


def _topology(options: PlanOptions) -> str:
    """The devices by one name: so many GPUs are those of `h100:8`."""
    if options.topology is not None:
        if options.chip:
            raise ValueError(f"--chip goes with --devices; --topology {options.topology} names the chip itself.")
        return options.topology
    return f"{options.chip or 'h100'}:{options.devices}"


def plan(config: Config, options: PlanOptions) -> bool:
    """Print the plan of a configuration, or of all meshes that could hold it, and write it where asked to.

    Returns whether anything fits. Raises ValueError for what cannot be planned or what the compiler refuses.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs: chips that are here are left alone
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    if options.json is not None:
        check_writable(options.json.parent)
    planner = make_planner(config, options)
    if options.search:
        trials, largest = _searched(planner, console), "see the plans"
    else:
        trials, largest = _as_configured(planner, console, find_largest=options.find_largest)
    if options.json is not None:
        _write(options.json, planner, trials, largest)
    return any(trial.fits for trial in trials)


def _searched(planner: Planner, console: Console) -> list[Trial]:
    trials = []
    for trial in search(planner.compile_one, planner.config, planner.model, planner.target, planner.rows_of):
        trials.append(trial)
        console.print(f"tried {len(trials)}: {trial.config.mesh}, {trial.config.model.remat}", markup=False)
    trials = ranked(trials)
    print_ranking(console, trials, planner.target)
    print_assumptions(console, planner.target, planner.attention)
    return trials


def _as_configured(planner: Planner, console: Console, *, find_largest: bool) -> tuple[list[Trial], str]:
    """The configuration as it is, or with the largest micro-batch that fits."""
    try:
        planned = judged(planner.config, planner.compile_one(planner.config))
    except OutOfMemory as error:
        planned = Trial(planner.config, None, str(error))
    largest, tried = planner.largest(planned) if find_largest else ("not asked for", [])
    shown = planned.estimate or next((trial.estimate for trial in tried if trial.fits), None)
    if shown is None:
        print_error(f"{planner.target.name}: {planned.reason}. Largest micro-batch that fits: {largest}.")
    else:
        if planned.estimate is None:
            console.print(f"as configured it does not fit: {planned.reason}; planned instead:", markup=False)
        print_plan(console, shown, planner.target, largest, planner.lengths.source, planner.attention)
    return [planned, *(trial for trial in tried if trial is not planned)], largest


def _write(path: Path, planner: Planner, trials: list[Trial], largest: str) -> None:
    content = {
        "target": planner.target.name,
        "assumptions": assumptions(planner.target, planner.attention),
        "batch": planner.lengths.source,
        "largest_micro_batch": largest,
        "plans": [
            {
                "mesh": list(sharding.axis_sizes(trial.config.mesh).values()),
                "remat": trial.config.model.remat,
                "micro_rows": trial.config.batch.micro_rows,
                "reason": trial.reason,
                "estimate": trial.estimate and trial.estimate.as_dict(),
            }
            for trial in trials
        ],
    }
    atomic_write(path, json.dumps(content, indent=1) + "\n")
