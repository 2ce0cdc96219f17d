"""Preference data of a model's own answers: sampled, scored, chosen by a rule, written with their statistics."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpo_jax.core.files import atomic_write, check_writable
from rpo_jax.core.jsonl import read_jsonl, write_jsonl
from rpo_jax.core.locks import one_writer
from rpo_jax.core.templates import render
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.generation import GenerateConfig, check_not_replaced, generate
from rpo_jax.tools.judging.comparisons import as_json, turns
from rpo_jax.tools.judging.pairs import prompt_of
from rpo_jax.tools.sampling.scorers import Asked, Scorer, make_scorer, renamed
from rpo_jax.tools.sampling.selection import RULES, Rule, rso

ALL, RSO = "all", "rso"
SELECTIONS = (ALL, *RULES, RSO)
BINS = 20  # of the histogram of scores
SHOWN = 8  # prompts of the page
NAMED = {"samples": "samples a prompt", "distinct": "different answers", "rows": "rows written"}  # on the page


class NoPreferences(ValueError):
    """Nothing can be learnt from these answers; the message says why, and is for the user."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which answers become data.

    Args:
        score: rule:MODULE.py:FUNCTION, reward:FOLDER or judge:openai:MODEL.
        select: `all` keeps all answers of a prompt with their scores (layout `ranked`); the others make pairs.
        accept: answers that rejection sampling keeps of each prompt, for select=rso.
        beta: of rejection sampling, in units of the scores.
        keep_unfinished: keep answers that reached the most tokens. Training would end them where the model did not.
        seed: of what is drawn.
        option: what the user calls one of these options, for messages.
    """

    score: str
    select: str = "best_worst"
    accept: int = 8
    beta: float = 0.5
    keep_unfinished: bool = False
    seed: int
    option: Callable[[str], str] = lambda name: f"--{name.replace('_', '-')}"

    @property
    def rule(self) -> Rule:
        return rso(self.accept, self.beta) if self.select == RSO else RULES[self.select]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What is made of whose answers.

    Args:
        answers: who answers, and how often each prompt; its `out` is given by `out`.
        out: JSONL file of the data. The answers are kept beside it (.answers.jsonl), with statistics (.json) and a
            page of them (.html).
        choice: which of the answers become data.
        judge: settings of JudgeConfig, for a judge.
    """

    answers: GenerateConfig
    out: str
    choice: Choice
    judge: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choice = self.choice
        if choice.select not in SELECTIONS:
            raise ValueError(f"--select {choice.select} is unknown; use {', '.join(SELECTIONS)}.")
        if Path(self.out).suffix != ".jsonl":
            raise ValueError(f"--out {self.out} must end in .jsonl.")
        if self.answers.samples < 2:
            raise ValueError(f"--n {self.answers.samples} answers to a prompt make no pair; ask for 2 at least.")
        if not 0 < choice.beta < float("inf"):
            raise ValueError(f"--beta {choice.beta} must be greater than 0.")
        if choice.accept < 2:
            raise ValueError(f"--accept {choice.accept} answers make no pair; accept 2 at least.")


def sample(config: SampleConfig, reporter: Reporter) -> dict[str, Any]:
    """Sample, score and select as asked, write everything, and return the statistics.

    Raises ValueError for what a user can correct: before anything is sampled where it can be known then.
    """
    out = Path(config.out).expanduser()
    targets = out, out.with_suffix(".json"), out.with_suffix(".html")
    if config.answers.prompts is not None:
        check_not_replaced(config.answers.prompts, *targets)
    others = [] if config.answers.overwrite or config.answers.answers_file.exists() else targets
    if there := next((target for target in others if target.exists()), None):
        raise ValueError(f"{there} exists and is not of an earlier start; give another --out, or --overwrite.")
    check_writable(out.parent)
    with one_writer(out, "--out"), contextlib.ExitStack() as stack:
        try:
            score = make_scorer(config.choice.score, config.judge, reporter, stack)
        except ValueError as error:
            raise ValueError(renamed(error, {"--judge": "--score"})) from error
        answers = read_jsonl(generate(config.answers), ("row_id", "prompt", "response", "finish_reason"))
        selected = preferences(answers, config.choice, score, reporter.say)
        result = _statistics(config, selected)
        write_jsonl(out, selected.rows, ascii_only=False)
        atomic_write(targets[1], json.dumps(result, indent=2) + "\n")
        atomic_write(targets[2], _page(out.name, selected, result))
    return result


class Preferences(NamedTuple):
    """What answers became: prompts with those that count, their scores, the rows chosen, and how many of what."""

    asked: list[Asked]
    scores: list[list[float | None]]
    rows: list[dict[str, Any]]
    counts: Counter[str]

    @property
    def values(self) -> list[float]:
        """All scores."""
        return [score for some in self.scores for score in some if score is not None]


def preferences(
    answers: Sequence[dict[str, Any]], choice: Choice, score: Scorer, say: Callable[[str], None]
) -> Preferences:
    """Score answers and choose among them.

    Args:
        answers: rows with row_id, prompt, response and finish_reason.

    Raises NoPreferences where that leaves nothing, with the reason, and what the scorer raises.
    """
    asked, counts = _asked(answers, choice)
    if not asked:
        option = choice.option
        raise NoPreferences(
            f"no prompt has two answers that differ, are not empty and ended: {_counted(counts)}; raise "
            f"{option('max_tokens')} or {option('temperature')}, or set {option('keep_unfinished')}."
        )
    scores = score(asked)
    if scores.missing == sum(map(len, scores.of)):
        raise NoPreferences(f"{choice.option('score')} {choice.score} scores no answer: {scores.reason}")
    if scores.missing:
        say(f"{scores.missing} answers have no score and are left out; the first: {scores.reason}")
    rows = [row for one, values in zip(asked, scores.of, strict=True) for row in _rows(choice, one, values, counts)]
    if not rows:
        raise NoPreferences(f"no answer is better than another: {_counted(counts)}; see {choice.score}")
    counts["without a score"] = scores.missing
    return Preferences(asked, scores.of, rows, counts)


