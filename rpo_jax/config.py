"""Configuration: frozen dataclasses, the one home of every default. rpo_jax.config_io reads them from files.

Every range is checked when a section is built, so a bad value stops a run before any file is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A value that a section refuses; its message is complete."""


def _positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name}={value} must be greater than 0.")


def _in_range(section: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{section}.{name}={value} must lie between {low} and {high}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives.

    Args:
        dir: run folder; holds config, metrics, checkpoints and the tokenizer.
        seed: seed of data order and, for a model from scratch, of its initial weights.
        resume: `auto` continues from the newest checkpoint in `dir`, or starts where there is none.
        overwrite: empty an existing run folder first.
        cache_dir: prepared embeddings, reference log-probs and compiled programs; shared between runs.
    """

    dir: str = "runs/run"
    seed: int = 0
    resume: Literal["never", "auto"] = "never"
    overwrite: bool = False
    cache_dir: str = "~/.cache/rpo_jax"

    def __post_init__(self) -> None:
        if self.resume == "auto" and self.overwrite:
            raise ConfigError("run.resume=auto and run.overwrite=true contradict each other; give one of them.")
        if self.seed < 0:
            raise ConfigError(f"run.seed={self.seed} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which preferences to train on, and how they become tokens.

    Args:
        path: a JSON, JSONL (.gz too) or Parquet file, a folder of them, an Arrow folder, or a hub data set.
        split: split of a hub data set or of an Arrow folder with several.
        eval_path: held-out data, read like `path`.
        eval_split: split of `eval_path`.
        eval_rows: without `eval_path`: hold out this many usable examples from the end of `path`.
        train_rows: use at most this many training examples, from the start.
        layout: name of a layout in rpo_jax.data.examples; `auto` recognises it by its columns.
        pairing: `paired` keeps a pair's responses in one contrast row and column; `unpaired` draws chosen and
            rejected responses apart.
        max_prompt_tokens: a prompt is cut to this where prompt and response exceed `max_tokens`.
        max_tokens: prompt and response together.
        truncation_side: which end of a long prompt survives; `auto` keeps the end of dialogues and the start of
            texts to summarise.
        template: `auto` renders conversations with the tokenizer's chat template and uses string prompts as they
            are; `chat` wraps string prompts into a user turn too.
        on_bad_row: `error` refuses data with an unusable row; `skip` drops, counts and reports such rows.
    """

    path: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    eval_rows: int = 0
    train_rows: int | None = None
    layout: str = "auto"
    pairing: Literal["paired", "unpaired"] = "paired"
    max_prompt_tokens: int = 256
    max_tokens: int = 512
    truncation_side: Literal["auto", "keep_start", "keep_end"] = "auto"
    template: Literal["auto", "chat"] = "auto"
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        _positive("data", max_prompt_tokens=self.max_prompt_tokens, train_rows=self.train_rows)
        if self.max_tokens <= self.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response in "
                f"data.max_tokens={self.max_tokens}; raise max_tokens or lower max_prompt_tokens."
            )
        if self.eval_rows < 0:
            raise ConfigError(f"data.eval_rows={self.eval_rows} must not be negative.")
        if self.eval_rows and self.eval_path:
            raise ConfigError("data.eval_rows and data.eval_path both name the held-out data; give one of them.")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy: a Hugging Face folder, or sizes of a new model.

    Args:
        path: Hugging Face folder or hub name to start from; the sizes below are then not used.
        tokenizer: tokenizer folder of a new model; `train` learns a byte-level BPE of `vocab_size` from the data.
        family: architecture of a new model: llama, mistral, qwen2 or qwen3.
        compute_dtype: dtype of matrix products and activations; weights, log-softmax and loss stay float32.
        remat: what the backward pass recomputes: `none` keeps every activation, `dots` keeps matrix products,
            `full` keeps each layer's input only.
    """

    path: str | None = None
    tokenizer: str = "train"
    family: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        _positive("model", **{name: getattr(self, name) for name in (*sizes, "rope_theta")})
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.num_heads={self.num_heads}, "
                f"and that one of model.num_kv_heads={self.num_kv_heads}."
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised.

    Args:
        name: rpo, dpo, ipo, cdpo, slic, kto or sft (the table is rpo_jax.objectives.losses.OBJECTIVES).
        beta: inverse temperature of the implicit reward, 1/nats.
        link: overrides the objective's link on the contrast matrix: logistic, smoothed, squared or hinge.
        label_smoothing: probability that a label is flipped (the smoothed link's epsilon).
        average_log_prob: divide each response's log-prob by its number of scored tokens.
        slic_margin: SLiC's delta, nats.
        slic_nll_weight: SLiC's lambda, the weight of the chosen responses' negative log-likelihood.
        kto_desirable_weight: KTO's weight of chosen responses.
        kto_undesirable_weight: KTO's weight of rejected responses.
    """

    name: str = "rpo"
    beta: float = 0.1
    link: Literal["logistic", "smoothed", "squared", "hinge"] | None = None
    label_smoothing: float = 0.1
    average_log_prob: bool = False
    slic_margin: float = 1.0
    slic_nll_weight: float = 1.0
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _positive("objective", beta=self.beta)
        _in_range("objective", "label_smoothing", self.label_smoothing, 0.0, 0.5)


