"""What a comparison runs: methods tuned with one budget each, then rows of tables over seeds. Read from YAML."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.config.presets import config_file
from rpo_jax.config.reading import load_config
from rpo_jax.core.yaml_text import read_yaml
from rpo_jax.tasks.gold import GoldTask
from rpo_jax.tasks.scored import SCORERS, ScoredTask

Settings = dict[str, Any]
START = "{start}"  # as a setting's value: the folder of the fine-tuned model that the run starts from
MAX_GRID = 10_000  # runs that tune a method


@dataclass(frozen=True)
class FileTask:
    """Preferences from a file. Nothing but preference accuracy is judged: no rule knows more.

    Args:
        path: JSON Lines in a layout that the trainer reads, gzipped or not.
        held_out_rows: other ones for each seed; the rest is trained on.
    """

    path: str
    held_out_rows: int = 256

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"path={self.path} is no file; give the data's own place as task: {{path: FILE}}.")
        if self.held_out_rows < 1:
            raise ValueError(f"held_out_rows={self.held_out_rows} must be at least 1.")

    def parts(self, seed: int) -> tuple[list[str], list[str]]:
        """Lines to train on and held-out ones."""
        opened = gzip.open if self.path.endswith(".gz") else open
        try:
            with opened(self.path, "rt", encoding="utf-8") as file:
                lines = [line for line in file if line.strip()]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"task: {self.path} cannot be read as JSON Lines: {error}.") from None
        if self.held_out_rows >= len(lines):
            raise ValueError(f"held_out_rows={self.held_out_rows} leaves nothing of the {len(lines)} of {self.path}.")
        random.Random(seed).shuffle(lines)
        return lines[self.held_out_rows :], lines[: self.held_out_rows]


Task = GoldTask | FileTask | ScoredTask


@dataclass(frozen=True)
class Cell:
    """One training run and what is measured of it.

    Attributes:
        settings: of the training run, `section.key`; none for what all runs start from.
        start: settings of the supervised fine-tuning that it starts from; without an objective.name there is none, and
            it starts from the model at model.path.
        task: what it is trained and judged on.
        seed: of task, fine-tuning and run.
    """

    settings: Settings
    start: Settings
    task: Task
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: the same for the same run in any table or study."""
        kind = type(self.task).__name__
        decisive = json.dumps([self.settings, self.start, kind, asdict(self.task), self.seed], sort_keys=True)
        return hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def beginning(self) -> Cell:
        """What it starts from, as a cell of its own."""
        task = self.task.held_out() if isinstance(self.task, ScoredTask) else self.task
        return Cell({}, self.start, task, self.seed)

    @property
    def pretrained(self) -> str | None:
        """The model that it starts from as it is; None where that is fine-tuned first."""
        return None if "objective.name" in self.start else str(self.start["model.path"])

    def training(self) -> Settings:
        """The settings of its training run, without those that a study gives to all and this run would not read."""
        unread = ("model.tokenizer",) if self.settings else ("reference.path", "contrast.weights_on")
        given = {**(self.settings or self.start), "run.seed": self.seed}
        return {key: value for key, value in given.items() if key not in unread}

    def config(self) -> Config:
        """Its training configuration without folders; ValueError for what cannot be trained so."""
        config = configured(self.training() | ({"model.path": START} if self.settings else {}))
        models.check_choices(config.model, config.lora)
        return config


def configured(settings: Mapping[str, Any]) -> Config:
    """The training configuration of `section.key` settings, values as YAML has them, or paths."""
    texts = {
        key: json.dumps(value) if isinstance(value, bool | list | None) else value for key, value in settings.items()
    }
    return load_config(None, [f"{key}={text}" for key, text in texts.items()])


