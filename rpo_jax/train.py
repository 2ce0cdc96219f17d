"""Train a policy on preferences: `python -m rpo_jax.train --config FILE [--section.key value ...]`.

Exit status: 0 where the run is finished or was asked to stop, 2 where something given cannot be used, 3, with a report,
where numbers went wrong too often, 1 where another process of the run died or is stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rpo_jax.config.reading import parse_config
from rpo_jax.core.command import print_text, run_command
from rpo_jax.core.text import printable
from rpo_jax.hosts import processes
from rpo_jax.hosts.stopping import Stopped
from rpo_jax.runs.tracking import summary
from rpo_jax.tools.help import help_text, help_topic
from rpo_jax.tools.sampling.rounds import run
from rpo_jax.training.hooks.guard import Diverged

__all__ = ["main", "run"]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: _train(sys.argv[1:] if arguments is None else arguments), processes.leave)


_OPTIONS = (
    ("--resume auto", "go on from the newest checkpoint of run.dir, or start where there is none"),
    ("--overwrite", "empty run.dir first"),
    ("--force", "resume also where that makes another run of it"),
)


def _train(arguments: Sequence[str]) -> int:
    if (topic := help_topic(arguments)) is not None:
        print_text(help_text("train", __doc__ or "", topic, _OPTIONS))
        return 0
    try:
        result = run(parse_config(arguments))
    except Diverged as report:
        if processes.is_main():
            print(f"error: {printable(str(report))}", file=sys.stderr)
        return processes.leave(3)
    except Stopped:
        return processes.leave(0)
    if result.stopped is None and processes.is_main():
        print(f"done: {summary(result.metrics)}")
        print_text(f"checkpoint {result.checkpoint}")
        print_text(f"export it: python -m rpo_jax.export --run {result.run_dir} --out {result.run_dir}-hf")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
