"""Sections on the data: what is read, how its prompts are compared, and what makes a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rpo_jax.config.checks import ConfigError, positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which preferences to train on, and how they become tokens.

    Args:
        path: a JSON, JSONL, CSV, TSV (.gz too) or Parquet file, a folder of them, an Arrow folder, or a hub data set,
            as `owner/name` or `owner/name:config`.
        mix: several sources in place of `path`, each with how often an epoch draws each of its examples, as in
            `{a.jsonl: 1, b.jsonl: 0.5}`: with 0.5 one half in one epoch, the other in the next.
        split: split of a hub data set or of an Arrow folder with several; of a folder of files, those whose names speak
            of another split are left out.
        eval_path: held-out data, read like `path`.
        eval_split: split of `eval_path`.
        eval_rows: without `eval_path`: hold out this many usable examples from the end of `path`.
        train_rows: use at most this many training examples, from the start (of each source).
        layout: name of a layout in rpo_jax.data.layouts; `auto` recognises it by its columns.
        columns: what the data calls columns of the layout, as in `{prompt: question}`; on the command line
            `--data.columns.prompt question`.
        ignore_columns: columns that are read as if they were not there, though they might belong to the prompt.
        ranked_rule: which responses of the layout `ranked` are chosen: those `above_mean`, the `best`, the
            `top_half`, or those from a `threshold` on; the others are rejected. Rows whose scores are all equal are
            left out, but for the threshold.
        ranked_threshold: the least score of a chosen response, for `ranked_rule: threshold`.
        pairing: `paired` keeps a pair's responses in one contrast row and column, of several responses the first of
            each kind; `unpaired` draws chosen and rejected responses apart; `grouped` draws prompts, each with all of
            its responses, however many.
        max_prompt_tokens: a prompt is cut to this where prompt and response exceed `max_tokens`.
        max_tokens: prompt and response together.
        truncation_side: which end of a long prompt survives; `auto` keeps the end of dialogues and the start of
            texts to summarise.
        template: `auto` renders conversations with the tokenizer's chat template and uses string prompts as they
            are; `chat` wraps string prompts into a user turn too.
        template_arguments: what the chat template is given besides the messages, for example enable_thinking: false.
        chosen_score: column with a number for each chosen response, how good it is, or columns and their weights in a
            sum, as in `{helpful: 0.7, brief: 0.3}`; read where the objective needs it.
        rejected_score: the same of rejected responses.
        weight: column with a number for each row, how much its responses count in the contrast matrix, on average 1;
            all alike where not given.
        label_smoothing: column with a number for each row, the probability that its label is flipped, for the link
            `smoothed`, in place of objective.label_smoothing.
        margin: column with a number for each row, by how much the scores of its responses are to differ at least, for
            objective.name=reward.
        on_bad_row: `error` refuses data with an unusable row; `skip` drops, counts and reports such rows.
    """

    path: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    eval_rows: int = 0
    train_rows: int | None = None
    layout: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    ignore_columns: tuple[str, ...] = ()
    ranked_rule: Literal["above_mean", "best", "top_half", "threshold"] = "above_mean"
    ranked_threshold: float | None = None
    pairing: Literal["paired", "unpaired", "grouped"] = "paired"
    max_prompt_tokens: int = 256
    max_tokens: int = 512
    truncation_side: Literal["auto", "keep_start", "keep_end"] = "auto"
    template: Literal["auto", "chat"] = "auto"
    template_arguments: dict[str, Any] = field(default_factory=dict)
    chosen_score: dict[str, float] | str = "score_chosen"
    rejected_score: dict[str, float] | str = "score_rejected"
    weight: str | None = None
    label_smoothing: str | None = None
    margin: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        positive("data", max_prompt_tokens=self.max_prompt_tokens, train_rows=self.train_rows)
        if self.max_tokens <= self.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response in "
                f"data.max_tokens={self.max_tokens}; raise max_tokens or lower max_prompt_tokens."
            )
        if (self.ranked_rule == "threshold") != (self.ranked_threshold is not None):
            raise ConfigError(
                f"data.ranked_threshold={self.ranked_threshold} and data.ranked_rule={self.ranked_rule} do not go "
                "together: the rule threshold needs a number, and the others have none."
            )
        if self.eval_rows < 0:
            raise ConfigError(f"data.eval_rows={self.eval_rows} must not be negative.")
        if self.eval_rows and self.eval_path:
            raise ConfigError("data.eval_rows and data.eval_path both name the held-out data; give one of them.")
        if self.mix and self.path:
            raise ConfigError(f"data.mix names the sources, so data.path={self.path} would not be read; leave it out.")
        if self.mix and self.eval_rows:
            raise ConfigError("data.eval_rows holds out the end of data.path, not of data.mix; give data.eval_path.")
        for key, columns in (("chosen_score", self.chosen_score), ("rejected_score", self.rejected_score)):
            if not columns or (isinstance(columns, dict) and not all(map(math.isfinite, columns.values()))):
                raise ConfigError(f"data.{key}={columns} must name a column, or columns with a finite weight each.")
        for source, weight in self.mix.items():
            if not weight > 0:
                raise ConfigError(f"data.mix: the weight {weight} of {source} must be greater than 0.")

    @property
    def sources(self) -> tuple[str, ...]:
        """Where training data is read from."""
        return tuple(self.mix) or (() if self.path is None else (self.path,))

    @property
    def name(self) -> str | None:
        """The training data in a word or several; None where there is none."""
        return " + ".join(self.sources) or None


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The sentence encoder that says how related two prompts are.

    Args:
        encoder: sentence-transformers folder or hub name; of a plain transformers folder the mean of the last hidden
            states; `hashed-words` counts words, and needs no files.
        text: what is embedded: the prompt, prompt and response together, or the last user turn.
        batch_texts: texts encoded at once.
    """

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    text: Literal["prompt", "prompt_response", "last_turn"] = "prompt"
    batch_texts: int = 64

    def __post_init__(self) -> None:
        positive("embedding", batch_texts=self.batch_texts)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch: the same whatever the number of devices and hosts.

    Args:
        pairs: pairs of a step; with unpaired data, chosen and rejected responses of a step each; with grouped data,
            prompts.
        micro_rows: packed rows whose activations are in memory at a time; all where not given. The contrast
            matrix spans the whole batch either way, and the gradient is the same; it costs one more forward pass.
        micro_keep: keep of every micro-batch what model.remat keeps, until its backward pass: no more forward passes
            than without micro-batches, but memory that grows with the batch; meant for model.remat=full.
        row_tokens: length of a packed row; where not given, multiples of 64, as packs best.
        order: `shuffled`; `related`, batches of neighbours in embedding space, so that even a small contrast group
            holds related prompts, composed anew each epoch; or `sequential` in file order, where the rarer kind of
            unpaired responses starts again when it is used up.
    """

    pairs: int = 64
    micro_rows: int | None = None
    micro_keep: bool = False
    row_tokens: int | None = None
    order: Literal["shuffled", "related", "sequential"] = "shuffled"

    def __post_init__(self) -> None:
        positive("batch", pairs=self.pairs, micro_rows=self.micro_rows, row_tokens=self.row_tokens)