@dataclass(frozen=True)
class StudyRow:
    """A line of a table.

    Attributes:
        label: as printed.
        method: whose tuned settings it takes; None for the fine-tuned model itself.
        settings: its own besides.
        task: what of the task is other than the study's.
    """

    label: str
    method: str | None
    settings: Settings
    task: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Settings that are compared row by row.

    Attributes:
        against: label of the row that the others' differences are taken to.
    """

    name: str
    title: str
    against: str
    rows: tuple[StudyRow, ...]


@dataclass(frozen=True)
class Study:
    """What a comparison trains, tunes and prints.

    Attributes:
        seeds: of the tables' cells.
        tuning_seed: of the runs that choose settings: other data than the tables' where the task is generated.
        base: settings of every run; start: of the fine-tuning besides; methods: of each method besides.
        grids: of each method, the values that are tried; all methods have as many runs.
        max_tokens: of an answer.
        frontiers: tables whose rows are run at every point of their method's grid rather than at the best.
    """

    seeds: tuple[int, ...]
    tuning_seed: int
    task: Task
    base: Settings
    start: Settings
    methods: dict[str, Settings]
    grids: dict[str, dict[str, list[Any]]]
    tables: tuple[Table, ...]
    max_tokens: int
    frontiers: tuple[Table, ...] = ()

    def beginning(self, seed: int, task: Mapping[str, Any] | None = None) -> Cell:
        changed = _task(type(self.task), {**asdict(self.task), **(task or {})})
        return Cell({}, {**self.base, **self.start}, changed, seed)

    def candidates(self, method: str) -> list[Settings]:
        """The points of a method's grid."""
        grid = self.grids[method]
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def trial(self, method: str, candidate: Settings) -> Cell:
        """The run that tries a point."""
        start = self.beginning(self.tuning_seed)
        return Cell({**self.base, **self.methods[method], **candidate}, start.start, self.task, self.tuning_seed)

    def cell(self, row: StudyRow, seed: int, tuned: Mapping[str, Settings]) -> Cell:
        """A row's run with one seed, once its method is tuned."""
        start = self.beginning(seed, row.task)
        if row.method is None:
            return start
        settings = {**self.base, **self.methods[row.method], **tuned[row.method], **row.settings}
        return Cell(settings, start.start, start.task, seed)

    def held_out(self, frontier: Table, seed: int) -> Cell:
        """What all rows of a frontier start from, where its answers are scored."""
        return self.beginning(seed, frontier.rows[0].task).beginning()

    def points(self, row: StudyRow, seed: int) -> list[Cell]:
        """The runs of a frontier's row with one seed."""
        assert row.method is not None, "checked when the study was read"
        return [self.cell(row, seed, {row.method: candidate}) for candidate in self.candidates(row.method)]

    def used_methods(self) -> list[str]:
        used = (row.method for table in self.tables for row in table.rows)
        return [method for method in dict.fromkeys(used) if method is not None]

    def configurations(self) -> Iterator[tuple[str, Cell]]:
        """One cell of everything that is to run, with words for where it stands."""
        yield "start", self.beginning(self.seeds[0])
        for method in self.used_methods():
            for candidate in self.candidates(method):
                yield f"methods: {method}", self.trial(method, candidate)
        first = {method: self.candidates(method)[0] for method in self.used_methods()}
        for table in self.tables:
            for row in table.rows:
                yield f"tables: {table.name}: {row.label}", self.cell(row, self.seeds[0], first)
        checked = set[str | None]()
        for table in self.frontiers:
            for row in table.rows:
                if self.beginning(0, row.task).beginning() != self.held_out(table, 0):
                    raise ValueError(
                        f"frontiers: {table.name}: {row.label}: is scored by other answers than the first row."
                    )
                points = self.points(row, self.seeds[0])
                # A grid is checked once: reading a configuration takes a tenth of a second.
                for cell in points[:1] if row.method in checked else points:
                    yield f"frontiers: {table.name}: {row.label}", cell
                checked.add(row.method)


def _task(kind: type[Task], settings: Mapping[str, Any]) -> Task:
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"task: {key} is not known; there are {', '.join(known)}.")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task: {error}") from None


def read_study(path: Path) -> Study:
    """The study of a YAML file, or of the preset of that name.

    Raises ValueError, before anything runs, for a key that is not known, a row of a method that there is none of,
    grids of different sizes, and any run whose configuration is refused.
    """
    path = config_file(str(path), studies=True)
    content = read_yaml(path)
    try:
        study = _read(content)
        for where, cell in study.configurations():
            try:
                cell.config()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study


_KEYS = ("seeds", "task", "base", "start", "tuning", "methods", "tables", "frontiers", "max_tokens")


