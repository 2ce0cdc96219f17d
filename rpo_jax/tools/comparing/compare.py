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

from rpo_jax.config import RunConfig
from rpo_jax.tools.comparing.cells import Workshop
from rpo_jax.tools.comparing.comparison_page import TRIED, make_page
from rpo_jax.tools.comparing.study import Cell, Settings, Study, read_study
from rpo_jax.tools.comparing.tables import filled, judged_by, markdown, summarised, tried

WAIT_SECONDS = 5.0  # between looks at what other processes are at


def trials(study: Study, workshop: Workshop) -> dict[str, list[tuple[Settings, dict[str, Any] | None]]]:
    """Of every method the points of its grid, each with what it gave where it is done."""
    return {
        method: [(candidate, workshop.result(study.trial(method, candidate))) for candidate in study.candidates(method)]
        for method in study.used_methods()
        if len(study.candidates(method)) > 1
    }


def tuned_settings(study: Study, workshop: Workshop) -> dict[str, Settings]:
    """Of every method whose trials are done: the point of its grid that was judged best."""
    found = {method: study.candidates(method)[0] for method in study.used_methods()}
    for method, points in trials(study, workshop).items():
        done = [result for _, result in points if result is not None]
        if len(done) < len(points):
            del found[method]
            continue
        column = judged_by(done)
        scores = [(summarised(column, [result]) or (float("-inf"),))[0] for result in done]
        found[method] = points[scores.index(max(scores))][0]
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


def write_reports(study: Study, workshop: Workshop, command: str) -> list[Path]:
    """report.md and report.html from what is there."""
    results, points = table_results(study, workshop), tried(trials(study, workshop), tuned_settings(study, workshop))
    told = f"`{command}`: {_effort(study, workshop)}"
    tables = [markdown(table.title, *filled(table, results[table.name])) for table in study.tables]
    written = []
    for name, text in (
        ("report.md", "\n".join([f"# Comparison\n\n{told}\n", *tables, markdown(TRIED, *points)])),
        ("report.html", make_page(study, results, points, told)),
    ):
        path = workshop.folder / name
        beside = path.with_name(f".{name}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
        written.append(path)
    return written


def _effort(study: Study, workshop: Workshop) -> str:
    """How many runs there were, and how long they took."""
    cells = [cell for _, cell in wanted_cells(study, workshop)]
    runs = {cell.name: cell for cell in [*cells, *(cell.beginning() for cell in cells)]}
    done = [result for result in map(workshop.result, runs.values()) if result is not None]
    hours = sum(result["seconds"] for result in done) / 3600
    seeds = ", ".join(map(str, study.seeds))
    return f"seeds {seeds}, tuned on {study.tuning_seed}; {len(done)} runs, which took {hours:.1f} hours one by one."


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
        command = f"python -m rpo_jax.compare --config {options.config} --out {options.out}"
        for path in write_reports(study, workshop, command):
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
