"""Rounds: the policy answers prompts as it is, its answers are scored and chosen from, and it is trained on them.

All of it on the run's mesh: nothing is exported between. What a round trains on is on disk before its first step, in
the run folder's `rounds`, so that a run that is stopped in the middle of a round, its sampling included, goes on as if
it had never been: NNNN.answers.jsonl has the answers, NNNN.jsonl the rows chosen from them, NNNN.safetensors the
reference's log-probs, and NNNN.json, which is written last, the round's metrics.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load, save

from rpo_jax.config import Config, RoundsConfig, resolve
from rpo_jax.core.files import atomic_write, read_json
from rpo_jax.core.jsonl import GrowingFile, complete_lines, parse_json, write_jsonl
from rpo_jax.core.records import Batch, PreferenceData, TokenizedResponse
from rpo_jax.core.shards import row_multiple
from rpo_jax.data.limited_tokenizer import TokenizerError
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig, Policy
from rpo_jax.objectives import heads
from rpo_jax.runs.folder import MODEL, NOT_OF_A_ROUND
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.sampling.answers import Answer, Answerer, batch_rows, prompt_seeds
from rpo_jax.sampling.engine import Engine, Sampling
from rpo_jax.training.hooks.hook import Hook, Training
from rpo_jax.training.hooks.samples import make_readable
from rpo_jax.training.hooks.saving import Saving
from rpo_jax.training.loop import BatchFacts
from rpo_jax.training.optimizer import extrapolated
from rpo_jax.training.prepare import Prepared, batches_of, prepare, reference_pass, total_steps
from rpo_jax.training.reference import compute_log_probs
from rpo_jax.training.step import Params, build_log_probs, put_batch

FOLDER = "rounds"
ASKED = "asked"  # in a round's file of metrics: the settings that it was made by
BATCH_ANSWERS = 32
AnswerRow = dict[str, Any]


class RoundFailed(ValueError):
    """A round gives nothing to train on; the message says why."""


class Rater(Protocol):
    """Scores answers and chooses what is trained on (rpo_jax.tools.sampling)."""

    def rows(self, answers: Sequence[AnswerRow]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Rows of preferences made of answers, and metrics of them; RoundFailed where there are none.

        Args:
            answers: rows as the command generate writes them, several of a prompt one after another.
        """
        ...

    def scores(self, answers: Sequence[AnswerRow]) -> list[float]:
        """The scores of those answers that have one; RoundFailed where the scorer fails."""
        ...


