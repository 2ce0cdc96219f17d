"""The benchmark's table, from the records of a run.

python -m benchmarks.table benchmarks/results/NAME.jsonl [--into benchmarks/README.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Record = Mapping[str, Any]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
GIB = 2**30
COLUMNS = (
    "workload",
    "pairs",
    "system",
    "seconds a step (min-max)",
    "processor s",
    "pairs/s",
    "useful tokens/s",
    "peak memory, GiB",
    "first step, s",
    "of it reference, s",
    "share of ceiling",
    "speed-up",
    "memory ratio",
)


def read_records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def ceiling(records: Iterable[Record]) -> float:
    """Highest rate of matrix products measured anywhere in the run, operations per second; 0 where none was."""
    rates = [rate for record in records for rate in record.get("measured", {}).get("flops_per_second", {}).values()]
    return max(rates, default=0.0)


@dataclass(frozen=True)
class Row:
    """All rounds of one system on one workload and batch size."""

    workload: str
    pairs: int
    system: str
    records: tuple[Record, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a peer has in common with it: the work, what is trained, and in which numbers."""
        spec = self.records[0]["spec"]
        return self.workload, self.pairs, spec.get("lora_rank", 0), spec.get("dtype", "float32")

    @property
    def done(self) -> list[Record]:
        return [record["measured"] for record in self.records if record["status"] == "ok"]

    @property
    def timings(self) -> list[float]:
        return [seconds for measured in self.done for seconds in measured["step_seconds"]]

    @property
    def seconds(self) -> float:
        """Mean over the steps of each step's median over the rounds: every system's steps are the same batches."""
        return sum(self._by_step("step_seconds")) / len(self._by_step("step_seconds"))

    def rate_of(self, work: str) -> float:
        """Useful tokens or necessary operations per second."""
        return sum(self._by_step(work)) / sum(self._by_step("step_seconds"))

    @property
    def processor_seconds(self) -> str:
        """Of all cores, a step; nothing of records that are older than this column."""
        seconds = [spent for measured in self.done for spent in measured.get("processor_seconds", [])]
        return f"{median(seconds):.2f}" if seconds else ""

    @property
    def peak_bytes(self) -> int:
        return max(measured["peak_device_bytes"] or measured["peak_rss_bytes"] for measured in self.done)

    @property
    def first_step(self) -> str:
        """Seconds in the first round and, where later ones were measured, in the fastest of these."""
        first, *later = [measured["first_step_seconds"] for measured in self.done]
        return f"{first:.1f}" + (f" / {min(later):.1f}" if later else "")

    def _by_step(self, name: str) -> list[float]:
        return [median(values) for values in zip(*(measured[name] for measured in self.done), strict=False)]


def make_rows(records: Iterable[Record]) -> list[Row]:
    """One row per workload, batch size, system and settings, in the order of their first appearance."""
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        spec = record.get("spec")
        if spec is None or spec["system"].startswith("ceiling-"):
            continue
        parts = [f"LoRA {rank}"] if (rank := spec.get("lora_rank")) else []
        parts += [dtype] if (dtype := spec.get("dtype", "float32")) != "float32" else []
        parts += spec["settings"]
        if not spec["system"].startswith("ours") and spec["micro"] != spec["pairs"]:
            parts.append(f"{spec['pairs'] // spec['micro']} x {spec['micro']}")
        system = spec["system"] + (f" ({', '.join(parts)})" if parts else "")
        groups.setdefault((spec["workload"], spec["pairs"], system), []).append(record)
    rows = [Row(*key, tuple(group)) for key, group in groups.items()]
    return sorted(rows, key=lambda row: (row.workload, row.pairs))


def fastest_peer(rows: Iterable[Row], own: Row) -> Row | None:
    peers = [row for row in rows if row.kind == own.kind and row.done and not row.system.startswith("ours")]
    return min(peers, key=lambda row: row.seconds, default=None)


def _cells(row: Row, peer: Row | None, limit: float) -> list[str]:
    start = [row.workload, str(row.pairs), row.system]
    if not row.done:
        return [*start, row.records[-1]["status"], *[""] * (len(COLUMNS) - len(start) - 1)]
    return [
        *start,
        f"{median(row.timings):.2f} ({min(row.timings):.2f}-{max(row.timings):.2f})",
        row.processor_seconds,
        f"{row.pairs / row.seconds:.2f}",
        f"{row.rate_of('useful_tokens'):,.0f}",
        f"{row.peak_bytes / GIB:.2f}",
        row.first_step,
        f"{row.done[0]['reference_seconds']:.1f}" if row.done[0]["reference_seconds"] else "",
        f"{row.rate_of('necessary_flops') / limit:.0%}" if limit else "",
        f"{peer.seconds / row.seconds:.2f}" if peer else "",
        f"{row.peak_bytes / peer.peak_bytes:.2f}" if peer else "",
    ]


def render(records: list[Record]) -> str:
    """Markdown: the machine, its ceiling, and a line per row; speed-up and memory are against the fastest peer."""
    rows, limit = make_rows(records), ceiling(records)
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; commit {machine['commit']}, "
        f"{machine['date']}; `bash benchmarks/run.sh {' '.join(record['arguments'])}`"
        for record in records
        if (machine := record.get("machine"))
    ]
    lines += ["", f"Ceiling: {limit / 1e9:,.0f} GFLOP/s.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, fastest_peer(rows, row), limit)) + " |")
    return "\n".join(lines)


def insert(document: str, table: str) -> str:
    """The document with the table between its two marks, in place of what was there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The document has no '{BEGIN}' and '{END}' for the table to go between; add them.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with the two marks")
    options = parser.parse_args()
    table = render(read_records(options.results))
    if options.into is None:
        print(table)
    else:
        options.into.write_text(insert(options.into.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
