"""The one place where two keys meet: what a configuration trains, decided once, and every check that needs two keys.

Below it functions take values; nothing else asks what `global`, an absent weighting or a reference's mode means.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from textwrap import shorten
from typing import TYPE_CHECKING, Literal

from rpo_jax.config.checks import ConfigError
from rpo_jax.core.shards import STRIPE, row_multiple
from rpo_jax.objectives import heads
from rpo_jax.objectives.contrast import WEIGHTS
from rpo_jax.objectives.losses import OBJECTIVES, Objective
from rpo_jax.objectives.objective import MatrixObjective
from rpo_jax.objectives.pairwise import LinkObjective

if TYPE_CHECKING:
    from rpo_jax.config import Config

DEFAULT_PERPLEXITY = 6.0  # what the paper's 8 x 8 matrices have on Anthropic-HH at temperature 0.5


@dataclass(frozen=True)
class Method:
    """What a configuration trains.

    Attributes:
        objective: what is minimised, with the values of all its options.
        weights: name of the contrast weighting, in contrast.WEIGHTS; None without a contrast matrix.
        group: pairs of a contrast group; a batch of no more is one matrix.
        temperature: fixed tau of the embedding weights; None where each row's is solved for `perplexity`.
        perplexity: effective contrasts a row; None with a fixed temperature.
        weights_on: whether weights multiply scores (Eq. 13) or losses (the authors' release).
        paired: whether slot i of chosen and rejected is one pair in training batches.
        prompts: where all responses of a prompt come together, prompts of a batch, which `group` then counts; else
            None.
        reference: where the reference's log-probs come from; None where there is no reference.
        embeds_all: whether all prompts are embedded, to weight contrasts.
        embeds_training: whether those of the training data are, to weight contrasts or to order batches.
        heads: names of what is trained beside the model, in objectives.heads.
    """

    objective: Objective
    weights: str | None
    group: int
    temperature: float | None
    perplexity: float | None
    weights_on: Literal["score", "loss"]
    paired: bool
    prompts: int | None
    reference: Literal["cached", "live", "adapter"] | None
    embeds_all: bool
    embeds_training: bool
    heads: tuple[str, ...]

    @property
    def needs_pairs(self) -> bool:
        """Whether a contrast group needs as many rejected responses as chosen ones, pair by pair."""
        return self.objective.needs_pairs or (self.weights is not None and WEIGHTS[self.weights].needs_pairs)

    @property
    def matrix_group(self) -> int:
        """Pairs of the matrices that are computed: for pair-only contrast one, as nothing else of a group counts."""
        return 1 if self.weights == "pair" or self.objective.uses_lists else self.group

    def groups_of(self, slots: int, size: int) -> int:
        """Contrast groups of `size` pairs, or prompts, that so many slots of a kind make."""
        return slots // size if self.prompts is None else self.prompts // size


def resolve(config: Config) -> Method:
    """What a configuration trains.

    Raises ConfigError where two of its keys do not fit together.
    """
    objective, contrast = config.objective.build(), config.contrast
    _check_matrix(config, objective)
    _check_columns(config, objective)
    _check_batch(config)
    _check_reference(config, objective)
    _check_rounds(config, objective)
    weights = contrast.weights or objective.weights
    _check_pairing(config, objective, weights)
    fixed = contrast.temperature is not None
    weighed = weights is not None and WEIGHTS[weights].needs_embeddings
    mode = config.reference.mode
    return Method(
        objective=objective,
        weights=weights,
        group=config.batch.pairs if contrast.group == "global" else contrast.group,
        temperature=contrast.temperature,
        perplexity=None if fixed else DEFAULT_PERPLEXITY if contrast.perplexity is None else contrast.perplexity,
        weights_on=_weights_on(config, objective, weights),
        paired=config.data.pairing == "paired",
        prompts=config.batch.pairs if config.data.pairing == "grouped" else None,
        reference=mode if objective.uses_reference and mode != "none" else None,
        embeds_all=weighed,
        embeds_training=weighed or config.batch.order == "related",
        heads=heads.wanted(objective, config.objective.partition == "learned"),
    )


def options_taken(config: Config) -> str:
    """The objective's options that the configuration leaves to it, with their values; those that are off left out."""
    section, default = config.objective, type(config.objective)()
    options = section.build().options_in_use()
    taken = {key: value for key, value in options.items() if value and getattr(section, key) == getattr(default, key)}
    return ", ".join(f"{key} {shorten(str(value), 40)}" for key, value in taken.items())


def with_defaults_taken(config: Config) -> Config:
    """The configuration with the objective's own defaults in it, as records of a run have it."""
    objective = config.objective.build()
    smoothing = getattr(objective, "label_smoothing", LinkObjective.label_smoothing)
    return replace(config, objective=replace(config.objective, beta=objective.beta, label_smoothing=smoothing))


def _weights_on(config: Config, objective: Objective, weights: str | None) -> Literal["score", "loss"]:
    keys = ("weights_on", "diagonal_on") if weights == "diagonal" else ("weights_on",)
    key = next((key for key in keys if getattr(config.contrast, key) == "loss"), None)
    if key is None:
        return "score"
    if not _averages_entries(objective):
        raise ConfigError(
            f"contrast.{key}=loss weights the losses of entries of the contrast matrix, which "
            f"objective.name={config.objective.name} does not have; leave it out, or use an objective on the matrix."
        )
    return "loss"


def _averages_entries(objective: Objective) -> bool:
    return isinstance(objective, MatrixObjective) and objective.averages_entries


def _check_matrix(config: Config, objective: Objective) -> None:
    name, weights = config.objective.name, config.contrast.weights
    if weights is not None and objective.weights is None:
        usable = ", ".join(other for other, named in OBJECTIVES.items() if named.weights is not None)
        raise ConfigError(
            f"objective {name!r} takes no weights, but got weights={weights!r}; leave it out, or use one of the "
            f"objectives {usable}."
        )
    if config.objective.partition != "learned":
        return
    if not objective.compares_prompts:
        usable = ", ".join(other for other, named in OBJECTIVES.items() if named.compares_prompts)
        raise ConfigError(
            f"objective.partition=learned compares the rewards of different prompts, which objective {name!r} does "
            f"not; set objective.partition=none, or use one of the objectives {usable}."
        )
    if (weights or objective.weights) == "pair":
        raise ConfigError(
            f"objective.partition=learned does nothing with contrast.weights=pair ({name!r} has it unless told "
            "otherwise): log Z is the same for both responses of a pair; set objective.partition=none, or "
            "contrast.weights to embedding, uniform or diagonal."
        )


def check_unread(config: Config) -> None:
    """ConfigError for a setting that nothing would read.

    Not part of `resolve`: an earlier release may have made a run with one, and that run is still to be read.
    """
    data, model, optim, reference = config.data, config.model, config.optim, config.reference
    config.objective.check_smoothing()
    if model.path is not None and model.tokenizer != type(model)().tokenizer:
        raise ConfigError(
            f"model.tokenizer={model.tokenizer} is for a new model, and model.path={model.path} has a tokenizer of its "
            "own; leave it out, or put the other one's files into that folder."
        )
    if data.eval_path is None and data.eval_split != (default := type(data)().eval_split):
        raise ConfigError(
            f"data.eval_split={data.eval_split} is a split of data.eval_path, which is not given; name the data there, "
            f"as in data.path, or leave it out, which is data.eval_split={default}."
        )
    if optim.name == "rmsprop" and optim.weight_decay:
        raise ConfigError(
            f"optim.weight_decay={optim.weight_decay} is not used by optim.name=rmsprop, the default; leave it out, "
            "or set optim.name to adamw, lion, adafactor or muon."
        )
    used = config.objective.build().uses_reference
    if reference.path is not None and (not used or reference.mode == "none"):
        why = "reference.mode=none asks for none" if used else f"objective.name={config.objective.name} uses none"
        raise ConfigError(f"reference.path={reference.path} would not be read: {why}; leave it out.")


def _check_columns(config: Config, objective: Objective) -> None:
    name, data = config.objective.name, config.data
    if data.weight is not None and not _averages_entries(objective):
        raise ConfigError(
            f"data.weight={data.weight} weights entries of the contrast matrix, whose mean objective.name={name} does "
            "not take; leave it out, or use an objective on the matrix."
        )
    if data.label_smoothing is not None and getattr(objective, "link", None) != "smoothed":
        raise ConfigError(
            f"data.label_smoothing={data.label_smoothing} is read by the link smoothed alone; set "
            "objective.link=smoothed, or leave it out."
        )
    if data.margin is not None and not (isinstance(objective, MatrixObjective) and objective.takes_margins):
        raise ConfigError(f"data.margin={data.margin} is read by objective.name=reward alone; leave it out.")


def _check_batch(config: Config) -> None:
    if config.data.mix and config.batch.order == "sequential":
        raise ConfigError(
            "batch.order=sequential goes by the order of one file; with data.mix use shuffled or related."
        )
    tokens, context = config.batch.row_tokens, config.mesh.context
    if tokens is not None and context > 1 and tokens % (multiple := row_multiple(context)):
        raise ConfigError(
            f"batch.row_tokens={tokens}: the {context} devices of mesh.context share a row in stripes of {STRIPE} "
            f"tokens, as many each; use a multiple of {multiple}, as {-(-tokens // multiple) * multiple}."
        )
    group, pairs = config.contrast.group, config.batch.pairs
    if group != "global" and pairs % group:
        divisors = ", ".join(str(d) for d in range(1, pairs + 1) if pairs % d == 0)
        raise ConfigError(
            f"contrast.group={group} does not divide the {pairs} pairs of a batch; use one of {divisors} or 'global'."
        )
    if config.objective.partition == "learned" and group == 1:
        raise ConfigError(
            "objective.partition=learned does nothing with contrast.group=1: log Z is the same for both responses "
            "of a pair; set objective.partition=none, or contrast.group to more pairs or 'global'."
        )


def _check_reference(config: Config, objective: Objective) -> None:
    name, mode, lora = config.objective.name, config.reference.mode, config.lora
    if objective.mixes_references and not config.reference.others:
        raise ConfigError(
            f"objective.name={name} mixes several references, but reference.others names none besides the first; give "
            "their folders."
        )
    if config.reference.adaptive and config.data.pairing != "paired":
        raise ConfigError(
            f"reference.adaptive weighs references by pairs, but data.pairing is {config.data.pairing}; set it to "
            "paired, or give reference.weights."
        )
    if not objective.uses_reference and config.reference.others:
        raise ConfigError(
            f"objective.name={name} uses no reference, so reference.others would not be read; leave it out."
        )
    if objective.uses_tokens and mode in ("cached", "none"):
        raise ConfigError(
            f"objective.name={name} compares every token with the reference's, and reference.mode={mode} has no "
            "log-probs of single tokens; set reference.mode=live, or adapter with LoRA."
        )
    if lora.rank and config.model.path is None:
        raise ConfigError(
            f"lora.rank={lora.rank} adapts a model that exists; name it with model.path, or set lora.rank=0."
        )
    if mode == "adapter" and not lora.rank:
        raise ConfigError(
            "reference.mode=adapter is the policy with its LoRA adapters off, but lora.rank=0 gives it none; set "
            "lora.rank, or reference.mode=cached."
        )
    if mode == "adapter" and config.reference.path is not None:
        raise ConfigError(
            f"reference.mode=adapter uses the policy's own base, so reference.path={config.reference.path} would not "
            "be read; leave it out, or use reference.mode=cached or live."
        )


def _check_rounds(config: Config, objective: Objective) -> None:
    rounds, default, reference = config.rounds, type(config.rounds)(), config.reference
    if not config.train.rounds:
        if set_keys := [key for key, value in asdict(default).items() if getattr(rounds, key) != value]:
            key = set_keys[0]
            raise ConfigError(
                f"rounds.{key}={getattr(rounds, key)} means nothing without rounds; set train.rounds, or leave it out."
            )
        return
    if objective.uses_reward_head:
        raise ConfigError("train.rounds trains a policy on its own answers, not a reward model; leave it out.")
    if rounds.score is None:
        raise ConfigError(
            f"train.rounds={config.train.rounds} has nothing to score answers by; set rounds.score to "
            "rule:MODULE.py:FUNCTION, reward:FOLDER or judge:openai:MODEL."
        )
    if config.model.path is None:
        raise ConfigError("train.rounds samples from a model that can answer already; name it with model.path.")
    unused = {
        "train.steps": (config.train.steps, "set rounds.steps, the steps of a round"),
        "data.mix": (config.data.mix, "name one source of prompts as data.path"),
        "data.weight": (config.data.weight, "leave it out"),
        "data.label_smoothing": (config.data.label_smoothing, "leave it out"),
        "reference.path": (reference.path, "leave it out: rounds.reference says which policy it is"),
        "reference.others": (reference.others, "leave it out"),
    }
    for key, (value, fix) in unused.items():
        if value:
            raise ConfigError(f"{key}={value} would not be read with train.rounds; {fix}.")
    if objective.uses_lists and rounds.select != "all":
        raise ConfigError(
            f"objective.name={config.objective.name} ranks all answers to a prompt, but rounds.select={rounds.select} "
            "makes pairs of them; set it to all."
        )
    if rounds.reference == "last" and objective.uses_reference and reference.mode != "cached":
        raise ConfigError(
            f"rounds.reference=last is computed at the start of each round, but reference.mode={reference.mode} is the "
            "start's; set it to cached."
        )


def _check_pairing(config: Config, objective: Objective, weights: str | None) -> None:
    if objective.uses_lists and config.data.pairing != "grouped":
        raise ConfigError(
            f"objective.name={config.objective.name} ranks all responses to a prompt, but data.pairing is "
            f"{config.data.pairing}; set it to grouped, with data that scores several responses (data.layout ranked)."
        )
    if config.data.pairing == "paired":
        return
    if objective.needs_pairs:
        raise ConfigError(
            f"objective.name={config.objective.name} compares the two responses of a pair, but data.pairing is "
            f"{config.data.pairing}; set it to paired."
        )
    if weights is None or not WEIGHTS[weights].needs_pairs:
        return
    if config.contrast.weights is not None:
        raise ConfigError(
            f"contrast.weights={weights} needs pairs that share a prompt, but data.pairing is {config.data.pairing}; "
            "use contrast.weights=embedding or uniform, or data.pairing=paired."
        )
    raise ConfigError(
        f"objective.name={config.objective.name} contrasts the two responses of a pair, but data.pairing is "
        f"{config.data.pairing}; "
        "set contrast.weights to embedding or uniform, or data.pairing to paired."
    )
