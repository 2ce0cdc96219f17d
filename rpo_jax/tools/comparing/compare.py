"""A study from its cells to its reports: what is to run, in which order, and what the reports say of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from rpo_jax.config.presets import packaged
from rpo_jax.core.command import print_text
from rpo_jax.core.files import atomic_write, check_writable
from rpo_jax.tasks.scored import ScoredTask
from rpo_jax.tools.comparing import frontier_page
from rpo_jax.tools.comparing.cells import CellRunner
from rpo_jax.tools.comparing.comparison_page import TRIED, make_page
from rpo_jax.tools.comparing.frontier import Measured
from rpo_jax.tools.comparing.study import Cell, Settings, Study, Table, read_study
from rpo_jax.tools.comparing.tables import filled, judged_by, markdown, summarised, tried

WAIT_SECONDS = 5.0  # between looks at what other processes are at


def compare(config: Path, out: Path, cache_dir: Path, *, report_only: bool = False) -> list[Path]:
    """Run what is missing of the study in a YAML file, and write its reports into `out`.

    Args:
        report_only: run nothing: report what is there.

    Raises ValueError for a study that cannot be run, and KeyboardInterrupt where a signal stops a run.
    """
    study = read_study(config)
    if not report_only:
        for table in study.frontiers:  # what is not installed or not there is told before anything runs
            task = study.held_out(table, study.seeds[0]).task
            assert isinstance(task, ScoredTask), "checked when the study was read"
            task.scorer()
            task.asked(packaged)
    runner = CellRunner(out, cache_dir.expanduser(), study.max_tokens)
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    if not report_only:
        work(study, runner)
    return write_reports(study, runner, f"python -m rpo_jax.compare --config {config} --out {out}")


def trials(study: Study, runner: CellRunner) -> dict[str, list[tuple[Settings, dict[str, Any] | None]]]:
    """Of every method the points of its grid, each with what it gave where it is done."""
    return {
        method: [(candidate, runner.result(study.trial(method, candidate))) for candidate in study.candidates(method)]
        for method in study.used_methods()
        if len(study.candidates(method)) > 1
    }


def tuned_settings(study: Study, runner: CellRunner) -> dict[str, Settings]:
    """Of every method whose trials are done: the point of its grid that was judged best."""
    tuned = {method: study.candidates(method)[0] for method in study.used_methods()}
    for method, points in trials(study, runner).items():
        done = [result for _, result in points if result is not None]
        if len(done) < len(points):
            del tuned[method]
            continue
        column = judged_by(done)
        scores = [one[0] for result in done if (one := summarised(column, [result])) is not None]
        if len(scores) < len(done):
            raise ValueError(
                f"The points of {method}'s grid cannot be told apart: they have neither a gold win rate nor a "
                "preference accuracy; give held-out data in pairs, or one point."
            )
        tuned[method] = points[scores.index(max(scores))][0]
    return tuned


def wanted_cells(study: Study, runner: CellRunner) -> Iterator[tuple[str, Cell]]:
    """What is to run, with words for it: the trials of all methods, then the rows of those that are tuned."""
    for method in study.used_methods():
        candidates = study.candidates(method)
        for candidate in candidates if len(candidates) > 1 else ():
            yield f"tune {method} {candidate}", study.trial(method, candidate)
    tuned = tuned_settings(study, runner)
    for seed in study.seeds:  # so that all rows have as many seeds at any time
        for table in study.tables:
            for row in table.rows:
                if row.method is None or row.method in tuned:
                    yield f"{table.name}: {row.label}, seed {seed}", study.cell(row, seed, tuned)
        for table in study.frontiers:
            yield f"{table.name}: start, seed {seed}", study.held_out(table, seed)
            for row in table.rows:
                for number, cell in enumerate(study.points(row, seed), start=1):
                    yield f"{table.name}: {row.label}, policy {number}, seed {seed}", cell


def work(study: Study, runner: CellRunner) -> None:
    """Run what has no result yet, until everything has one."""
    while True:
        cells = {cell.name: (label, cell) for label, cell in wanted_cells(study, runner)}
        missing = [item for item in cells.values() if runner.result(item[1]) is None]
        if not missing and len(tuned_settings(study, runner)) == len(study.used_methods()):
            return
        for number, (label, cell) in enumerate(missing, start=len(cells) - len(missing) + 1):
            if runner.result(cell) is not None:
                continue
            began = time.perf_counter()
            if runner.work_on(cell):
                seconds = time.perf_counter() - began
                print_text(f"{number}/{len(cells)}  {label}  {_outcome(runner.result(cell))}  {seconds:.0f} s")
        if all(runner.result(cell) is None for _, cell in missing):
            time.sleep(WAIT_SECONDS)  # all of them are with other processes


def _outcome(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if "rewards" in result:
        return f"reward {mean(result['rewards']):.3f} at KL {result.get('divergence', 0.0):.2f}"
    column = judged_by([result])
    summary = summarised(column, [result])
    return "" if summary is None else f"{column.title} {summary[0]:.1f}"


def table_results(study: Study, runner: CellRunner) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by table and label: of the seeds that all rows of a table have, so that they can be compared."""
    tuned = tuned_settings(study, runner)
    by_table = {}
    for table in study.tables:
        done = {
            row.label: {seed: result for seed in study.seeds if (result := runner.result(study.cell(row, seed, tuned)))}
            for row in table.rows
            if row.method is None or row.method in tuned
        }
        seeds = [seed for seed in study.seeds if all(seed in by_seed for by_seed in done.values())]
        by_table[table.name] = {label: [by_seed[seed] for seed in seeds] for label, by_seed in done.items()}
    return by_table


