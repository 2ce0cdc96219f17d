"""A preference task of a model's own answers: a public scorer scores them, and noisy draws by score make the data.

`sentiment`: VADER's compound score, -1 to 1 (Hutto & Gilbert 2014, ICWSM), of answers about sixty dull things or so. A
list of words with weights: it can say how well an objective raises a number that is cheap to raise, not whether
anybody would like the answers. `harmless`: how likely the classifier of `alt-profanity-check`, a linear one on words,
finds the answer clean, 0 to 1, and 0 for an answer of fewer than SHORTEST words, so that silence does not win. It sees
rude words and no intent: a polite recipe for something terrible is harmless to it, a refusal that repeats the
question's words is not.

Which of two answers is preferred is a Bradley-Terry draw: a with probability sigmoid((score a - score b) / scale). A
seed decides prompts, answers and draws. Prompts to train, to tune and to test are apart and the same for every seed.
"""

from __future__ import annotations

import gzip
import importlib
import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]
Scorer = Callable[[str], float]
SHORTEST = 5  # words of an answer that can be harmless
MOST_WORDS = 40  # of a prompt from transcripts
_HUMAN, _ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


def sentiment() -> Scorer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    return lambda answer: float(score(answer)["compound"])


def harmless() -> Scorer:
    predict = importlib.import_module("profanity_check").predict_prob
    return lambda answer: float(1 - predict([answer])[0]) if len(answer.split()) >= SHORTEST else 0.0


SCORERS = {"sentiment": (sentiment, "vaderSentiment"), "harmless": (harmless, "alt-profanity-check")}


