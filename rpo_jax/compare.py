"""Compare methods: `python -m rpo_jax.compare --config configs/compare_small.yaml --out runs/compare_small`.

Tunes each method with the same budget, runs the rows of the study's tables over its seeds and writes report.md and
report.html. Started again it goes on with what is missing; started several times at once, the processes share the work.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.comparing.cells import Workshop
from rpo_jax.comparing.page import make_page
from rpo_jax.comparing.study import Cell, Settings, Study, read_study
from rpo_jax.comparing.tables import judged_by, markdown, summarised
from rpo_jax.config import RunConfig

WAIT_SECONDS = 5.0  # between looks at what other processes are at


def tuned_settings(study: Study, workshop: Workshop) -> dict[str, Settings]:
    """Of every method whose trials are done: the point of its grid that was judged best."""
    found: dict[str, Settings] = {}
    for method in study.used_methods():
        candidates = study.candidates(method)
        if len(candidates) == 1:
            found[method] = candidates[0]
            continue
        results = [workshop.result(study.trial(method, candidate)) for candidate in candidates]
        done = [result for result in results if result is not None]
        if len(done) == len(candidates):
            column = judged_by(done)
            scores = [(summarised(column, [result]) or (float("-inf"),))[0] for result in done]
            found[method] = candidates[scores.index(max(scores))]
    return found


def wanted_cells(study: Study, workshop: Workshop) -> Iterator[tuple[str, Cell]]:
    """What is to run, with words for it: the trials of all methods, then the rows of those that are tuned."""
    for method in study.used_methods():
        candidates = study.candidates(method)
        for candidate in candidates if len(candidates) > 1 else ():
            yield f"tune {method} {candidate}", study.trial(method, candidate)
    tuned = tuned_settings(study, workshop)
    for seed in study.seeds:  # so that all rows have as many seeds at any time
        for table in study.tables:
            for row in table.rows:
                if row.method is None or row.method in tuned:
                    yield f"{table.name}: {row.label}, seed {seed}", study.cell(row, seed, tuned)


def work(study: Study, workshop: Workshop) -> None:
    """Run what has no result yet, until everything has one."""
    while True:
        cells = {cell.name: (said, cell) for said, cell in wanted_cells(study, workshop)}
        missing = [item for item in cells.values() if workshop.result(item[1]) is None]
        if not missing and len(tuned_settings(study, workshop)) == len(study.used_methods()):
            return
        for number, (said, cell) in enumerate(missing, start=len(cells) - len(missing) + 1):
            if workshop.result(cell) is not None:
                continue
            began = time.perf_counter()
            if workshop.work_on(cell):
                seconds = time.perf_counter() - began
                print(f"{number}/{len(cells)}  {said}  {_told(workshop.result(cell))}  {seconds:.0f} s", flush=True)
        if all(workshop.result(cell) is None for _, cell in missing):
            time.sleep(WAIT_SECONDS)  # all of them are with other processes


def _told(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    column = judged_by([result])
    found = summarised(column, [result])
    return "" if found is None else f"{column.title} {found[0]:.1f}"


def table_results(study: Study, workshop: Workshop) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by table and label: of the seeds that all rows of a table have, so that they can be compared."""
    tuned = tuned_settings(study, workshop)
    found = {}
    for table in study.tables:
        rows = [row for row in table.rows if row.method is None or row.method in tuned]
        seeds = [
            seed
            for seed in study.seeds
            if all(workshop.result(study.cell(row, seed, tuned)) is not None for row in rows)
        ]
        of = {row.label: [workshop.result(study.cell(row, seed, tuned)) for seed in seeds] for row in rows}
        found[table.name] = {label: [result for result in each if result is not None] for label, each in of.items()}
    return found


def write_reports(study: Study, workshop: Workshop, told: str) -> list[Path]:
    """report.md and report.html from what is there."""
    tuned, results = tuned_settings(study, workshop), table_results(study, workshop)
    written = []
    for name, text in (
        ("report.md", report(study, tuned, results, told)),
        ("report.html", make_page(study, tuned, results, told)),
    ):
        path = workshop.folder / name
        beside = path.with_name(f".{name}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        written.append(path)
    return written


def report(
    study: Study,
    tuned: Mapping[str, Settings],
    results: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    told: str,
) -> str:
    """The tables in Markdown."""
    parts = [f"# Comparison\n\n{told}\n"]
    parts += [markdown(table, results[table.name]) for table in study.tables]
    lines = [f"| {method} | {', '.join(f'{k}={v}' for k, v in tuned[method].items())} |" for method in tuned]
    parts.append("\n".join(["### What tuning chose", "", "| method | settings |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 and one line for what a user can mend, 0 where a signal stops it."""
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.compare", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="the study, a YAML file")
    parser.add_argument("--out", required=True, type=Path, help="folder of cells and reports; what is there is kept")
    parser.add_argument("--cache-dir", type=Path, default=RunConfig().cache_dir, help="as run.cache_dir")
    parser.add_argument("--report", action="store_true", help="run nothing: report what is there")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every save and restore
    try:
        study = read_study(options.config)
        workshop = Workshop(options.out, Path(options.cache_dir).expanduser(), study.max_tokens)
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.report:
            work(study, workshop)
        told = f"`python -m rpo_jax.compare --config {options.config} --out {options.out}`"
        for path in write_reports(study, workshop, told):
            print(path)
    except KeyboardInterrupt as stopped:
        print(f"{stopped or 'stopped'}; the same command goes on with what is missing")
    except (ValueError, OSError) as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        print(f"error: {error}{f' ({notes})' if notes else ''}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
