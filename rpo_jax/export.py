"""A run's checkpoint as a Hugging Face folder: `python -m rpo_jax.export --run DIR --out HF_DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rpo_jax.core.command import print_text, run_command
from rpo_jax.tools.exporting import check_push, export, push

__all__ = ["export", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.export", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, dest="run_dir", metavar="RUN", help="run folder")
    add("--out", required=True, help="Hugging Face folder to make")
    add("--step", help="checkpoint to export: a number, or best; the newest by default")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written tensors")
    add("--overwrite", action="store_true", help="replace an existing folder")
    add("--adapter", action="store_true", help="of a LoRA run: the adapters alone, as a PEFT folder")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the Hugging Face hub")
    add("--public", action="store_true", help="with --push: a repository that is made is public, not private")
    add("--base", help="of a LoRA run: where the model that it started from is now, if it has moved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: _export(options))


def _export(options: dict[str, Any]) -> None:
    name, public = options.pop("push"), options.pop("public")
    if name is not None:
        check_push(name)
    elif public:
        raise ValueError("--public is for --push; name a repository there, or leave it out.")
    folder = export(**options)
    print_text(folder)
    if name is not None:
        print_text(push(folder, name, public=public))


if __name__ == "__main__":
    raise SystemExit(main())
