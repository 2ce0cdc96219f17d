"""Plan a run on devices that are not here: `python -m rpo_jax.plan --config C --topology v5p:4x4x4`.

The real training step is compiled ahead of time, by libtpu for TPUs and for virtual CPU devices in place of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from rich.console import Console

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.config.reading import parse_config
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.tools.planning.chips import CHIPS, GPUS
from rpo_jax.tools.planning.compiled import OutOfMemory, Target, gpu_target, tpu_target
from rpo_jax.tools.planning.estimate import Estimate, estimate, shape_of
from rpo_jax.tools.planning.printing import assumptions, print_plan, print_ranking
from rpo_jax.tools.planning.search import Trial, judged, largest_micro_batch, ranked, search
from rpo_jax.tools.planning.workload import KNOWN_MODELS, Lengths, assumed_lengths, planned_model

_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        fixed: rows and row tokens, where given.
    """

    config: Config
    model: ModelConfig
    target: Target
    lengths: Lengths
    fixed: tuple[int, int] | None
    find_largest: bool

    def compile_one(self, config: Config) -> Estimate:
        return estimate(config, self.model, self.target, self.lengths, self.fixed)

    def rows_of(self, config: Config) -> tuple[int, int]:
        """Rows of a configuration's batch, and how many devices share them."""
        mesh = sharding.make_mesh(config.mesh, self.target.devices)
        return shape_of(config, self.lengths, self.target, self.fixed).rows, sharding.row_shards(mesh)


def parse_bytes(text: str) -> float:
    """80GiB, 80GB or 81920MiB in bytes."""
    match = re.fullmatch(r"([\d.]+) *([A-Za-z]+)", text)
    if not match or match.group(2).lower() not in _UNITS:
        raise ValueError(f"--device-memory {text} is no size; write it as 80GiB or 80GB.")
    return float(match.group(1)) * _UNITS[match.group(2).lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_jax.plan",
        allow_abbrev=False,
        description="Whether a configuration fits devices that are not here, and how fast it may go. Further arguments "
        "are the configuration's: --config FILE and --section.key value.",
    )
    add = parser.add_argument
    add("--topology", help="a TPU slice: v5e:2x4, v5p:4x4x4, v6e:4x4 ... (needs libtpu)")
    add("--devices", type=int, help="number of GPUs")
    add("--device-memory", help="of each GPU, as 80GiB; the chip's own where not given")
    add("--chip", choices=GPUS, help="whose rates to take for GPUs; h100 where not given")
    add("--model", help=f"a known architecture, where model.path is not here: {', '.join(KNOWN_MODELS)}")
    add("--rows", type=int, help="packed rows of a batch, with --row-tokens")
    add("--row-tokens", type=int, help="their length")
    add("--prompt-tokens", type=int, help="of every prompt; data.max_prompt_tokens where not given")
    add("--response-tokens", type=int, help="of every response; what data.max_tokens leaves where not given")
    add("--lengths", type=Path, help="JSON file with rows of [prompt, chosen, rejected] tokens to pack instead")
    add("--search", action="store_true", help="try meshes, remat policies and micro-batches, and rank them")
    add("--no-largest", action="store_true", help="do not look for the largest micro-batch that fits")
    add("--json", type=Path, help="write the plan to this file too")
    return parser


def read_request(arguments: Sequence[str]) -> tuple[Request, argparse.Namespace]:
    """ValueError for whatever cannot be planned; nothing is compiled yet."""
    given, rest = _parser().parse_known_args(arguments)
    config = parse_config(rest)
    models.check_choices(config.model, config.lora)
    if (given.topology is None) == (given.devices is None):
        raise ValueError("give one of --topology (TPUs) and --devices (GPUs).")
    if (given.rows is None) != (given.row_tokens is None) or min(given.rows or 1, given.row_tokens or 1) < 1:
        raise ValueError("--rows and --row-tokens belong together, both positive.")
    lengths = assumed_lengths(config, given.prompt_tokens, given.response_tokens, given.lengths)
    model, _ = planned_model(config, given.model)
    if given.topology is not None:
        if given.chip or given.device_memory:
            raise ValueError("--chip and --device-memory go with --devices; a TPU's topology says both.")
        target = tpu_target(given.topology)
    else:
        if given.devices < 1:
            raise ValueError(f"--devices {given.devices} must be at least 1.")
        chip = CHIPS[given.chip or "h100"]
        memory = parse_bytes(given.device_memory) if given.device_memory else chip.memory
        target = gpu_target(given.devices, memory, chip)
        config = replace(config, model=replace(config.model, attention=_on_cpu(config.model.attention)))
    fixed = None if given.rows is None else (given.rows, given.row_tokens)
    return Request(config, model, target, lengths, fixed, not given.no_largest), given


