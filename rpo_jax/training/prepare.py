"""From files to packed-ready data: read, split, tokenise, embed. No model runs here but the sentence encoder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float

from rpo_jax import models
from rpo_jax.config import Config, DataConfig
from rpo_jax.core.records import KINDS, REFINED, PreferenceData, PreferenceExample
from rpo_jax.data.embeddings import embed_texts
from rpo_jax.data.examples import ExampleSet, embedding_text, make_examples, prompt_text
from rpo_jax.data.faults import Faults
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.refine import refined
from rpo_jax.data.share import Reading, Share
from rpo_jax.data.sources import read_rows
from rpo_jax.data.sweep import Sweep
from rpo_jax.data.tokenize import tokenize_examples
from rpo_jax.data.tokenizer import DEFAULT_CHAT_TEMPLATE, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from rpo_jax.hosts import processes
from rpo_jax.objectives.contrast import WEIGHTS
from rpo_jax.objectives.losses import Objective, objective_named
from rpo_jax.runs.tracking import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OwnRows = Callable[[int], Bool[np.ndarray, "R"]]


@dataclass(frozen=True)
class Prepared:
    """What training reads: the tokenizer, the training data, and the held-out data where there is any.

    Attributes:
        responses: the kinds of response that the objective needs.
        origins: for train and held_out, what their token ids were made from, as rpo_jax.training.reference names it.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PreferenceData
    held_out: PreferenceData | None
    responses: tuple[str, ...]
    origins: Mapping[str, Mapping[str, str]]

    @property
    def eval_responses(self) -> tuple[str, ...]:
        """Held-out pairs are scored on both sides whatever the objective: accuracy needs them."""
        held_out = () if self.held_out is None else self.held_out.examples
        compared = {"rejected"} if any(example.rejected_ids is not None for example in held_out) else set()
        return tuple(name for name in KINDS if name in {*self.responses, *compared})


def checked_objective(config: Config) -> Objective:
    """The objective of a configuration; ValueError where its parts do not fit together."""
    settings = config.objective
    objective = objective_named(
        settings.name, link=settings.link, weights=config.contrast.weights, partition=settings.partition
    )
    kind = config.contrast.weights or objective.weights
    if kind is not None and WEIGHTS[kind].needs_pairs and config.data.pairing == "unpaired":
        raise ValueError(
            f"objective.name={config.objective.name} contrasts the two responses of a pair, but data.pairing is "
            "unpaired; set contrast.weights to embedding or uniform, or data.pairing to paired."
        )
    return objective


def is_paired(data: PreferenceData) -> bool:
    return all(e.chosen_ids is not None and e.rejected_ids is not None for e in data.examples)


def batches_of(
    config: Config,
    data: PreferenceData,
    responses: tuple[str, ...],
    row_shards: int,
    own_rows: OwnRows | None = None,
) -> PreferenceBatches:
    """Training batches of a data set; `row_shards` devices split a batch's rows, `own_rows` are this process's."""
    return PreferenceBatches(
        data,
        pairs=config.batch.pairs,
        pairing=config.data.pairing,
        responses=responses,
        order=config.batch.order,
        group=None if config.contrast.group == "global" else config.contrast.group,
        seed=config.run.seed,
        row_tokens=config.batch.row_tokens,
        row_segments=_row_segments(config),
        rows_multiple=config.batch.micro_rows or row_shards,
        own_rows=own_rows,
    )


def sweep_of(
    config: Config,
    data: PreferenceData,
    responses: tuple[str, ...],
    row_shards: int,
    own_rows: OwnRows | None = None,
) -> PreferenceBatches:
    """Batches of every response once, in order: for evaluation."""
    return PreferenceBatches(
        data,
        pairs=config.batch.pairs,
        pairing="paired" if is_paired(data) else "unpaired",
        responses=responses,
        order="sequential",
        seed=0,
        row_tokens=config.batch.row_tokens,
        row_segments=_row_segments(config),
        rows_multiple=config.batch.micro_rows or row_shards,
        own_rows=own_rows,
    )


def _row_segments(config: Config) -> int:
    """How many of the longest segments a row may hold: two, which pack better, unless a row's length has a price."""
    # Micro-batches are counted in rows, to bound memory; and only attention by blocks skips what is far away.
    skips = models.attention_kind(config.model.attention, jax.default_backend()).skips
    return 2 if skips and config.batch.micro_rows is None else 1


