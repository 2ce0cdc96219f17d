"""From files to packed-ready data: read, split, tokenise, embed. No model runs here but the sentence encoder.

Every process reads all rows; tokenising and embedding, which take long, they share.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Bool

from rpo_jax import models
from rpo_jax.config import Config, DataConfig, EmbeddingConfig, PolicyConfig, TrainConfig, resolve
from rpo_jax.core.files import writing
from rpo_jax.core.memory import explaining_memory
from rpo_jax.core.records import KINDS, REFINED, PreferenceData, TokenizedExample
from rpo_jax.core.shards import row_multiple
from rpo_jax.data.chat_template import ChatTemplate
from rpo_jax.data.embeddings import embed_texts
from rpo_jax.data.examples import ExampleSet, embedding_text, make_examples, prompt_text
from rpo_jax.data.layouts.ranked import Rule
from rpo_jax.data.limited_tokenizer import close_tokenizers
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.data.refine import refined
from rpo_jax.data.sources import read_rows
from rpo_jax.data.tokenize import TokenLimits, describe_cuts, describe_notes, encode_examples, join_encoded
from rpo_jax.data.tokenizer import DEFAULT_CHAT_TEMPLATE, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from rpo_jax.hosts import processes
from rpo_jax.hosts.channel import PeerFailure
from rpo_jax.hosts.sharing import shared
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.round_prompts import RoundPrompts, encoded_prompts, read_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANY_ALIKE = 0.05  # of different texts that have another one's embedding: a warning


OwnRows = Callable[[int], Bool[np.ndarray, "R"]]


@dataclass(frozen=True)
class Prepared:
    """What training reads: the tokenizer, the training data, and the held-out data where there is any.

    Attributes:
        responses: the kinds of response that the objective needs.
        origins: for train and held_out, what their token ids were made from, as rpo_jax.training.reference names it.
        counts: for train and held_out, what was cut, and what else rpo_jax.data.tokenize counts.
        rendered: whether a chat template made prompts of the training data.
        prompts: with train.rounds those to answer, by `train` and `held_out`. The training data are these prompts,
            without responses yet, and there is no other held-out data.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PreferenceData
    held_out: PreferenceData | None
    responses: tuple[str, ...]
    origins: Mapping[str, Mapping[str, str]]
    counts: Mapping[str, Mapping[str, int]]
    rendered: bool
    prompts: Mapping[str, RoundPrompts] = field(default_factory=dict)

    @property
    def eval_responses(self) -> tuple[str, ...]:
        """Held-out pairs are scored on both sides whatever the objective: accuracy needs them."""
        compared = {"rejected"} if self.held_out is not None and len(self.held_out.of_kind("rejected")) else set()
        return tuple(name for name in KINDS if name in {*self.responses, *compared})


def is_paired(data: PreferenceData) -> bool:
    everyone = np.arange(len(data.examples))
    return all(np.isin(everyone, data.example_index[data.of_kind(kind)]).all() for kind in ("chosen", "rejected"))


def eval_pairing(pairing: str, data: PreferenceData) -> Literal["paired", "unpaired", "grouped"]:
    """How held-out responses come together: as in training where that groups them, else as pairs where they are."""
    return "grouped" if pairing == "grouped" else "paired" if is_paired(data) else "unpaired"


def batches_of(
    config: Config,
    data: PreferenceData,
    responses: tuple[str, ...],
    row_shards: int,
    own_rows: OwnRows | None = None,
    least_slots: int | None = None,
) -> PreferenceBatches:
    """Training batches of a data set; `row_shards` devices split a batch's rows, `own_rows` are this process's.

    `least_slots` is as for PreferenceBatches.
    """
    return PreferenceBatches(
        data,
        pairing=config.data.pairing,
        responses=responses,
        order=config.batch.order,
        group=resolve(config).group,
        weights=tuple(config.data.mix.values()) or None,
        seed=config.run.seed,
        least_slots=least_slots,
        **_batch_shape(config, row_shards, own_rows),
    )