def _read(content: Any) -> Study:
    content = _mapping(content, "a study", _KEYS)
    tuning = _mapping(content.get("tuning", {}), "tuning", ("seed", "grid"))
    task = _mapping(content.get("task", {}), "task")
    methods, grids = {}, {}
    for name, settings in _mapping(content.get("methods", {}), "methods").items():
        settings = _mapping(settings, f"methods: {name}")
        grids[name] = _grid(settings.pop("grid", tuning.get("grid", {})), name)
        methods[name] = settings
    sizes = {name: math.prod(map(len, grid.values())) for name, grid in grids.items()}
    if large := next((name for name, size in sizes.items() if size > MAX_GRID), None):
        raise ValueError(f"methods: {large}: grid: it asks for {sizes[large]:,} runs, more than {MAX_GRID:,}.")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"every method must be tuned with as many runs, but the grids have {sizes}.")
    seeds = content.get("seeds", [])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds: give a list of numbers, got {seeds!r}.")
    if len(set(seeds)) < len(seeds):  # intervals over seeds would take one run for several
        raise ValueError(f"seeds: each may be given once, got {seeds!r}.")
    tuning_seed = tuning.get("seed", 1000)
    if not isinstance(tuning_seed, int) or tuning_seed < 0:
        raise ValueError(f"tuning: seed: give a number of at least 0, got {reprlib.repr(tuning_seed)}.")
    max_tokens = content.get("max_tokens", 64)
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens!r} must be a positive number.")
    kind = FileTask if "path" in task else ScoredTask if "score" in task else GoldTask
    base, start = (_mapping(content.get(name, {}), name) for name in ("base", "start"))
    tables, frontiers = (_tables(key, content, methods) for key in ("tables", "frontiers"))
    _check_start({**base, **start}, kind, frontiers)
    if tables and kind is ScoredTask:
        raise ValueError("tables: a task of scores has no pairs to judge and tune by; give these rows as frontiers.")
    return Study(
        seeds=tuple(seeds),
        tuning_seed=tuning_seed,
        task=_task(kind, task),
        base=base,
        start=start,
        methods=methods,
        grids=grids,
        tables=tables,
        max_tokens=max_tokens,
        frontiers=frontiers,
    )


def _check_start(start: Settings, task: type[Task], frontiers: Sequence[Table]) -> None:
    pretrained = "objective.name" not in start
    if pretrained and "model.path" not in start:
        raise ValueError("start: give objective.name: sft, or model.path, a model that the runs start from as it is.")
    if pretrained and task is GoldTask:
        raise ValueError("start: the generated task needs a model that has been fine-tuned; give objective.name: sft.")
    if not pretrained and task is ScoredTask:
        raise ValueError("start: a task of scores has no answers to fine-tune on; leave objective.name out.")
    if frontiers and task is not ScoredTask:
        raise ValueError(f"frontiers: need a task of scores; give task: {{score: {' or '.join(SCORERS)}}}.")
    if without := next((row.label for table in frontiers for row in table.rows if row.method is None), None):
        raise ValueError(f"frontiers: {without}: needs a method; the start stands in every frontier anyway.")


def _grid(grid: Any, method: str) -> dict[str, list[Any]]:
    grid = _mapping(grid, f"methods: {method}: grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"methods: {method}: grid: {key} needs a list of values, got {reprlib.repr(values)}.")
        if any(value in values[:number] for number, value in enumerate(values)):
            raise ValueError(
                f"methods: {method}: grid: {key}: each value may be given once, got {reprlib.repr(values)}."
            )
    return grid


def _tables(key: str, content: Mapping[str, Any], methods: Mapping[str, Settings]) -> tuple[Table, ...]:
    tables = _mapping(content.get(key), key)
    # A frontier's picture is a file with its name.
    names = tables if key == "frontiers" else ()
    if wrong := next((name for name in names if not re.fullmatch(r"[\w.-]+", str(name))), None):
        raise ValueError(f"{key}: {wrong!r} is part of a file's name: give letters, digits, '_', '-' and '.' alone.")
    return tuple(_table(f"{key}: {name}", name, of, methods) for name, of in tables.items())


def _table(where: str, name: str, content: Any, methods: Mapping[str, Settings]) -> Table:
    content = _mapping(content, where, ("title", "against", "rows"))
    rows = []
    for label, settings in _mapping(content.get("rows", {}), f"{where}: rows").items():
        settings = _mapping(settings, f"{where}: {label}")
        method, task = settings.pop("method", None), _mapping(settings.pop("task", {}), f"{where}: {label}: task")
        if method is not None and method not in methods:
            raise ValueError(f"{where}: {label}: there is no method {method}; there are {', '.join(methods)}.")
        if method is None and settings:
            raise ValueError(f"{where}: {label}: {', '.join(settings)} need a method beside them.")
        rows.append(StudyRow(label, method, settings, task))
    against = content.get("against", rows[0].label if rows else "")
    if against not in [row.label for row in rows]:
        raise ValueError(f"{where}: against: there is no row {against!r}.")
    return Table(name, str(content.get("title", name)), against, tuple(rows))


def _mapping(content: Any, where: str, known: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy of a YAML mapping; ValueError where it is none, or has a key that is not known."""
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{where}: needs keys below it, got {reprlib.repr(content)}.")
    for key in content:
        if known and key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; there are {', '.join(known)}.")
    return {str(key): value for key, value in content.items()}