def reference_sweep(
    config: Config,
    data: PreferenceData,
    responses: tuple[str, ...],
    row_shards: int,
    own_rows: OwnRows | None = None,
) -> Sweep:
    """Every response once, in rows as full as they get, a training batch's worth of them in memory at a time."""
    return Sweep(
        data,
        responses,
        batch_pairs=config.batch.pairs,
        row_tokens=config.batch.row_tokens,
        rows_multiple=config.batch.micro_rows or row_shards,
        own_rows=own_rows,
    )


def _share() -> Share:
    return Share(processes.process_id(), processes.num_processes(), processes.gather)


def _read(config: DataConfig, path: str, split: str, scored: bool, reporter: Reporter) -> ExampleSet:
    reading = Reading(_share())
    rows = read_rows(path, split=split, reading=reading)
    columns = (config.chosen_score, config.rejected_score) if scored else None
    found = make_examples(rows, config.layout, config.on_bad_row, reading, columns)
    if found.faults:
        reporter.say(f"{path}: {found.faults.total} unusable rows skipped\n{found.faults.report()}")
    return found


def _split(config: DataConfig, scored: bool, reporter: Reporter) -> tuple[ExampleSet, ExampleSet | None]:
    """Training and held-out examples, with scores of their responses where the objective needs them."""
    if config.path is None:
        raise ValueError("data.path is not set; give a file, a folder or a hub data set.")
    whole = _read(config, config.path, config.split, scored, reporter)
    examples, held_out = whole.examples, None
    if config.eval_path is not None:
        held_out = _read(config, config.eval_path, config.eval_split, scored, reporter)
    elif config.eval_rows:
        if config.eval_rows >= len(examples):
            raise ValueError(
                f"data.eval_rows={config.eval_rows} leaves nothing to train on: {config.path} has {len(examples)} "
                "usable examples."
            )
        held_out = replace(whole, examples=examples[-config.eval_rows :])
        examples = examples[: -config.eval_rows]
    return replace(whole, examples=examples[: config.train_rows]), held_out