def round_steps(config: Config, num_prompts: int) -> int:
    """Optimizer steps of a round."""
    prompts = min(config.rounds.prompts or num_prompts, num_prompts)
    return config.rounds.steps or total_steps(config.train, -(-prompts // config.batch.pairs))


def drawn(seed: int, number: int, count: int, size: int) -> list[int]:
    """Of `size` prompts the `count` of this round: none a second time until all have been drawn, then shuffled anew.

    No prompt comes twice in a round either: where a round has the last of one turn, the next turn, whose first it has
    too, begins with others.
    """
    order, indices = np.empty(0, np.int64), list[int]()
    for turn in range((number * count + count - 1) // size + 1):
        before, order = order, np.random.default_rng([seed, turn]).permutation(size)
        ended = turn * size % count  # of a round, when this turn begins
        begun = np.isin(order, before[size - ended :]) if ended else np.zeros(size, bool)
        first = order[~begun][: count - ended]
        order = np.concatenate([first, order[~np.isin(order, first)]])
        start, end = (max(0, min(size, at * count - turn * size)) for at in (number, number + 1))
        indices += order[start:end].tolist()
    return indices


class RoundBatches:
    """Batches of the round at hand; a round's steps begin once `begin` has been given its batches."""

    steps_per_epoch = None

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._number, self._batches = -1, None

    def begin(self, number: int, batches: PreferenceBatches) -> None:
        self._number, self._batches = number, batches

    @property
    def _now(self) -> PreferenceBatches:
        assert self._batches is not None, "a round has begun"
        return self._batches

    @property
    def data(self) -> PreferenceData:
        return self._now.data

    def ready(self, step: int) -> bool:
        return step // self.steps == self._number

    def batch_at(self, step: int) -> Batch:
        assert self.ready(step)
        return self._now.batch_at(step % self.steps)

    def plan_at(self, step: int) -> BatchFacts:
        return self._now.plan_at(step % self.steps)


class Extrapolation(Hook):
    """After a round, but for the last, takes the weights on by alpha times their way since the round before.

    Before the checkpoint of that step, which therefore holds them as the next round begins.
    """

    def __init__(self, alpha: float, steps: int, state_shardings: Any) -> None:
        self._alpha, self._steps = alpha, steps
        go_on = functools.partial(extrapolated, alpha=alpha)
        self._go_on = jax.jit(go_on, out_shardings=state_shardings, donate_argnums=0)

    def wants_pause(self, run: Training) -> bool:
        return bool(self._alpha) and run.step % self._steps == 0

    def at_pause(self, run: Training) -> None:
        if self.wants_pause(run) and run.step < run.total_steps:
            run.state = self._go_on(run.state)


@dataclass(frozen=True)
class RoundModels:
    """The policy in training, and what goes with it.

    Attributes:
        start: parameters of the policy before training, as log-probs are computed with them.
        frozen: weights of the policy that are not trained; an empty tree where all are.
        end_ids: tokens that end an answer.
    """

    config: ModelConfig
    mesh: Mesh
    start: Params
    frozen: Params
    end_ids: frozenset[int]


@dataclass
class Rounds(Hook):
    """Begins each round: samples, has its answers scored, and hands over its batches.

    The last of the hooks: the checkpoint of the step before a round is saved, if it is due, before the round is
    sampled; where the round fails or the run is to stop meanwhile, it is saved in any case.
    """

    config: Config
    prepared: Prepared
    models: RoundModels
    batches: RoundBatches
    reporter: Reporter
    rater: Rater
    saving: Saving
    log: MetricsLog

    def __post_init__(self) -> None:
        settings, model_config, mesh = self.config.rounds, self.models.config, self.models.mesh
        self._folder = Path(self.config.run.dir).expanduser() / FOLDER
        dtype, ends = self.config.model.compute_dtype, sorted(self.models.end_ids)
        self._policy = Policy(model_config, self.config.lora)
        self._readable = make_readable(self._policy, dtype, mesh)

        @functools.cache  # one for both, where both sample alike
        def engine(sampling: Sampling) -> Engine:
            return Engine(model_config, mesh, sampling=sampling, end_ids=ends, compute_dtype=dtype)

        sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        # At temperature 1 and of all tokens: only so are log-ratios of its answers an estimate of the KL.
        self._engines = {"train": engine(sampling), "held_out": engine(Sampling(temperature=1.0))}
        prompts = [one.prompt_ids for part in self.prepared.prompts.values() for one in part.data.examples]
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        # Of a prompt and an answer with its end token; encoded anew, an answer may have some tokens more, and is cut.
        most = min(self.config.data.max_tokens, longest + settings.max_tokens + 1)
        multiple = row_multiple(self.config.mesh.context)
        row_tokens = -(-(2 * most - shortest) // multiple) * multiple
        self._trained_as = _of_one_round(self.config, most, self.config.batch.row_tokens or row_tokens)
        self._log_probs = build_log_probs(self._trained_as, model_config, mesh)[0]
        self._needs_reference = resolve(self.config).reference == "cached"
        # What a round's rows and log-probs follow from, besides the policy.
        kept = {name: value for name, value in asdict(settings).items() if name not in NOT_OF_A_ROUND}
        self._asked = {**kept, "cut_at": most}

    def before_first_step(self, run: Training) -> None:
        number = run.step // self.batches.steps
        for file in self._folder.glob("[0-9]*.*"):  # a process that is killed may leave .NNNN.json.*.tmp
            if int(file.name.partition(".")[0]) > number:
                file.unlink()  # of an earlier part of the run, which this one does again
        self._begin(run)

    def wants_pause(self, run: Training) -> bool:
        return run.step % self.batches.steps == 0

    def at_pause(self, run: Training) -> None:
        if self.wants_pause(run):
            self._begin(run)

    def _begin(self, run: Training) -> None:
        if run.stop_reason is not None:
            return
        if run.step == 0:
            self.saving.keep(run)  # what a round before the first checkpoint samples is not to be lost
        number = run.step // self.batches.steps
        try:
            self._make(run, number)
        except (RoundFailed, TokenizerError) as error:
            self.saving.keep(run)
            raise RoundFailed(f"round {number} (after step {run.step}): {error}") from error
        except BaseException:
            self.saving.keep(run)
            raise
        if run.stop_reason is not None:
            self.saving.keep(run)

    def _make(self, run: Training, number: int) -> None:
        """Have the round's data on disk, and its batches; neither where the run is to stop meanwhile."""
        began, name, last = time.perf_counter(), f"{number:04d}", run.step == run.total_steps
        self._folder.mkdir(exist_ok=True)
        done, metrics = self._folder / f"{name}.json", None
        first = run.step - run.step % self.batches.steps  # the step that the round begins after
        if done.is_file() and (last or (self._folder / f"{name}.jsonl").is_file()):  # else it was the last, and is not
            metrics = read_json(self._folder, done.name)
            # Made otherwise than this run is to: made anew, where the policy that it is made by is at hand.
            asked = metrics.pop(ASKED, self._asked)
            alike = metrics["step"] == first and (last or asked == self._asked)
            metrics = metrics if alike or run.step != first else None
        elif run.step != first:
            raise RoundFailed(
                f"{done} is gone, and this checkpoint is past the policy that made it; resume an earlier one."
            )
        logged = metrics is not None and self.log.round.get("step") == metrics["step"]
        if metrics is None:
            made = self._sampled(run, number, last)
            if made is None:
                return
            metrics = {"step": run.step, "round": number, **made}
        if not last:
            with _of_rows():
                read = self._read(name)
            data = self._with_reference(run, read, self._folder / f"{name}.safetensors")
            least = self.config.rounds.samples - 1  # of a kind, that a prompt may have in this round or another
            shards, responses = sharding.row_shards(self.models.mesh), self.prepared.responses
            with _of_rows():
                batches = batches_of(self._trained_as, data, responses, shards, least_slots=least)
            self.batches.begin(number, batches)
        if "rounds/seconds" not in metrics:
            metrics["rounds/seconds"] = time.perf_counter() - began
            atomic_write(done, json.dumps({**metrics, ASKED: self._asked}) + "\n")
        if not logged:
            self.log.write(metrics)
            self.reporter.say(f"round {number}  {_told(metrics)}")

    def _sampled(self, run: Training, number: int, last: bool) -> dict[str, float] | None:
        """The round's rows on disk, and its metrics; None where the run is to stop."""
        name, held_out = f"{number:04d}", {}
        params = self._readable(run.state.params, self.models.frozen)
        if "held_out" in self.prepared.prompts and (last or number % self.config.rounds.eval_every == 0):
            evaluated = self._evaluated(run, params, number)
            if evaluated is None:
                return None
            held_out |= evaluated
        if last:
            return held_out
        count = len(self.prepared.prompts["train"].rows)
        wanted = drawn(self.config.run.seed, number, min(self.config.rounds.prompts or count, count), count)
        numbers = [index for index in wanted for _ in range(self.config.rounds.samples)]
        answers = self._answers(run, "train", numbers, params, number, self._folder / f"{name}.answers.jsonl")
        if answers is None:
            return None
        rows, metrics = self.rater.rows([self._as_row("train", numbers[one.index], one) for one in answers])
        # Log-probs of other rows, which this round had when it failed.
        (self._folder / f"{name}.safetensors").unlink(missing_ok=True)
        write_jsonl(self._folder / f"{name}.jsonl", rows, ascii_only=False)
        return {**metrics, **held_out}

    def _answers(
        self, run: Training, part: str, numbers: Sequence[int], params: Params, number: int, file: Path | None = None
    ) -> list[Answer] | None:
        """An answer to each of the prompts with these numbers, in their order; None where the run is to stop.

        Args:
            file: has the answers that an earlier part of the run was given, and gets the others as they come. Those
                that it was given otherwise, as a round that failed may go on with another temperature, are given anew.
        """
        examples = self.prepared.prompts[part].data.examples
        prompts = [examples[index].prompt_ids for index in numbers]
        room = (min(self.models.config.positions, self.config.data.max_tokens - 1) - len(ids) for ids in prompts)
        limits = [max(0, min(self.config.rounds.max_tokens, left)) for left in room]
        seeds = prompt_seeds(prompts, (self.config.run.seed << 32) + 2 * number + (part != "train"))
        sampling = [self.config.rounds.temperature, self.config.rounds.top_k, self.config.rounds.top_p]
        # What an answer follows from besides the policy; a seed says which prompt it is and which of its samples.
        asked = [[seed, limit, *sampling] for seed, limit in zip(seeds, limits, strict=True)]
        done: dict[int, Answer] = {}
        growing: GrowingFile | None = None
        if file is not None:
            for line in map(parse_json, complete_lines(file)):
                index, own = line["index"], line.pop("asked", None)
                if index < len(asked) and own == asked[index]:
                    done[index] = Answer(**line)
            write_jsonl(file, [_saved(answer, asked) for answer in done.values()], ascii_only=False)
            growing = GrowingFile(file, self.reporter.say, ascii_only=False)
        rows = batch_rows(BATCH_ANSWERS, len(numbers), sharding.row_shards(self.models.mesh))
        ends, tokenizer = self.models.end_ids, self.prepared.tokenizer
        answerer = Answerer(self._engines[part], params, tokenizer, ends, (), rows)
        missing = [index for index in range(len(numbers)) if index not in done]
        for some in answerer.answers(prompts, seeds, limits, missing) if missing else ():
            done |= {answer.index: answer for answer in some}
            if growing is not None:
                growing.add(*(_saved(answer, asked) for answer in some))
            saving = 2 * self.saving.checkpoints.longest_save(default=1.0)
            if len(done) < len(numbers) and run.stopping.requested("sampling", saving):
                return None
        return [done[index] for index in range(len(numbers))]

    def _as_row(self, part: str, number: int, answer: Answer) -> AnswerRow:
        row = self.prepared.prompts[part].rows[number]
        prompt = row.prompt if isinstance(row.prompt, str) else [turn.to_dict() for turn in row.prompt]
        answered = {"response": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens}
        return {"row_id": row.row_id, "prompt": prompt, **answered}

    def _evaluated(self, run: Training, params: Params, number: int) -> dict[str, float] | None:
        """The held-out reward, and the KL to the start in nats an answer, of one sampled answer to each prompt.

        No reward where no answer has a score, as from a judge, who compares answers to the same prompt.
        """
        asked = self.prepared.prompts["held_out"].data.examples
        count = min(self.config.rounds.eval_prompts, len(asked))
        answers = self._answers(run, "held_out", range(count), params, number)
        if answers is None:
            return None
        scores = self.rater.scores([self._as_row("held_out", one.index, one) for one in answers])
        examples = [
            replace(one, responses=(TokenizedResponse("chosen", np.array(answer.ids, np.int32)),))
            for one, answer in zip(asked, answers, strict=False)
            if len(answer.ids)
        ]
        data, now = PreferenceData(examples), self._params(run)
        ratios = self._scored(data, ("chosen",), now) - self._scored(data, ("chosen",), self.models.start)
        rewards = {"eval_reward": float(np.mean(scores)), "eval_reward_std": float(np.std(scores))} if scores else {}
        return {
            **rewards,
            "eval_kl": float(np.mean(ratios)),
            "eval_completions/mean_length": float(np.mean([answer.tokens for answer in answers])),
        }

    def _params(self, run: Training) -> Params:
        return self._policy.combine(heads.split(run.state.params)[0], self.models.frozen)

    def _scored(self, data: PreferenceData, kinds: tuple[str, ...], params: Params) -> np.ndarray:
        """Log-probs of all responses of these kinds."""
        mesh = self.models.mesh
        passes = reference_pass(self._trained_as, data, kinds, sharding.row_shards(mesh), doubling=True)
        return compute_log_probs(
            passes, lambda batch: self._log_probs(params, put_batch(mesh, batch)), lambda done, metrics: None
        )

    def _read(self, name: str) -> Prepared:
        """The round's rows as training reads them."""
        data = replace(self._trained_as.data, path=str(self._folder / f"{name}.jsonl"))
        tokenizer = Path(self.config.run.dir).expanduser() / MODEL
        return prepare(replace(self._trained_as, data=data), Reporter(silent=True), tokenizer)

    def _with_reference(self, run: Training, prepared: Prepared, file: Path) -> PreferenceData:
        """The round's data with the log-probs of its reference, kept: the policy that they may be of goes on."""
        data = prepared.train
        if not self._needs_reference:
            return data
        if file.is_file():
            return replace(data, reference_log_probs=load(file.read_bytes())["log_probs"])
        reference = self.models.start if self.config.rounds.reference == "start" else self._params(run)
        log_probs = self._scored(data, self.prepared.responses, reference)
        atomic_write(file, save({"log_probs": log_probs}))
        return replace(data, reference_log_probs=log_probs)


@contextlib.contextmanager
def _of_rows() -> Iterator[None]:
    """What cannot be read or packed of a round's rows ends the round, as that of a file ends a run before it begins."""
    try:
        yield
    except ValueError as error:
        raise RoundFailed(str(error)) from error


def _of_one_round(config: Config, max_tokens: int, row_tokens: int) -> Config:
    """What trains on the rows of a round, which `data.path` is still to name."""
    ranked = config.rounds.select == "all"
    data = replace(
        config.data,
        split="train",
        eval_path=None,
        eval_rows=0,
        train_rows=None,
        layout="ranked" if ranked else "preference",
        columns={},
        ignore_columns=(),
        chosen_score="score_chosen",
        rejected_score="score_rejected",
        max_tokens=max_tokens,
        max_prompt_tokens=min(config.data.max_prompt_tokens, max_tokens - 1),
        truncation_side="keep_end",
        on_bad_row="skip",
    )
    batch = replace(config.batch, row_tokens=row_tokens)
    return replace(config, data=data, batch=batch, rounds=RoundsConfig(), train=replace(config.train, rounds=0))


def _saved(answer: Answer, asked: Sequence[list[Any]]) -> dict[str, Any]:
    answered = {"index": answer.index, "text": answer.text, "finish_reason": answer.finish_reason}
    return {**answered, "tokens": answer.tokens, "ids": list(map(int, answer.ids)), "asked": asked[answer.index]}


def _told(metrics: Mapping[str, float]) -> str:
    names = {
        "reward": "reward",
        "rounds/rows": "rows",
        "eval_reward": "held-out reward",
        "eval_kl": "KL to the start",
        "rounds/seconds": "seconds",
    }
    return "  ".join(f"{word} {metrics[name]:.4g}" for name, word in names.items() if name in metrics)