DEFAULT_PERPLEXITY = 6.0  # what the paper's 8 x 8 matrices have on Anthropic-HH at temperature 0.5


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The contrast matrix.

    Args:
        weights: embedding, uniform, diagonal or pair; the objective's own where not given (rpo: embedding; dpo,
            ipo, cdpo, slic: pair).
        alpha: weight of the diagonal for `weights: diagonal`.
        diagonal_on: `score` multiplies the scores (Eq. 13); `loss` the losses, as the authors' release does.
        temperature: fixed tau of the embedding weights.
        perplexity: instead of a temperature: solve each row's tau for this many effective contrasts. With neither
            given, 6.
        group: `global` contrasts the whole global batch; an integer fills independent square groups of that many
            pairs in batch order.
    """

    weights: Literal["embedding", "uniform", "diagonal", "pair"] | None = None
    alpha: float = 0.8
    diagonal_on: Literal["score", "loss"] = "score"
    temperature: float | None = None
    perplexity: float | None = None
    group: int | Literal["global"] = "global"

    def __post_init__(self) -> None:
        _in_range("contrast", "alpha", self.alpha, 0.0, 1.0)
        _positive("contrast", temperature=self.temperature)
        if self.temperature is not None and self.perplexity is not None:
            raise ConfigError("contrast.temperature fixes tau, contrast.perplexity solves for it; set one to null.")
        if self.perplexity is not None and not self.perplexity >= 1:
            raise ConfigError(f"contrast.perplexity={self.perplexity} must be at least 1, one contrast a row.")
        if self.group != "global" and self.group < 1:
            raise ConfigError(f"contrast.group={self.group} must be a positive number of pairs or 'global'.")

    @property
    def target_perplexity(self) -> float | None:
        """The perplexity to calibrate to; None with a fixed temperature."""
        if self.temperature is not None:
            return None
        return DEFAULT_PERPLEXITY if self.perplexity is None else self.perplexity


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The sentence encoder that says how related two prompts are.

    Args:
        encoder: sentence-transformers folder or hub name.
        text: what is embedded: the prompt, prompt and response together, or the last user turn.
        batch_texts: texts encoded at once.
    """

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    text: Literal["prompt", "prompt_response", "last_turn"] = "prompt"
    batch_texts: int = 64

    def __post_init__(self) -> None:
        _positive("embedding", batch_texts=self.batch_texts)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the reference's log-probs come from.

    Args:
        mode: `cached` computes them once before training and stores them; `live` keeps a second model in memory;
            `none` uses zeros (the reference-free form).
        path: Hugging Face folder of the reference; the policy's starting weights where not given.
    """

    mode: Literal["cached", "live", "none"] = "cached"
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch: the same whatever the number of devices and hosts.

    Args:
        pairs: pairs of a step; with unpaired data, chosen and rejected responses of a step each.
        micro_rows: packed rows whose activations are in memory at a time; all where not given. The contrast
            matrix spans the whole batch either way, and the gradient is the same.
        row_tokens: length of a packed row; where not given, the data's longest segment rounded up to 64.
        order: `shuffled`, or `sequential` in file order.
    """

    pairs: int = 64
    micro_rows: int | None = None
    row_tokens: int | None = None
    order: Literal["shuffled", "sequential"] = "shuffled"

    def __post_init__(self) -> None:
        _positive("batch", pairs=self.pairs, micro_rows=self.micro_rows, row_tokens=self.row_tokens)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 takes all that the others leave.

    Args:
        data: copies of the model.
        fsdp: shards of parameters, gradients and optimizer state; rows are split over data and fsdp.
        tensor: shards of heads, MLP and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: sizes must be positive, "
                "and at most one of them -1."
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; the defaults are the paper's (Table 5).

    Args:
        name: rmsprop (as torch.optim.RMSprop), adamw or lion.
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up.
        schedule: after the warm-up: constant, or linear or cosine decay to zero at the last step.
        max_grad_norm: gradients are scaled down to this global norm.
        weight_decay: decoupled weight decay of adamw and lion.
        b1: first-moment decay of adamw and lion.
        b2: second-moment decay of adamw and lion.
        decay: squared-gradient decay of rmsprop.
        eps: added outside the square root.
    """

    name: Literal["rmsprop", "adamw", "lion"] = "rmsprop"
    learning_rate: float = 5e-7
    warmup_steps: int = 150
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = 10.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _positive("optim", learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, eps=self.eps)
        for name in ("b1", "b2", "decay"):
            _in_range("optim", name, getattr(self, name), 0.0, 1.0)
        if self.warmup_steps < 0 or not self.weight_decay >= 0:
            raise ConfigError("optim.warmup_steps and optim.weight_decay must not be negative.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and how often to look.

    Args:
        steps: optimizer steps; where not given, `epochs` passes over the data.
        epochs: passes over the training data.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations; 0 evaluates before the first and after the last step only.
        save_every: steps between checkpoints; 0 saves the last step only.
        keep_last: newest checkpoints to keep.
        keep_best: checkpoints of highest held-out preference accuracy (lowest loss where there are no rewards) to keep
            besides; where it is not 0, every save is preceded by an evaluation.
    """

    steps: int | None = None
    epochs: float = 1.0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        _positive("train", steps=self.steps, epochs=self.epochs, log_every=self.log_every, keep_last=self.keep_last)
        if min(self.eval_every, self.save_every, self.keep_best) < 0:
            raise ConfigError("train.eval_every, train.save_every and train.keep_best must not be negative.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Dashboards besides metrics.jsonl.

    Args:
        tensorboard: write event files into the run folder.
        wandb: log to Weights & Biases (needs `pip install rpo-jax[wandb]`; the key comes from the environment).
        wandb_project: project there.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "rpo_jax"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run needs; one section per part of the system."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: PolicyConfig = field(default_factory=PolicyConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        group, pairs = self.contrast.group, self.batch.pairs
        if group != "global" and pairs % group:
            divisors = ", ".join(str(d) for d in range(1, pairs + 1) if pairs % d == 0)
            raise ConfigError(
                f"contrast.group={group} does not divide the {pairs} pairs of a batch; "
                f"use one of {divisors} or 'global'."
            )
        if self.data.pairing == "unpaired" and self.contrast.weights in ("diagonal", "pair"):
            raise ConfigError(
                f"contrast.weights={self.contrast.weights} needs pairs that share a prompt, but data.pairing is "
                "unpaired; use contrast.weights=embedding or uniform, or data.pairing=paired."
            )
