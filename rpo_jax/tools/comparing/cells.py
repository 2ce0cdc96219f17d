"""Runs the cells of a study, each once: what is there is not run again, and several processes share the work.

A cell's folder holds `result.json` when it is done, `log.txt`, the answers it was judged by, and for a fine-tuned
model its export, which the cells that start from it share.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rpo_jax.config.presets import packaged
from rpo_jax.core.files import atomic_write
from rpo_jax.core.jsonl import parse_json, read_jsonl, write_jsonl
from rpo_jax.sampling.engine import Sampling
from rpo_jax.sampling.generation import GenerateConfig, generate
from rpo_jax.tasks import quickstart
from rpo_jax.tasks.gold import GoldTask, make_rows, win
from rpo_jax.tasks.scored import Row, ScoredTask
from rpo_jax.tools.comparing.measure import divergences
from rpo_jax.tools.comparing.study import START, Cell, FileTask, configured
from rpo_jax.tools.exporting import export
from rpo_jax.tools.judging.pairs import prompt_of
from rpo_jax.tools.sampling.rounds import run

GOLD = "{gold}"  # as rounds.score: the rule that knows the truth of the gold task
RESULT, LOG, EXPORT = "result.json", "log.txt", "hf"
ACCURACY, LOG_PROB_ACCURACY = "eval_rewards/accuracies", "eval_logps/accuracies"


@dataclass(frozen=True)
class CellRunner:
    """Where cells run.

    Attributes:
        folder: of the study's results.
        cache_dir: the start's answers, embeddings, reference log-probs and compiled programs, shared by all cells.
        max_tokens: of an answer.
    """

    folder: Path
    cache_dir: Path
    max_tokens: int

    def place(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell measured."""
        file = self.place(cell) / RESULT
        return parse_json(file.read_bytes()) if file.is_file() else None

    def work_on(self, cell: Cell) -> bool:
        """Have the cell's result; False where another process is at it."""
        if self.result(cell) is not None:
            return True
        if cell.settings and not self.work_on(cell.beginning()):
            return False
        with _claimed(self.place(cell)) as claimed:
            if not claimed:
                return False
            if self.result(cell) is None:
                self._run(cell)
        return True

    def _run(self, cell: Cell) -> None:
        place = self.place(cell)
        began, worked = time.perf_counter(), time.process_time()
        with (place / LOG).open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                result = self._trained_and_judged(cell)
            except (Exception, KeyboardInterrupt) as error:
                error.add_note(f"cell {cell.name}; its log: {place / LOG}")
                raise
        result["seconds"] = round(time.perf_counter() - began, 1)
        result["cpu_seconds"] = round(time.process_time() - worked, 1)  # the same beside other work
        described = {"settings": cell.settings, "start": cell.start, "task": asdict(cell.task), "seed": cell.seed}
        atomic_write(place / RESULT, json.dumps({**described, **result}, indent=1) + "\n")
        # Every run compiles programs of its own; those of hundreds of runs would fill the memory.
        jax.clear_caches()
        gc.collect()

    def _trained_and_judged(self, cell: Cell) -> dict[str, Any]:
        place = self.place(cell)
        run_dir, exported = place / "run", place / EXPORT
        files = self._files(cell)
        start = self._start(cell)
        if not cell.settings and cell.pretrained is not None:
            return {"metrics": {}} | (self._scored(cell, files, start) if isinstance(cell.task, ScoredTask) else {})
        changes = cell.training() | {"run.overwrite": True}
        changes |= {"run.dir": run_dir, "run.cache_dir": self.cache_dir, "data.path": files["train"]}
        if not isinstance(cell.task, ScoredTask):
            changes["data.eval_path"] = files["held_out"]
        if cell.settings:
            by_placeholder = {START: str(start), GOLD: f"rule:{quickstart.__file__}:{quickstart.gold_score.__name__}"}
            changes = {key: by_placeholder.get(str(value), value) for key, value in changes.items()}
            changes["model.path"] = start
        began = time.perf_counter()
        trained = run(configured(changes))
        train_seconds = time.perf_counter() - began  # phases overlap: their sum would be more
        if trained.stopped is not None:
            raise KeyboardInterrupt(f"stopped by {trained.stopped}")  # the cell has no result
        if not cell.settings:
            export(run_dir, exported, overwrite=True)
        result: dict[str, Any] = {"metrics": trained.metrics, "train_seconds": round(train_seconds, 1)}
        if isinstance(cell.task, GoldTask):
            result |= self._judged(cell, files, run_dir if cell.settings else exported)
        elif isinstance(cell.task, ScoredTask):
            result |= self._scored(cell, files, run_dir)
        shutil.rmtree(run_dir)  # its metrics are in the result, and nobody trains on from it
        return result

    def _start(self, cell: Cell) -> Path:
        """The folder or hub name of what the cell starts from."""
        made = self.place(cell.beginning()) / EXPORT
        return made if cell.pretrained is None else Path(cell.pretrained).expanduser()

    def _files(self, cell: Cell) -> dict[str, Path]:
        if isinstance(cell.task, FileTask):
            parts = cell.task.parts(cell.seed)
        else:
            made = (
                make_rows(cell.task, cell.seed) if isinstance(cell.task, GoldTask) else self._own_rows(cell, cell.task)
            )
            parts = [[f"{json.dumps(row)}\n" for row in rows] for rows in made]
        files = {name: self.place(cell) / f"{name}.jsonl" for name in ("train", "held_out")}
        for file, lines in zip(files.values(), parts, strict=True):
            atomic_write(file, "".join(lines))
        return files

    def _own_rows(self, cell: Cell, task: ScoredTask) -> tuple[list[Row], list[Row]]:
        """Rows to train on, of the start's answers, and held-out prompts."""
        asked, held_out = task.asked(packaged)
        if not cell.settings:
            return [], held_out
        start, score = self._start(cell), task.scorer()
        decisive = json.dumps([str(start), asked, task.samples, self.max_tokens, cell.config().data.max_prompt_tokens])
        place = self.cache_dir / "answers" / hashlib.sha256(decisive.encode()).hexdigest()[:16]
        prompts, answers = place / "prompts.jsonl", place / "answers.jsonl"
        with _claimed(place, wait=True):  # all cells draw from the same answers
            if not (place / "done").exists():
                write_jsonl(prompts, asked)
                generate(self._asking(cell, start, prompts, answers, samples=task.samples, seed=0))
                atomic_write(place / "done", "")
        rows = [{**answer, "score": score(answer["response"])} for answer in read_jsonl(answers)]
        return task.training_rows(rows, cell.seed), held_out

    def _asking(self, cell: Cell, model: Path, prompts: Path, out: Path, **changes: Any) -> GenerateConfig:
        config = GenerateConfig(
            model=str(model),
            prompts=str(prompts),
            out=str(out),
            sampling=Sampling(temperature=1.0),
            max_tokens=self.max_tokens,
            seed=cell.seed % 2**32,
            batch_size=64,
            max_prompt_tokens=cell.config().data.max_prompt_tokens,
            cache_dir=str(self.cache_dir),
        )
        return replace(config, **changes)

    def _answers(self, cell: Cell, files: dict[str, Path], model: Path, temperature: float) -> list[dict[str, Any]]:
        out = self.place(cell) / ("greedy.jsonl" if temperature == 0 else "sampled.jsonl")
        sampling = Sampling(temperature=temperature)
        generate(self._asking(cell, model, files["held_out"], out, sampling=sampling, overwrite=True))
        return read_jsonl(out)

    def _scored(self, cell: Cell, files: dict[str, Path], model: Path) -> dict[str, Any]:
        """Of one sampled answer to each held-out prompt: its score, and how far the policy is from the start there."""
        assert isinstance(cell.task, ScoredTask)
        answers, score = self._answers(cell, files, model, 1.0), cell.task.scorer()
        result: dict[str, Any] = {
            "rewards": [score(answer["response"]) for answer in answers],
            "answer_tokens": [answer["tokens"] for answer in answers],
            "ended": [answer["finish_reason"] == "eos" for answer in answers],
        }
        if cell.settings:
            kls = self._log_ratios(cell, answers, model)
            result |= {"kls": kls.tolist(), "divergence": float(kls.mean())}
        return result

    def _judged(self, cell: Cell, files: dict[str, Path], model: Path) -> dict[str, Any]:
        rows = read_jsonl(files["held_out"])
        answers = self._answers(cell, files, model, 0.0)
        result: dict[str, Any] = {
            "wins": [
                win(row["prompt"], answer["response"], row["chosen"]) for row, answer in zip(rows, answers, strict=True)
            ],
            "answer_tokens": [answer["tokens"] for answer in answers],
        }
        if cell.settings:
            sampled = self._answers(cell, files, model, 1.0)
            result["divergence"] = float(self._log_ratios(cell, sampled, model).mean())
        return result

    def _log_ratios(self, cell: Cell, answers: Sequence[dict[str, Any]], policy: Path) -> Float[np.ndarray, "n"]:
        triples = [
            (prompt_of(answer, answer["row_id"]), answer["response"], answer["finish_reason"] == "eos")
            for answer in answers
        ]
        return divergences(policy, self._start(cell), triples)


@contextlib.contextmanager
def _claimed(place: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may work there until it is done; a process that dies gives its claim up.

    Args:
        wait: until it may.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