def _tokenizer(
    config: Config, examples: Sequence[PreferenceExample | None], trained: Path | None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; for a new model one that is learnt from the training texts.

    Where it has no chat template but conversations are rendered, it takes the default one along into the run folder
    and the exported model: whoever serves it renders prompts as they were in training.
    """
    source = trained or config.model.path or config.model.tokenizer
    if source != "train":
        tokenizer = load_tokenizer(source)
        turns = any(e is not None and not isinstance(e.prompt, str) for e in examples)
        rendered = config.data.template == "chat" or any(processes.gather(turns))
        if tokenizer.chat_template is None and rendered:
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
        return tokenizer
    # The one thing that needs all texts on every process: a vocabulary learnt from scratch.
    texts = _share().complete([None if e is None else [prompt_text(e), e.chosen, e.rejected] for e in examples])
    texts = [text for three in texts for text in three if text is not None]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, config.model.vocab_size, Path(folder) / "tokenizer")


def _truncation_side(config: Config, found: ExampleSet) -> Literal["keep_start", "keep_end"]:
    side = config.data.truncation_side
    return found.truncation_side if side == "auto" else side


def _origins(config: Config, name: str, found: ExampleSet, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the token ids of a part of the data are made from: the cache of reference log-probs says what changed."""
    share = _share()
    parts = [repr((e.prompt, e.chosen, e.rejected)) for e in found.own]
    hashes = np.frombuffer(b"".join(hashlib.sha256(part.encode()).digest() for part in parts), np.uint8)
    hashes = share.together(hashes.reshape(-1, hashlib.sha256().digest_size), share.numbers(found.examples))
    path = str((config.data.eval_path if name == "held_out" else None) or config.data.path)
    local = Path(path).expanduser()
    limits = f"max_prompt_tokens={config.data.max_prompt_tokens} max_tokens={config.data.max_tokens}"
    return {
        "slot": f"{name} data, {local.resolve() if local.exists() else path}",
        "data": hashlib.sha256(hashes.tobytes()).hexdigest(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": config.data.template,
        "truncation": f"{limits} {_truncation_side(config, found)}",
    }


def _tokenized(
    config: Config,
    found: ExampleSet,
    tokenizer: PreTrainedTokenizerBase,
    responses: tuple[str, ...],
    reporter: Reporter,
) -> tuple[list, list[PreferenceExample | None]]:
    """Token ids, and the examples that they belong to; None for another process's."""
    tokenized, bad = tokenize_examples(
        found.examples,
        tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_tokens=config.data.max_tokens,
        truncation_side=_truncation_side(config, found),
        template=config.data.template,
        mismatched="mismatched" in responses,
        share=_share(),
    )
    if REFINED[0] in responses:
        settings: Any = config.objective  # options come from the table
        tokenized = refined(tokenized, settings.sr_prompt, tokenizer, config.data.max_tokens)
    faults = Faults()
    for row_id, reason in bad:
        faults.add(row_id, reason)
    if faults and (config.data.on_bad_row == "error" or not tokenized):
        advice = "fix them, or set data.on_bad_row: skip to leave them out" if tokenized else "none is left"
        raise ValueError(
            f"{faults.first.row_id}: {faults.first.reason}. {faults.total} of {len(found.examples)} examples cannot be "
            f"tokenised ({faults.counted()}); {advice}."
        )
    if faults:
        reporter.say(f"{faults.total} examples that cannot be tokenised skipped\n{faults.report()}")
    own = {example.row_id: example for example in found.own}
    return tokenized, [own.get(example.row_id) for example in tokenized]


def _embeddings(
    config: Config, examples: Sequence[PreferenceExample | None], reporter: Reporter
) -> tuple[Float[np.ndarray, "n E"], Float[np.ndarray, "n E"]]:
    """Embeddings that go with each example's chosen and rejected response; each process embeds its own examples."""
    kind, share = config.embedding.text, _share()
    own = [example for example in examples if example is not None]
    if kind == "prompt_response":
        texts = [embedding_text(e, kind, getattr(e, side) or "") for side in ("chosen", "rejected") for e in own]
    else:
        texts = [embedding_text(e, kind, "") for e in own]
    with reporter.progress("embed", len(texts)) as update:
        rows = embed_texts(
            texts,
            config.embedding.encoder,
            config.run.cache_dir,
            batch_texts=config.embedding.batch_texts,
            on_progress=lambda done, total: update(len(texts) - total + done, {}),
        )
    numbers = share.numbers(examples)
    chosen = share.together(rows[: len(own)], numbers)
    return chosen, share.together(rows[len(own) :], numbers) if kind == "prompt_response" else chosen


def _scores(examples: Sequence[PreferenceExample | None]) -> Float[np.ndarray, "n 2"]:
    """The data's scores of chosen and rejected responses; NaN where there is no such response."""
    own = [[np.nan if score is None else score for score in e.scores] for e in examples if e is not None]
    return _share().together(np.array(own, np.float32).reshape(-1, 2), _share().numbers(examples))


def prepare(config: Config, reporter: Reporter, trained_tokenizer: Path | None = None) -> Prepared:
    """Read, split, tokenise and embed the data of a configuration.

    Args:
        trained_tokenizer: tokenizer folder of the run that is being resumed.

    Raises:
        ValueError: for anything in the data or the configuration that cannot be used, with file and row.
    """
    objective = checked_objective(config)
    with reporter.phase("read") as notes:
        train, held_out = _split(config.data, objective.uses_scores, reporter)
        notes.append(f"{len(train.examples):,} training and {len(held_out.examples) if held_out else 0:,} held-out ")
        notes.append(f"examples, layout {train.layout}")
    with reporter.phase("tokenise") as notes:
        tokenizer = _tokenizer(config, train.examples, trained_tokenizer)
        parts, origins = {}, {}
        for name, found in (("train", train), ("held_out", held_out)):
            if found is not None:
                parts[name] = _tokenized(config, found, tokenizer, objective.responses, reporter)
                origins[name] = _origins(config, name, found, tokenizer)
        notes.append(f"vocabulary {len(tokenizer):,}")

    kind = config.contrast.weights or objective.weights
    weighed = kind is not None and WEIGHTS[kind].needs_embeddings
    # Held-out data is read in file order: its prompts are embedded for their weights alone.
    embedded = set(parts) if weighed else {"train"} if config.batch.order == "related" else set()
    data = {}
    with reporter.phase("embed") as notes:
        for name, (tokenized, examples) in parts.items():
            nothing = np.zeros((len(examples), 0), np.float32)
            chosen, rejected = _embeddings(config, examples, reporter) if name in embedded else (nothing, nothing)
            scores = _scores(examples) if objective.uses_scores else None
            data[name] = PreferenceData(tokenized, chosen, rejected, scores=scores)
        notes.append(config.embedding.encoder if embedded else "not needed")
    return Prepared(tokenizer, data["train"], data.get("held_out"), objective.responses, origins)
