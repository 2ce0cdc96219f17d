"""Plan a run on devices that are not here: `python -m rpo_jax.plan --config C --topology v5p:4x4x4`.

The real training step is compiled ahead of time, by libtpu for TPUs and by JAX's CUDA plugin for NVIDIA GPUs.
Exit status: 0 where something fits, 1 where nothing does, 2 where something given cannot be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rpo_jax.config.reading import parse_config
from rpo_jax.core.command import run_command
from rpo_jax.tools.planning.planner import PlanOptions, plan
from rpo_jax.tools.planning.workload import KNOWN_MODELS

__all__ = ["main", "plan"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_jax.plan",
        allow_abbrev=False,
        description="Whether a configuration fits devices that are not here, and how fast it may go. Further arguments "
        "are the configuration's: --config FILE and --section.key value.",
    )
    add = parser.add_argument
    add("--topology", help="GPUs: h100:8, h100:4x8 (hosts x GPUs), a100, h200, b200 ...; TPUs: v5e:2x4, v5p:4x4x4 ...")
    add("--devices", type=int, help="number of GPUs, of the kind that --chip names: 8 is --topology h100:8")
    add("--device-memory", help="what a program may take of each GPU, as 76GiB; the chip's own where not given")
    add("--chip", help="a GPU as --topology names it; h100 where not given")
    add("--model", help=f"a known architecture, where model.path is not here: {', '.join(KNOWN_MODELS)}")
    add("--rows", type=int, help="packed rows of a batch, with --row-tokens")
    add("--row-tokens", type=int, help="their length")
    add("--prompt-tokens", type=int, help="of every prompt; data.max_prompt_tokens where not given")
    add("--response-tokens", type=int, help="of every response; what data.max_tokens leaves where not given")
    add("--lengths", type=Path, help="JSON file with rows of [prompt, chosen, rejected] tokens to pack instead")
    add("--search", action="store_true", help="try meshes, remat policies and micro-batches, and rank them")
    add(
        "--no-largest",
        action="store_false",
        dest="find_largest",
        help="do not look for the largest micro-batch that fits",
    )
    add("--json", type=Path, help="write the plan to this file too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options, of_configuration = _parser().parse_known_args(arguments)
    return run_command(lambda: int(not plan(parse_config(of_configuration), PlanOptions(**vars(options)))))


if __name__ == "__main__":
    raise SystemExit(main())