def sweep_of(
    config: Config, data: PreferenceData, responses: tuple[str, ...], row_shards: int, own_rows: OwnRows | None = None
) -> PreferenceBatches:
    """Batches of every response once, in order: for evaluation."""
    return PreferenceBatches(
        data,
        pairing=eval_pairing(config.data.pairing, data),
        responses=responses,
        order="sequential",
        once=True,
        seed=0,
        **_batch_shape(config, row_shards, own_rows),
    )


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run, or of one of its rounds."""
    return train.steps or max(1, round(train.epochs * steps_per_epoch))


def _batch_shape(config: Config, row_shards: int, own_rows: OwnRows | None) -> dict[str, Any]:
    # How many of the longest segments a row may hold: two, which pack better, unless a row's length has a price.
    # Micro-batches are counted in rows, to bound memory; and only attention by blocks skips what is far away.
    asked = models.Asked(row_tokens=config.batch.row_tokens)
    skips = models.attention_kind(config.model.attention, jax.default_backend(), asked).skips
    return {
        "pairs": config.batch.pairs,
        "row_tokens": config.batch.row_tokens,
        "tokens_multiple": row_multiple(config.mesh.context),
        "row_segments": 2 if skips and config.batch.micro_rows is None else 1,
        "rows_multiple": config.batch.micro_rows or row_shards,
        "own_rows": own_rows,
    }


def reference_pass(
    config: Config,
    data: PreferenceData,
    responses: tuple[str, ...],
    row_shards: int,
    own_rows: OwnRows | None = None,
    *,
    doubling: bool = False,
) -> ReferencePass:
    """Every response once, in rows as full as they get, a training batch's worth of them in memory at a time."""
    return ReferencePass(
        data,
        responses,
        batch_pairs=config.batch.pairs,
        row_tokens=config.batch.row_tokens,
        tokens_multiple=row_multiple(config.mesh.context),
        rows_multiple=config.batch.micro_rows or row_shards,
        own_rows=own_rows,
        doubling=doubling,
    )


@dataclass(frozen=True)
class _Part:
    """The training or the held-out data on its way.

    Attributes:
        path: where its rows come from.
        sources: of a mixture how many examples each source has; empty where there is one source.
    """

    path: str
    read: ExampleSet
    limits: TokenLimits
    sources: tuple[int, ...] = ()


def _read(config: Config, path: str, split: str, reporter: Reporter) -> ExampleSet:
    """`read_examples` on every process, with what is to be said of them."""
    data = config.data
    try:
        examples = read_examples(config, path, split)
    except (ValueError, OSError):
        # All have read before one of them stops the others: each refuses a bad row by itself, in the same words.
        with contextlib.suppress(PeerFailure):
            processes.agree()
        raise
    counts = processes.gather(examples.num_rows)
    if None not in counts and len(set(counts)) > 1:
        other = next(process for process, rows in enumerate(counts) if rows != counts[0])
        raise ValueError(
            f"process {other} finds {counts[other]} rows in the data where process 0 finds {counts[0]}; give every "
            "host the same files."
        )
    if examples.left_out:
        summary = f"{path}: {examples.left_out.total} rows left out by data.ranked_rule={data.ranked_rule}"
        reporter.say(f"{summary}\n{examples.left_out.report()}")
    if examples.faults:
        reporter.say(f"{path}: {examples.faults.total} unusable rows skipped\n{examples.faults.report()}")
    return examples


def read_examples(config: Config, path: str, split: str) -> ExampleSet:
    """The examples of a source, with scores of their responses where the objective needs them."""
    data, scores = config.data, None
    if resolve(config).objective.uses_scores:
        scores = {"chosen": data.chosen_score, "rejected": data.rejected_score}
    rows, rule = read_rows(path, split=split), Rule(data.ranked_rule, data.ranked_threshold)
    return make_examples(
        rows, data.layout, data.on_bad_row, scores, data.columns, data.ignore_columns, rule, row_value_columns(data)
    )


def row_value_columns(data: DataConfig) -> dict[str, str]:
    """Names of the numbers that every row is to have, and their columns."""
    named = {"weight": data.weight, "label_smoothing": data.label_smoothing, "margin": data.margin}
    return {name: column for name, column in named.items() if column is not None}


def token_limits(data: DataConfig, examples: ExampleSet) -> TokenLimits:
    """How the examples of a source are rendered and cut."""
    side = examples.truncation_side if data.truncation_side == "auto" else data.truncation_side
    return TokenLimits(data.max_prompt_tokens, data.max_tokens, side, data.template, data.template_arguments)


