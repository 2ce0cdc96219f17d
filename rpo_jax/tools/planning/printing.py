"""A plan for people: tables, and what they rest on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rpo_jax.core.templates import render
from rpo_jax.core.text import printable
from rpo_jax.hosts.sharding import axis_sizes
from rpo_jax.tools.planning.estimate import Estimate
from rpo_jax.tools.planning.search import Trial
from rpo_jax.tools.planning.targets import Target

GIB = 2**30


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def assumptions(target: Target, attention: str) -> list[str]:
    """What the figures of a plan rest on, one sentence each."""
    return render("plan_assumptions.txt", target=target, chip=target.chip, attention=attention).splitlines()


def print_plan(console: Console, one: Estimate, target: Target, largest: str, batch: str, attention: str) -> None:
    mesh = " x ".join(f"{name} {size}" for name, size in one.mesh.items())
    console.print(
        Text(one.target, style="bold"),
        f", mesh {mesh}, remat {one.remat}, micro_rows {one.micro_rows or 'all'}",
        sep="",
    )
    console.print(printable(f"batch: {one.rows} rows x {one.row_tokens} tokens ({batch})"), markup=False)
    table = Table(title="Per device", show_header=False)
    memory, parts = one.memory, (one.compute_seconds, one.memory_seconds, one.link_seconds)
    rows = [
        ("parameters (trained, float32)", gib(memory["params"])),
        ("optimizer state", gib(memory["optimizer"])),
        ("frozen base or live reference", gib(memory["frozen"])),
        ("batch", gib(memory["batch"])),
        ("arguments, as laid out", gib(memory["arguments"])),
        ("output, new (the rest replaces arguments)", gib(memory["output"] - memory["aliased"])),
        ("temporary: activations, gradients, gathered weights", gib(memory["temporary"])),
        ("peak", f"{gib(one.peak_bytes)} of {gib(one.memory_limit)}: {'fits' if one.fits else 'DOES NOT FIT'}"),
        ("largest micro-batch that fits", largest),
        ("operations", f"{one.flops / 1e12:,.2f} TFLOP ({one.necessary_flops / 1e12:,.2f} necessary)"),
        ("bytes moved in memory", f"{one.moved_bytes / 1e9:,.1f} GB"),
        ("bytes sent to others", f"{one.sent_bytes / 1e9:,.2f} GB"),
        ("step time, arithmetic / memory / links", " / ".join(map(seconds, parts))),
        ("step time", f"{seconds(one.seconds_overlapped)} to {seconds(one.seconds_serial)}"),
        ("utilisation", _utilisation(one)),
        ("compiled in", seconds(one.compile_seconds)),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    exchanges = Table("kind", "where", "a step", "largest", "its array", "sent", title="Exchanges between devices")
    for row in one.exchanges:
        count = f"{'<= ' if row.bounded else ''}{row.count:,}"
        exchanges.add_row(row.kind, row.place, count, gib(row.largest), row.shape, gib(row.sent))
    console.print(exchanges)
    for surprise in one.surprises:
        console.print(f"unexpected: {surprise}", markup=False)
    if not one.surprises:
        console.print("No exchange of a whole parameter tree, and no logits of all tokens.")
    print_assumptions(console, target, attention)


def print_assumptions(console: Console, target: Target, attention: str) -> None:
    for line in assumptions(target, attention):
        console.print(f"- {line}", markup=False)


def print_ranking(console: Console, trials: list[Trial], target: Target) -> None:
    table = Table("mesh", "remat", "micro_rows", "peak", "sent", "step time", "utilisation", title=target.name)
    for trial in trials:
        config = trial.config
        mesh = " x ".join(str(size) for size in axis_sizes(config.mesh).values())
        head = (mesh, config.model.remat, str(config.batch.micro_rows or "all"))
        one = trial.estimate
        if one is None or not one.fits:
            table.add_row(*head, f"does not fit: {trial.reason}", "", "", "")
            continue
        times = f"{seconds(one.seconds_overlapped)} to {seconds(one.seconds_serial)}"
        table.add_row(*head, gib(one.peak_bytes), gib(one.sent_bytes), times, _utilisation(one))
    console.print(table)


def _utilisation(one: Estimate) -> str:
    low, high = (one.utilisation(seconds) for seconds in (one.seconds_serial, one.seconds_overlapped))
    return f"{low:.0%} to {high:.0%}"
