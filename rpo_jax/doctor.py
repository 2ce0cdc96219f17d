"""Look over a run, or a configuration, before it costs anything: `python -m rpo_jax.doctor --run DIR | --config FILE`.

Nothing is trained, compiled, fetched or written. Exit status: 0 where nothing failed, 2 where something did, and with
--strict 1 where there are only warnings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rpo_jax.core.command import print_text, run_command
from rpo_jax.tools.checkup.doctor import examine, exit_status, show
from rpo_jax.tools.help import help_text, help_topic

__all__ = ["examine", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_jax.doctor",
        usage="python -m rpo_jax.doctor [--run DIR] [--config FILE] [--strict] [--section.key value ...]",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--run", nargs="?", const="", metavar="DIR")
    parser.add_argument("--strict", action="store_true")
    return parser


_OPTIONS = (
    ("--run DIR", "a run folder, its checkpoints too; without --config its own configuration"),
    ("--strict", "exit status 1 where there are warnings"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _parser().print_usage()
        return 2
    if (topic := help_topic(words)) is not None:
        return run_command(lambda: print_text(help_text("doctor", __doc__ or "", topic, _OPTIONS)))
    options, of_configuration = _parser().parse_known_args(words)
    return run_command(lambda: _examine(options, of_configuration))


def _examine(options: argparse.Namespace, of_configuration: Sequence[str]) -> int:
    if options.run == "":
        raise ValueError("--run needs a run folder after it.")
    findings = examine(options.run, of_configuration)
    show(findings)
    return exit_status(findings, strict=options.strict)


if __name__ == "__main__":
    raise SystemExit(main())
