"""Every check of a run or a configuration, in order, and how the findings are shown."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rpo_jax.core.text import printable
from rpo_jax.tools.checkup.environment import INSTALL, check_environment
from rpo_jax.tools.checkup.finding import Finding, failed

STYLES = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "bold red")}
PLAIN_WIDTH = 120  # where the output is no terminal


def examine(run_dir: str | None, arguments: Sequence[str]) -> list[Finding]:
    """Every finding on a run folder and its configuration, or on the configuration of a run to come.

    Args:
        run_dir: the run folder; `run.dir` of the configuration where not given.
        arguments: as rpo_jax.config.reading.parse_config takes them; with a run folder and no --config, they change the
            run's own configuration.
    """
    findings = check_environment()
    try:
        from rpo_jax import models
        from rpo_jax.config.reading import parse_config
        from rpo_jax.tools.checkup import inputs, machine, stored
    except Exception as error:  # a package that is broken, or does not go with another
        reason = f"rpo_jax cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [*findings, failed("packages", reason, INSTALL)]
    try:
        config = parse_config(_with_own_configuration(run_dir, arguments))
        if run_dir is not None:
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=run_dir))
        models.check_choices(config.model, config.lora)
    except (ValueError, OSError) as error:
        return [*findings, failed("configuration", error)]
    folder = Path(config.run.dir).expanduser()
    findings += machine.check_devices(config)
    of_models, model_config = inputs.check_models(config)
    findings += of_models
    findings += inputs.check_data(config, model_config)
    findings += stored.check_caches(config.run.cache_dir)
    of_checkpoints, existing = stored.check_checkpoints(config, folder)
    findings += of_checkpoints
    if model_config is not None:
        findings += machine.check_experts(config, model_config)
        findings += machine.check_disk(config, model_config, folder, existing)
    return findings


def _with_own_configuration(run_dir: str | None, arguments: Sequence[str]) -> list[str]:
    has_config = any(argument.partition("=")[0] == "--config" for argument in arguments)
    if run_dir is None or has_config:
        return list(arguments)
    own = Path(run_dir).expanduser() / "config.yaml"
    if not own.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml; give the run.dir of a training run.")
    return [f"--config={own}", *arguments]


def show(findings: Sequence[Finding]) -> None:
    """The findings as a table, and how many there are of each kind."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=PLAIN_WIDTH)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        word, style = STYLES[finding.status]
        table.add_row(Text(word, style=style), finding.subject, Text(printable(finding.text)))
        if finding.fix:
            table.add_row("", "", Text(printable(f"-> {finding.fix}"), style="bold"))
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in STYLES}
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failed']} failed")


def exit_status(findings: Sequence[Finding], *, strict: bool) -> int:
    statuses = {finding.status for finding in findings}
    return 2 if "failed" in statuses else int(strict and "warning" in statuses)
