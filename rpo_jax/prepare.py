"""Fill the caches of a configuration without training: `python -m rpo_jax.prepare --config FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rpo_jax.config.reading import parse_config
from rpo_jax.core.command import run_command
from rpo_jax.hosts import processes
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.prepare import prepare

__all__ = ["main", "prepare"]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: _prepare(sys.argv[1:] if arguments is None else arguments), processes.leave)


def _prepare(arguments: Sequence[str]) -> None:
    config = parse_config(arguments)
    chosen = processes.initialize(config)
    with processes.stopping_together():
        reporter = Reporter(silent=not processes.is_main())
        reporter.say(chosen)
        prepare(config, reporter)


if __name__ == "__main__":
    raise SystemExit(main())