@dataclass(frozen=True)
class ScoredTask:
    """Which prompts are answered and scored how, and how much data is drawn of it.

    Args:
        score: one of SCORERS.
        prompts: `.json` with `questions` to be asked of each topic of `train` and `held_out`, or transcripts as
            Anthropic-HH has them, `.jsonl` or `.jsonl.gz`, of which the first human turns are asked.
        system: what every prompt begins with.
        form: what a row is: two answers, of which one is preferred; one answer, which is good or not; or all answers
            of a prompt with their scores (layouts preference, unpaired, ranked).
        rows: to train on.
        train_prompts: that the start answers, at most; the rows are of these.
        samples: answers of the start to each of them, at temperature 1.
        tune_prompts: held-out ones that choose a frontier's policies; test_prompts: those that say where it lies.
        scale: of the Bradley-Terry draws, in units of the score; 0 prefers the better score always.
        noise: share of rows whose labels are swapped besides.
    """

    score: str
    prompts: str = "configs/data/smollm2_prompts.json"
    system: str = "Be brief."
    form: Literal["pairs", "unpaired", "ranked"] = "pairs"
    rows: int = 96
    train_prompts: int = 320
    samples: int = 4
    tune_prompts: int = 48
    test_prompts: int = 48
    scale: float = 0.2
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in SCORERS:
            raise ValueError(f"score={self.score} is not known; there are {', '.join(SCORERS)}.")
        if self.form not in ("pairs", "unpaired", "ranked"):
            raise ValueError(f"form={self.form} is not known; there are pairs, unpaired, ranked.")
        if self.form == "ranked" and self.noise:
            raise ValueError(f"noise={self.noise} swaps labels, and ranked rows have none; raise scale.")
        counts = (self.rows, self.train_prompts, self.tune_prompts, self.test_prompts)
        if min(counts) < 1 or self.samples < 2:
            raise ValueError(
                f"rows={self.rows}, train_prompts={self.train_prompts}, tune_prompts={self.tune_prompts} and "
                f"test_prompts={self.test_prompts} must be at least 1, samples={self.samples} at least 2."
            )
        if self.scale < 0 or not 0 <= self.noise <= 1:
            raise ValueError(f"scale={self.scale} must not be negative, and noise={self.noise} be from 0 to 1.")

    def scorer(self) -> Scorer:
        """From an answer to its score; ValueError where its package is not installed."""
        make, package = SCORERS[self.score]
        try:
            return make()
        except ImportError:
            raise ValueError(f"score={self.score} needs the package {package}: pip install {package}") from None

    def asked(self, opened: Callable[[str], str] = str) -> tuple[list[Row], list[Row]]:
        """Rows that rpo_jax.generate answers: to train on, and held-out ones, those that tune before those that test.

        Args:
            opened: from the path as given to the file that is meant.
        """
        read = _transcript_prompts if self.prompts.endswith((".jsonl", ".jsonl.gz")) else _topic_prompts
        try:
            train, tune, test = read(opened(self.prompts))
        except (OSError, EOFError, zlib.error, LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"task: prompts={self.prompts} cannot be read as prompts: {error}") from None
        for name, some, count in (("tune", tune, self.tune_prompts), ("test", test, self.test_prompts)):
            if count > len(some):
                raise ValueError(f"task: {name}_prompts={count} are more than the {len(some)} of {self.prompts}.")
        held_out = tune[: self.tune_prompts] + test[: self.test_prompts]
        system = [{"role": "system", "content": self.system}] if self.system else []

        def rows(texts: Sequence[str]) -> list[Row]:
            return [{"messages": [*system, {"role": "user", "content": text}]} for text in texts]

        return rows(train[: self.train_prompts]), rows(held_out)

    def held_out(self) -> ScoredTask:
        """What of it a model meets that is not trained on it: the same for any amount and form of training data."""
        tune, test = self.tune_prompts, self.test_prompts
        return ScoredTask(self.score, self.prompts, self.system, tune_prompts=tune, test_prompts=test)

    def training_rows(self, answers: Sequence[Mapping[str, Any]], seed: int) -> list[Row]:
        """Rows of the form asked for, drawn from scored answers.

        Prompts are drawn round after round, so that `rows` of them are as even as can be.

        Args:
            answers: rows of rpo_jax.generate, with `score` beside; those that are empty, did not end or hold a null
                character are left out.

        Raises ValueError where there are not as many.
        """
        of: dict[str, dict[str, float]] = {}
        prompts: dict[str, Any] = {}
        ended = [row for row in answers if row["finish_reason"] == "eos"]
        for row in ended:
            # Training reads no text with a null character.
            if row["response"].strip() and "\0" not in row["response"]:
                of.setdefault(row["row_id"], {})[row["response"]] = row["score"]
                prompts[row["row_id"]] = row["prompt"]
        random_, draws = random.Random(seed), np.random.default_rng(seed)
        groups = []
        for place, scores in of.items():
            candidates = [tuple(scores)] if self.form == "ranked" else list(combinations(scores, 2))
            random_.shuffle(candidates)
            groups.append([(place, texts) for texts in candidates if len(texts) > 1])
        random_.shuffle(groups)
        ordered = [
            group[turn] for turn in range(max(map(len, groups), default=0)) for group in groups if turn < len(group)
        ]
        if len(ordered) < self.rows:
            raise ValueError(
                f"task: rows={self.rows} are more than the {len(ordered)} that the answers make ({len(ended)} of "
                f"{len(answers)} ended); lower it, raise train_prompts, samples or max_tokens, or have system ask for "
                "shorter answers."
            )
        rows = []
        for place, texts in ordered[: self.rows]:
            # Scores with Gumbel noise are ordered by a Bradley-Terry draw.
            noisy = [of[place][text] + self.scale * float(draws.gumbel()) for text in texts]
            if self.form == "ranked":
                rows.append({"prompt": prompts[place], "responses": list(texts), "scores": noisy})
                continue
            swapped, keeps_chosen = draws.random() < self.noise, draws.random() < 0.5
            chosen, rejected = texts if (noisy[0] > noisy[1]) != swapped else texts[::-1]
            if self.form == "pairs":
                rows.append({"prompt": prompts[place], "chosen": _turn(chosen), "rejected": _turn(rejected)})
            else:
                kept = _turn(chosen if keeps_chosen else rejected)
                rows.append({"prompt": prompts[place], "completion": kept, "label": keeps_chosen})
        return rows


def _turn(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def _topic_prompts(path: str) -> tuple[list[str], list[str], list[str]]:
    """Prompts of the topics to train on, and of each half of the held-out ones."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    held_out = content["held_out"]
    parts = content["train"], held_out[::2], held_out[1::2]
    made = [[question.format(topic=topic) for topic in part for question in content["questions"]] for part in parts]
    for part in made:
        random.Random(0).shuffle(part)
    return made[0], made[1], made[2]


def _transcript_prompts(path: str) -> tuple[list[str], list[str], list[str]]:
    """First human turns of transcripts, each once: eight of ten to train on, one each to tune and to test."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file if line.strip()]
    first = [text.removeprefix(_HUMAN).split(_ASSISTANT)[0].strip() for text in texts]
    asked = sorted({text for text in first if text and len(text.split()) <= MOST_WORDS})
    random.Random(0).shuffle(asked)
    tenth = len(asked) // 10
    return asked[2 * tenth :], asked[:tenth], asked[tenth : 2 * tenth]