def _split(config: Config, reporter: Reporter) -> dict[str, _Part]:
    """Training data, and held-out data where there is any, by name."""
    data = config.data
    if data.name is None:
        raise ValueError("data.path is not set; give a file, a folder or a hub data set.")
    read, held_out = [_read(config, path, data.split, reporter) for path in data.sources], None
    if data.mix:
        read = [replace(source, examples=source.examples[: data.train_rows]) for source in read]
    train = _joined(data, read)
    if data.eval_path is not None:
        held_out = _read(config, data.eval_path, data.eval_split, reporter)
    elif data.eval_rows:
        examples = train.examples
        if data.eval_rows >= len(examples):
            raise ValueError(
                f"data.eval_rows={data.eval_rows} leaves nothing to train on: {data.path} has {len(examples)} "
                "usable examples."
            )
        held_out = replace(train, examples=examples[-data.eval_rows :])
        train = replace(train, examples=examples[: -data.eval_rows])
    if not data.mix:
        train = replace(train, examples=train.examples[: data.train_rows])
    sources = tuple(len(source.examples) for source in read) if data.mix else ()
    parts = {"train": _Part(data.name, train, token_limits(data, train), sources)}
    if held_out is None:
        return parts
    return {**parts, "held_out": _Part(data.eval_path or data.name, held_out, token_limits(data, held_out))}


def _joined(data: DataConfig, read: Sequence[ExampleSet]) -> ExampleSet:
    """The examples of all sources, one source after another.

    Raises ValueError for layouts that are cut at different ends.
    """
    first = read[0]
    for path, other in zip(data.sources, read, strict=True):
        if data.truncation_side == "auto" and other.truncation_side != first.truncation_side:
            raise ValueError(
                f"data.mix: of long prompts in {data.sources[0]} (layout {first.layout}) the one end is kept, of those "
                f"in {path} (layout {other.layout}) the other; set data.truncation_side."
            )
    layouts = dict.fromkeys(source.layout for source in read)
    examples = tuple(example for source in read for example in source.examples)
    return replace(first, examples=examples, layout=", ".join(layouts))


