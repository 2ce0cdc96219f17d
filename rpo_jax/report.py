"""See what training did: `python -m rpo_jax.report --run DIR [--run DIR ...]` writes one HTML page, for no network.

It says in one sentence what came out, and shows curves of all runs over each other, a batch's contrast matrix with its
prompts and responses, held-out rewards, packing, throughput and memory, samples and the configuration. The matrix is
computed again from the run's data, the rewards from its newest checkpoint; both are left out with --no-matrix and
--no-rewards. The page holds prompts of your data and paths of your machine: look before you pass it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rpo_jax.core.command import print_text, run_command
from rpo_jax.tools.reporting.report import write_report

__all__ = ["main", "write_report"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = "run folder; several are compared, the last one first"
    add("--run", action="append", required=True, dest="runs", metavar="DIR", help=several)
    add("--out", default="report.html", metavar="FILE", help="page to write; report.html by default")
    add("--batch-step", type=int, default=1, metavar="N", help="step whose contrast matrix is shown")
    add("--base", metavar="DIR", help="of LoRA runs: where their base is now, if it has moved")
    add("--no-matrix", action="store_false", dest="with_matrix", help="leave the contrast matrix out")
    add("--no-rewards", action="store_false", dest="with_rewards", help="leave the rewards of the held-out data out")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: print_text(write_report(**options)))


if __name__ == "__main__":
    raise SystemExit(main())