def answers_file(out: str) -> str:
    """Where the answers are kept that the data of this file were chosen from."""
    return str(Path(out).expanduser().with_suffix(".answers.jsonl"))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _asked(answers: Sequence[dict[str, Any]], config: Choice) -> tuple[list[Asked], Counter[str]]:
    """Prompts with the answers that count, and how many of what there are."""
    counts: Counter[str] = Counter(
        {"answers": len(answers), "empty or with a null character": 0, "unfinished": 0, "given before": 0}
    )
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["row_id"], []).append(answer)
    asked = []
    for place, some in by_prompt.items():
        texts: dict[str, None] = {}
        for answer in some:
            text = answer["response"]
            if not text.strip() or "\0" in text:  # training reads no text with a null character
                counts["empty or with a null character"] += 1
            elif answer["finish_reason"] == "length" and not config.keep_unfinished:
                counts["unfinished"] += 1
            elif text in texts:
                counts["given before"] += 1
            else:
                texts[text] = None
        if len(texts) > 1:
            asked.append(Asked(place, prompt_of(some[0], place), tuple(texts)))
    counts["prompts"], counts["prompts with fewer than two answers"] = len(by_prompt), len(by_prompt) - len(asked)
    return asked, counts


def _rows(config: Choice, one: Asked, scores: Sequence[float | None], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    known = [(answer, score) for answer, score in zip(one.answers, scores, strict=True) if score is not None]
    values = [score for _, score in known]
    if len(set(values)) < 2:
        counts["prompts whose answers score the same"] += 1
        return
    prompt = as_json(one.prompt)
    if config.select == ALL:
        yield {"prompt": prompt, "responses": [answer for answer, _ in known], "scores": values}
        return
    digest = hashlib.sha256(f"{config.seed} {one.place}".encode()).digest()
    pairs = config.rule(values, np.random.default_rng(int.from_bytes(digest[:8], "little")))
    if config.select == RSO and len(known) < config.accept:
        counts[f"prompts with fewer than {config.accept} different answers"] += 1
    if not pairs:
        counts["prompts whose pairs all tie"] += 1
    for better, worse in pairs:
        yield {
            "prompt": prompt,
            "chosen": _turns(one, known[better][0]),
            "rejected": _turns(one, known[worse][0]),
            "score_chosen": values[better],
            "score_rejected": values[worse],
        }


def _turns(one: Asked, answer: str) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt."""
    return answer if isinstance(one.prompt, str) else [{"role": "assistant", "content": answer}]


def _statistics(config: SampleConfig, selected: Preferences) -> dict[str, Any]:
    values, rows = np.array(selected.values), selected.rows
    heights, edges = np.histogram(values, BINS)
    result = {
        "model": config.answers.model,
        "score": config.choice.score,
        "select": config.choice.select,
        "samples": config.answers.samples,
        **selected.counts,
        "distinct": len(values),
        "rows": len(rows),
        "mean_score": float(values.mean()),
        "histogram": {"edges": edges.tolist(), "counts": heights.tolist()},
    }
    if config.choice.select != ALL:
        for kind in ("chosen", "rejected"):
            result[f"mean_score_{kind}"] = float(np.mean([row[f"score_{kind}"] for row in rows]))
            texts = [row[kind] if isinstance(row[kind], str) else row[kind][-1]["content"] for row in rows]
            result[f"mean_characters_{kind}"] = float(np.mean([len(text) for text in texts]))
    return result


def _verdict(result: Mapping[str, Any]) -> str:
    kind = "rows" if result["select"] == ALL else "pairs"
    made = f"{result['rows']:,} {kind} of {result['distinct']:,} different answers to {result['prompts']:,} prompts"
    if result["select"] == ALL:
        return f"{made}, which score {result['mean_score']:.3g} on average."
    chosen, rejected = (
        f"{result[f'mean_score_{side}']:.3g} ({result[f'mean_characters_{side}']:.0f} characters)"
        for side in ("chosen", "rejected")
    )
    return f"{made}: chosen ones score {chosen} on average, rejected ones {rejected}."


def _page(title: str, selected: Preferences, result: Mapping[str, Any]) -> str:
    step = -(-len(selected.asked) // SHOWN)
    shown = [
        (
            turns(one.prompt)[-1].content,
            sorted(
                zip(values, one.answers, strict=True),
                key=lambda scored: float("-inf") if scored[0] is None else scored[0],
                reverse=True,
            ),
        )
        for one, values in list(zip(selected.asked, selected.scores, strict=True))[::step]
    ]
    plain = {
        NAMED.get(name, name.replace("_", " ")): f"{value:,.4g}" if isinstance(value, float) else value
        for name, value in result.items()
        if name != "histogram"
    }
    histogram, most = result["histogram"], max(result["histogram"]["counts"])
    bars = [(count, count / most) for count in histogram["counts"]]
    ends = [f"{edge:.4g}" for edge in (histogram["edges"][0], histogram["edges"][-1])]
    verdict = _verdict(result)
    return render("samples.html", title=title, verdict=verdict, plain=plain, bars=bars, ends=ends, shown=shown)
