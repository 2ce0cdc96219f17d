"""Fill the caches of a configuration without training: `python -m rpo_jax.prepare --config FILE`.

Reads and tokenises the data as a run would, refuses what cannot be used, and keeps the embeddings of the prompts in
run.cache_dir. No model is loaded but the encoder, and no run folder is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rpo_jax.config.reading import parse_config
from rpo_jax.core.command import print_text, run_command
from rpo_jax.hosts import processes
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.help import help_text, help_topic
from rpo_jax.training.prepare import prepare

__all__ = ["main", "prepare"]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: _prepare(sys.argv[1:] if arguments is None else arguments), processes.leave)


def _prepare(arguments: Sequence[str]) -> None:
    if (topic := help_topic(arguments)) is not None:
        print_text(help_text("prepare", __doc__ or "", topic))
        return
    config = parse_config(arguments)
    chosen = processes.initialize(config)
    with processes.stopping_together():
        reporter = Reporter(silent=not processes.is_main())
        reporter.say(chosen)
        prepare(config, reporter)


if __name__ == "__main__":
    raise SystemExit(main())
