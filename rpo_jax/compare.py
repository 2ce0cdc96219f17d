"""Compare methods: `python -m rpo_jax.compare --config configs/compare_small.yaml --out runs/compare_small`.

Tunes each method with the same budget, runs the rows of the study's tables over its seeds and writes report.md and
report.html; of a study of frontiers, such as frontier_small, it writes frontier.md and frontier.html.
Started again it goes on with what is missing; started several times at once, the processes share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rpo_jax.config import RunConfig
from rpo_jax.core.command import print_text, run_command
from rpo_jax.tools.comparing.compare import compare

__all__ = ["compare", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.compare", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, type=Path, help="the study: a YAML file, or a preset's name, as compare_small")
    add("--out", required=True, type=Path, help="folder of cells and reports; what is there is kept")
    add("--cache-dir", type=Path, default=RunConfig().cache_dir, help="as run.cache_dir")
    add("--report", action="store_true", help="run nothing: report what is there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return run_command(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> None:
    try:
        for path in compare(options.config, options.out, Path(options.cache_dir), report_only=options.report):
            print_text(path)
    except KeyboardInterrupt as stopped:
        print_text(f"{stopped or 'stopped'}; the same command goes on with what is missing")


if __name__ == "__main__":
    raise SystemExit(main())
