"""A run's checkpoint as a Hugging Face folder: `python -m rpo_jax.export --run DIR --out HF_DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rpo_jax.core.command import print_text, run_command
from rpo_jax.tools.exporting import export

__all__ = ["export", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.export", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, dest="run_dir", metavar="RUN", help="run folder")
    add("--out", required=True, help="Hugging Face folder to make")
    add("--step", type=int, help="checkpoint to export; the newest by default")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written tensors")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--adapter", action="store_true", help="of a LoRA run: the adapters alone, as a PEFT folder")
    add("--base", help="of a LoRA run: where the model that it started from is now, if it has moved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: print_text(export(**options)))


if __name__ == "__main__":
    raise SystemExit(main())