def _tokenizer(model: PolicyConfig, part: _Part, trained: Path | None, reporter: Reporter) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; for a new model one that is learnt from the training texts.

    Where it has no chat template but conversations are rendered, it takes the default one along into the run folder
    and the exported model: whoever serves it renders prompts as they were in training.
    """
    examples, source = part.read.examples, trained or model.path or model.tokenizer
    if source != "train":
        return _existing_tokenizer(source, _is_rendered(part), part.limits.template_arguments, reporter)
    texts = [text for e in examples for text in (prompt_text(e), *(response.text for response in e.responses))]
    with tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
        return train_tokenizer(texts, model.vocab_size, Path(folder) / "tokenizer")


def _existing_tokenizer(
    source: str | Path, rendered: bool, template_arguments: Mapping[str, Any], reporter: Reporter
) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source)
    if rendered:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
            tags = "<|system|>, <|user|> and <|assistant|> tags"
            reporter.say(f"{source}: no chat template; {tags} are used, and come with the exported model")
        elif ChatTemplate(tokenizer, template_arguments).writes_the_date:
            reporter.say(
                f"{source}: the chat template writes today's date, so that another day gives other tokens; "
                'data.template_arguments, such as {date_string: "26 Jul 2024"}, fixes it'
            )
    return tokenizer


def _is_rendered(part: _Part) -> bool:
    """Whether the chat template makes prompts of these examples."""
    return part.limits.template == "chat" or any(not isinstance(e.prompt, str) for e in part.read.examples)


def _origins(name: str, part: _Part, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the token ids of a part of the data are made from: the cache of reference log-probs says what changed."""
    data = hashlib.sha256()
    for e in part.read.examples:
        text = repr((e.prompt, e.template_arguments, *((one.text, one.turns) for one in e.responses)))
        data.update(hashlib.sha256(text.encode()).digest())
    local, limits = Path(part.path).expanduser(), part.limits
    lengths = f"max_prompt_tokens={limits.max_prompt_tokens} max_tokens={limits.max_tokens}"
    return {
        "slot": f"{name} data, {local.resolve() if local.exists() else part.path}",
        "data": data.hexdigest(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": limits.template + (f" {limits.template_arguments}" if limits.template_arguments else ""),
        "truncation": f"{lengths} {limits.truncation_side}",
    }


def labels_of(data: PreferenceData) -> str:
    """Hash of what a step reads of every response besides its text: its kind, its score and its row's numbers."""
    facts = {"kind": data.flat.kind, "score": data.scores, **data.row_values}
    digest = hashlib.sha256()
    for name, values in sorted(facts.items()):
        if values is not None:
            digest.update(f"{name} {values.dtype.str} {len(values)} ".encode() + values.tobytes())
    return digest.hexdigest()


def _tokenized(
    config: Config, part: _Part, tokenizer: PreTrainedTokenizerBase, responses: tuple[str, ...], reporter: Reporter
) -> tuple[Sequence[TokenizedExample], Mapping[str, int]]:
    examples = part.read.examples
    encoded = shared(examples, partial(encode_examples, tokenizer=tokenizer, limits=part.limits))
    joined = join_encoded(examples, encoded, part.limits, mismatched="mismatched" in responses)
    tokenized: Sequence[TokenizedExample] = joined.examples
    faults = joined.faults
    if REFINED[0] in responses:
        settings: Any = config.objective  # options come from the table
        tokenized = refined(tokenized, settings.sr_prompt, tokenizer, config.data.max_tokens)
    if faults and (config.data.on_bad_row == "error" or not tokenized):
        on_bad_row = config.data.on_bad_row if tokenized else "skip"
        raise faults.error(f"{len(examples)} examples cannot be tokenised", on_bad_row, "none is left")
    if faults:
        reporter.say(f"{faults.total} examples that cannot be tokenised skipped\n{faults.report()}")
    for line in describe_notes(joined.counts):
        reporter.say(f"{part.path}: {line}")
    return tokenized, joined.counts


def look_alike(texts: Sequence[str], vectors: Sequence[np.ndarray]) -> int:
    """How many different texts have another one's embedding; what batches of other lengths round apart is alike."""
    distinct = dict(zip(texts, vectors, strict=True)).values()
    counts = Counter(np.round(one / max(float(np.linalg.norm(one)), 1e-9), 3).tobytes() for one in distinct)
    return sum(count for count in counts.values() if count > 1)


def _with_facts(
    config: Config, part: _Part, tokenized: Sequence[TokenizedExample], embedded: bool, reporter: Reporter
) -> PreferenceData:
    """The data with the embedding and the score of each response, as far as the objective needs them."""
    data, scored = PreferenceData(tokenized), resolve(config).objective.uses_scores
    wanted = row_value_columns(config.data)
    if part.sources:
        numbers = np.repeat(np.arange(len(part.sources)), part.sources).tolist()
        numbered = iter(zip(part.read.examples, numbers, strict=True))
        source = [next(number for example, number in numbered if example.row_id == one.row_id) for one in tokenized]
        data = replace(data, source=np.array(source, np.int64))
    if not embedded and not scored and not wanted:
        return data
    texts, rows, scores, values, kind = [], [], [], [], config.embedding.text
    examples = iter(part.read.examples)
    for tokens in tokenized:
        example = next(one for one in examples if one.row_id == tokens.row_id)
        own = example.responses if kind == "prompt_response" else example.responses[:1]
        first = len(texts)
        texts += [embedding_text(example, kind, response.text) for response in own]
        # What the data does not hold follows, and is not contrasted.
        made = len(tokens.responses) - len(example.responses)
        rows += [*(first + (i if len(own) > 1 else 0) for i in range(len(example.responses))), *[-1] * made]
        scores += [*(response.score for response in example.responses), *[None] * made]
        values += [dict(example.values)] * len(tokens.responses)
    if scored:
        data = replace(data, scores=np.array(scores, np.float32))
    if wanted:
        columns = {name: np.array([of[name] for of in values], np.float32) for name in wanted}
        data = replace(data, row_values=columns)
    if embedded:
        vectors = list(shared(texts, partial(_embed, config.embedding, config.run.cache_dir, reporter)))
        if (alike := look_alike(texts, vectors)) > MANY_ALIKE * len(set(texts)):
            reporter.say(
                f"warning: {part.path}: {alike} of {len(set(texts))} different texts are one and the same to the "
                "encoder, which reads the beginning of a long text alone, and weighs them alike; "
                "embedding.text=last_turn has it read the last question"
            )
        data = replace(data, embeddings=np.stack(vectors), embedding_row=np.array(rows, np.int64))
    return data


def _embed(embedding: EmbeddingConfig, cache_dir: str, reporter: Reporter, texts: Sequence[str]) -> list[np.ndarray]:
    with reporter.progress("embed", len(texts)) as update:
        vectors = embed_texts(
            texts,
            embedding.encoder,
            cache_dir,
            batch_texts=embedding.batch_texts,
            on_progress=lambda done, total: update(len(texts) - total + done, {}),
        )
        update(len(texts), {})  # where all of them came from the cache nothing else has told
    return list(vectors)


@explaining_memory(lambda: "try a smaller embedding.batch_texts, or data.train_rows")
def prepare(config: Config, reporter: Reporter, trained_tokenizer: Path | None = None) -> Prepared:
    """Read, split, tokenise and embed the data of a configuration.

    Args:
        trained_tokenizer: tokenizer folder of the run that is being resumed.

    Raises:
        ValueError: for anything in the data or the configuration that cannot be used, with file and row.
    """
    models.check_choices(config.model, config.lora)
    if config.train.rounds:
        return _prepare_prompts(config, reporter, trained_tokenizer)
    method = resolve(config)
    responses = method.objective.responses
    with reporter.phase("read") as notes:
        parts = _split(config, reporter)
        sizes = {name: len(part.read.examples) for name, part in parts.items()}
        notes.append(f"{sizes['train']:,} training and {sizes.get('held_out', 0):,} held-out ")
        notes.append(f"examples, layout {parts['train'].read.layout}")
    with reporter.phase("tokenise") as notes:
        tokenizer = _tokenizer(config.model, parts["train"], trained_tokenizer, reporter)
        tokenized, counts = {}, {}
        for name, part in parts.items():
            tokenized[name], counts[name] = _tokenized(config, part, tokenizer, responses, reporter)
        origins = {name: _origins(name, part, tokenizer) for name, part in parts.items()}
        close_tokenizers()  # its process has the vocabulary in memory
        notes.append(f"vocabulary {len(tokenizer):,}")
        for name, part in parts.items():
            if cuts := describe_cuts(counts[name], part.limits.max_tokens):
                notes.append(cuts if name == "train" else f"held out: {cuts}")
    # Held-out data is read in file order: its prompts are embedded for their weights alone.
    embedded = set(parts) if method.embeds_all else {"train"} if method.embeds_training else set()
    with reporter.phase("embed") as notes:
        data = {
            name: _with_facts(config, part, tokenized[name], name in embedded, reporter) for name, part in parts.items()
        }
        notes.append(config.embedding.encoder if embedded else "not needed")
    rendered = _is_rendered(parts["train"])
    return Prepared(tokenizer, data["train"], data.get("held_out"), responses, origins, counts, rendered)


def _prepare_prompts(config: Config, reporter: Reporter, trained_tokenizer: Path | None) -> Prepared:
    """The prompts that rounds are to answer, and the held-out ones; of rows of preferences the prompts alone."""
    with reporter.phase("read") as notes:
        parts = read_parts(config.data)
        notes.append(", ".join(f"{len(asked.rows):,} prompts ({name})" for name, (_, asked) in parts.items()))
    with reporter.phase("tokenise") as notes:
        rows = parts["train"][1].rows
        rendered = config.data.template == "chat" or any(not isinstance(row.prompt, str) for row in rows)
        assert config.model.path is not None, "checked with the configuration"
        source = trained_tokenizer or config.model.path
        tokenizer = _existing_tokenizer(source, rendered, config.data.template_arguments, reporter)
        prompts = {
            name: encoded_prompts(config.data, path, asked, tokenizer, reporter.say)
            for name, (path, asked) in parts.items()
        }
        origins = {
            name: {"data": hashlib.sha256(repr([row.prompt for row in encoded.rows]).encode()).hexdigest()}
            for name, encoded in prompts.items()
        }
        close_tokenizers()
        notes.append(f"vocabulary {len(tokenizer):,}")
    responses = resolve(config).objective.responses
    return Prepared(tokenizer, prompts["train"].data, None, responses, origins, {}, rendered, prompts)