def write_reports(study: Study, runner: CellRunner, command: str) -> list[Path]:
    """report.md and report.html of the tables, frontier.md and its pictures and frontier.html, from what is there."""
    effort = f"`{command}`: {_effort(study, runner)}"
    written = _write_frontiers(study, runner, effort) if study.frontiers else []
    if study.frontiers and not study.tables:
        return written
    results, points = table_results(study, runner), tried(trials(study, runner), tuned_settings(study, runner))
    tables = [markdown(table.title, *filled(table, results[table.name])) for table in study.tables]
    tables += [markdown(TRIED, *points)] if points[1] else []
    for name, text in (
        ("report.md", "\n".join([f"# Comparison\n\n{effort}\n", *tables])),
        ("report.html", make_page(study, results, points, effort)),
    ):
        atomic_write(runner.folder / name, text)
        written.append(runner.folder / name)
    return written


def measured(study: Study, runner: CellRunner, table: Table) -> frontier_page.Frontier | None:
    """What a frontier's rows gave that have all their policies of a seed, of the seeds that all of them have."""
    complete = {}
    for seed in study.seeds:
        cells = {"": [study.held_out(table, seed)], **{row.label: study.points(row, seed) for row in table.rows}}
        for label, of in cells.items():
            results = [result for cell in of if (result := runner.result(cell))]
            if len(results) == len(of):
                complete[label, seed] = results
    labels = [row.label for row in table.rows if any(label == row.label for label, _ in complete)]
    seeds = [seed for seed in study.seeds if all((label, seed) in complete for label in ("", *labels))]
    if not labels or not seeds:
        return None

    def values(label: str, key: str) -> np.ndarray:
        return np.array([[result[key] for result in complete[label, seed]] for seed in seeds]).swapaxes(0, 1)

    start = values("", "rewards")[0]
    rows = {label: Measured(values(label, "rewards"), values(label, "kls"), start) for label in labels}
    task = study.held_out(table, seeds[0]).task
    assert isinstance(task, ScoredTask), "checked when the study was read"
    is_test = np.arange(start.shape[1]) >= task.tune_prompts
    return frontier_page.Frontier(table.name, table.title, table.against, tuple(seeds), rows, is_test)


def _write_frontiers(study: Study, runner: CellRunner, effort: str) -> list[Path]:
    frontiers = [one for table in study.frontiers if (one := measured(study, runner, table)) is not None]
    drawn = [frontier_page.shown_frontier(one) for one in frontiers]
    texts = {f"frontier_{one['name']}.svg": frontier_page.picture(one) for one in drawn}
    parts = [
        f"{markdown(one['title'], *one['table'])}\nSeeds {one['seeds']}.\n\n"
        f"![{one['title']}](frontier_{one['name']}.svg)\n"
        for one in drawn
    ]
    texts["frontier.md"] = "\n".join([f"# Frontiers\n\n{effort}\n", *parts])
    texts["frontier.html"] = frontier_page.make_page(drawn, effort)
    for name, text in texts.items():
        atomic_write(runner.folder / name, text)
    return [runner.folder / name for name in texts]


def _effort(study: Study, runner: CellRunner) -> str:
    """How many runs there were, and how long they took."""
    cells = [cell for _, cell in wanted_cells(study, runner)]
    runs = {cell.name: cell for cell in [*cells, *(cell.beginning() for cell in cells)]}
    done = [result for result in map(runner.result, runs.values()) if result is not None]
    hours, worked = (sum(result.get(key, 0) for result in done) / 3600 for key in ("seconds", "cpu_seconds"))
    worked = f" ({worked:.1f} of processors)" if worked else ""
    seeds = ", ".join(map(str, study.seeds))
    tuned = f", tuned on {study.tuning_seed}" if study.tables and trials(study, runner) else ""
    return f"seeds {seeds}{tuned}; {len(done)} of {len(runs)} runs, which took {hours:.1f} hours one by one{worked}."