def _on_cpu(attention: str) -> str:
    """The attention to compile in place of a GPU's: its own, or for a kernel that needs a GPU one as sparing."""
    name = models.attention_name(attention, "gpu")
    return models.ATTENTIONS[name].stand_in or name


def _largest(request: Request, planned: Trial) -> tuple[str, list[Trial]]:
    """The largest micro-batch in words, and what was compiled to find it."""
    config = request.config
    if planned.fits and config.batch.micro_rows is None:
        return "the whole batch: no micro-batches are needed", []
    rows, shards = request.rows_of(replace(config, batch=replace(config.batch, micro_rows=None)))
    largest, tried = largest_micro_batch(request.compile_one, planned, rows, shards)
    if largest is None:
        return "none: not even one row per device fits", tried
    assert largest.estimate is not None
    micro = largest.config.batch.micro_rows
    if micro is None:
        return f"the whole batch of {rows} rows: no micro-batches are needed", tried
    return f"{micro} rows of {largest.estimate.row_tokens} tokens", tried


def run(request: Request, console: Console) -> tuple[list[Trial], str]:
    """The configuration as it is, and with it the largest micro-batch; ValueError for what the compiler refuses."""
    try:
        planned = judged(request.config, request.compile_one(request.config))
    except OutOfMemory as error:
        planned = Trial(request.config, None, str(error))
    largest, tried = _largest(request, planned) if request.find_largest else ("not asked for", [])
    attention, trials = _attention(request), [planned, *(trial for trial in tried if trial is not planned)]
    if planned.estimate is None:
        fitting = next((trial for trial in tried if trial.fits), None)
        if fitting is None or fitting.estimate is None:
            told = f"{request.target.name}: {planned.reason}. Largest micro-batch that fits: {largest}."
            print(f"error: {told}", file=sys.stderr)
            return trials, largest
        console.print(f"as configured it does not fit: {planned.reason}; planned instead:", markup=False)
        print_plan(console, fitting.estimate, request.target, largest, request.lengths.said, attention)
        return trials, largest
    print_plan(console, planned.estimate, request.target, largest, request.lengths.said, attention)
    return trials, largest


def _attention(request: Request) -> str:
    name = request.config.model.attention
    if name != "auto":
        return name
    return models.attention_name("auto", request.target.platform) + ", the best for this platform"


def _write(path: Path, request: Request, trials: list[Trial], largest: str) -> None:
    content = {
        "target": request.target.name,
        "assumptions": assumptions(request.target, _attention(request)),
        "batch": request.lengths.said,
        "largest_micro_batch": largest,
        "plans": [
            {
                "mesh": [trial.config.mesh.data, trial.config.mesh.fsdp, trial.config.mesh.tensor],
                "remat": trial.config.model.remat,
                "micro_rows": trial.config.batch.micro_rows,
                "reason": trial.reason,
                "estimate": trial.estimate and trial.estimate.as_dict(),
            }
            for trial in trials
        ],
    }
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def main(arguments: Sequence[str] | None = None) -> int:
    jax.config.update("jax_platforms", "cpu")  # nothing runs: chips that are here are left alone
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    try:
        request, given = read_request(sys.argv[1:] if arguments is None else list(arguments))
        if given.search:
            trials = []
            for trial in search(request.compile_one, request.config, request.model, request.target, request.rows_of):
                trials.append(trial)
                console.print(f"tried {len(trials)}: {trial.config.mesh}, {trial.config.model.remat}", markup=False)
            trials, largest = ranked(trials), "see the plans"
            print_ranking(console, trials, request.target)
            for line in assumptions(request.target, _attention(request)):
                console.print(f"- {line}", markup=False)
        else:
            trials, largest = run(request, console)
        if given.json is not None:
            _write(given.json, request, trials, largest)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if any(trial.fits for trial in trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
