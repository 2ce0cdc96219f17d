"""Sections on what is minimised, and by which optimizer."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rpo_jax.config.checks import ConfigError, in_range, positive
from rpo_jax.config.synonyms import LOSSES
from rpo_jax.objectives.losses import OBJECTIVES, OPTIONS, Objective
from rpo_jax.objectives.pairwise import LinkObjective


@dataclass(frozen=True, kw_only=True)
class _SharedOptions:
    """What is minimised.

    Args:
        name: a name in rpo_jax.objectives.losses.OBJECTIVES.
        beta: inverse temperature of the implicit reward, 1/nats; the objective's own where not given: {betas}.
        link: overrides the objective's link on the contrast matrix: logistic, smoothed, squared, hinge, robust or exo.
        label_smoothing: probability that a label is flipped (epsilon of the links smoothed, robust and exo, and of
            aot); the objective's own where not given: 0.1, aot 0.
        average_log_prob: divide each response's log-prob by its number of scored tokens.
        nll_weight: weight of the chosen responses' negative log-likelihood per token beside a pairwise objective.
        nll_mean: what that likelihood is a mean over: `responses`, each alike, or `tokens` of the batch, as in sft.
        partition: `learned` trains a head that predicts log Z(x) of the prompt, whose differences between prompts
            enter the scores of the contrast matrix; `none` takes them as 0, as the paper does. The head is in the
            run's checkpoints, not in what is exported of them.
    """

    name: str = "rpo"
    beta: float | None = None
    link: Literal["logistic", "smoothed", "squared", "hinge", "robust", "exo"] | None = None
    label_smoothing: float | None = None
    average_log_prob: bool = False
    nll_weight: float = 0.0
    nll_mean: Literal["responses", "tokens"] = "responses"
    partition: Literal["none", "learned"] = "none"

    def __post_init__(self) -> None:
        positive("objective", beta=self.beta)
        if self.label_smoothing is not None:
            in_range("objective", "label_smoothing", self.label_smoothing, 0.0, 0.5)
        if not self.nll_weight >= 0:
            raise ConfigError(f"objective.nll_weight={self.nll_weight} must be at least 0.")
        self.build()

    def build(self) -> Objective:
        """The objective that is named, with its own default of every option that is not given.

        Raises ConfigError for an unknown name, and for an option that is out of range or means nothing to it.
        """
        name = self.name
        if name not in OBJECTIVES:
            word = name.lower()
            near = [LOSSES[word]] if word in LOSSES else difflib.get_close_matches(word, OBJECTIVES, n=1)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            raise ConfigError(f"unknown objective {name!r}; {hint} {', '.join(OBJECTIVES)}.")
        own = OBJECTIVES[name].options()
        defaults = {key: entry.default for key, entry in type(self).__dataclass_fields__.items()}
        settings = {key: getattr(self, key) for key in defaults if getattr(self, key) != defaults[key]}
        smoothing = settings.pop("label_smoothing", None)
        for key in (key for key in settings if key not in (*own, "name", "partition")):
            usable = [other for other, objective in OBJECTIVES.items() if key in objective.options()]
            if key != "link":
                raise _means_nothing(name, key, settings[key], usable)
            raise ConfigError(
                f"objective {name!r} takes no link, but got link={self.link!r}; leave it out, or use one of the "
                f"objectives {', '.join(usable)}."
            )
        try:
            objective = replace(OBJECTIVES[name], **{key: settings[key] for key in own if key in settings})
            if smoothing is not None and "label_smoothing" in objective.options_in_use():
                return replace(objective, label_smoothing=smoothing)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        # Configurations of earlier runs name the default for every objective.
        if smoothing != LinkObjective.label_smoothing:
            self.check_smoothing(objective)
        return objective

    def check_smoothing(self, objective: Objective | None = None) -> None:
        """ConfigError for a label smoothing that would not be read."""
        if self.label_smoothing is None or "label_smoothing" in (objective or self.build()).options_in_use():
            return
        usable = [other for other, named in OBJECTIVES.items() if "label_smoothing" in named.options_in_use()]
        raise _means_nothing(self.name, "label_smoothing", self.label_smoothing, usable)


def _means_nothing(objective: str, key: str, value: Any, usable: list[str]) -> ConfigError:
    return ConfigError(
        f"objective.{key}={value} means nothing to objective.name={objective}; leave it out, or use one of the "
        f"objectives {', '.join(usable)}."
    )


def _with_options(shared: type) -> Any:
    """The section's class: the shared options, and those of single objectives in the registry."""
    fields: list[Any] = []
    betas = [f"{name} {named.beta:g}" for name, named in OBJECTIVES.items() if named.beta != Objective.beta]
    lines, doc = "", str(shared.__doc__).replace("{betas}", ", ".join([*betas, f"others {Objective.beta:g}"]))
    for name, option in OPTIONS.items():
        kind: Any = Literal[option.choices] if option.choices else type(option.default)  # pyright: ignore
        fields.append((name, kind, field(default=option.default)))
        lines += f"        {name}: {option.doc}\n"
    made = make_dataclass("ObjectiveConfig", fields, bases=(shared,), frozen=True, kw_only=True)
    made.__module__, made.__doc__ = __name__, f"{doc.rstrip()}\n{lines}    "
    return made


if TYPE_CHECKING:
    ObjectiveConfig = _SharedOptions
else:
    ObjectiveConfig = _with_options(_SharedOptions)


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The contrast matrix.

    Args:
        weights: embedding, uniform, diagonal or pair; the objective's own where not given (rpo: embedding; dpo,
            ipo, cdpo, slic: pair).
        alpha: weight of the diagonal for `weights: diagonal`.
        weights_on: what the weights multiply: `score` the scores (Eqs. 12, 13), `loss` their losses, so that a row
            pulls as one pair does, whatever its length.
        diagonal_on: `loss` is `weights_on: loss` for `weights: diagonal` alone, as the authors' release has it.
        temperature: fixed tau of the embedding weights.
        perplexity: instead of a temperature: solve each row's tau for this many effective contrasts. With neither
            given, 6.
        group: `global` contrasts the whole global batch; an integer fills independent square groups of that many
            pairs in batch order.
        block: how the matrix is computed: `dense`, whole; an integer, in blocks of rows with at most that many entries
            squared, shared among all devices; `auto`, whole up to 4,096 by 4,096 entries (64 MiB a float32 array),
            else in blocks of 1,024. The results are the same.
    """

    weights: Literal["embedding", "uniform", "diagonal", "pair"] | None = None
    alpha: float = 0.8
    weights_on: Literal["score", "loss"] = "score"
    diagonal_on: Literal["score", "loss"] = "score"
    temperature: float | None = None
    perplexity: float | None = None
    group: int | Literal["global"] = "global"
    block: int | Literal["auto", "dense"] = "auto"

    def __post_init__(self) -> None:
        in_range("contrast", "alpha", self.alpha, 0.0, 1.0)
        positive("contrast", temperature=self.temperature)
        if self.temperature is not None and self.perplexity is not None:
            raise ConfigError("contrast.temperature fixes tau, contrast.perplexity solves for it; set one to null.")
        if self.perplexity is not None and not self.perplexity >= 1:
            raise ConfigError(f"contrast.perplexity={self.perplexity} must be at least 1, one contrast a row.")
        if isinstance(self.group, int) and self.group < 1:
            raise ConfigError(f"contrast.group={self.group} must be a positive number of pairs or 'global'.")
        if isinstance(self.block, int) and self.block < 1:
            raise ConfigError(
                f"contrast.block={self.block} must be the edge of a block, at least 1, or 'auto' or 'dense'."
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; the defaults are the paper's (Table 5).

    Args:
        name: rmsprop (as torch.optim.RMSprop), adamw, lion, adafactor (second moments in rows and columns: little
            memory) or muon (orthogonalised momentum for the layers' matrices, adamw for the rest).
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up.
        schedule: after the warm-up: constant; linear or cosine decay to zero at the last step; wsd, constant and then
            linear decay to zero in the last `decay_share` of the steps; or inverse_sqrt, which needs no last step.
        decay_share: share of the steps after the warm-up in which wsd decays.
        max_grad_norm: gradients are scaled down to this global norm.
        weight_decay: decoupled weight decay, of all but rmsprop; scales of norms, and biases, are left alone.
        b1: first-moment decay of adamw and lion, and of muon's adamw.
        b2: second-moment decay of adamw and lion, and of muon's adamw.
        decay: squared-gradient decay of rmsprop.
        eps: added outside the square root.
    """

    name: Literal["rmsprop", "adamw", "lion", "adafactor", "muon"] = "rmsprop"
    learning_rate: float = 5e-7
    warmup_steps: int = 150
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    decay_share: float = 0.2
    max_grad_norm: float = 10.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        positive("optim", learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, eps=self.eps)
        for name in ("b1", "b2", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be at least 0, and below 1.")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optim.decay_share={self.decay_share} must be more than 0, and at most 1.")
        if self.warmup_steps < 0 or not self.weight_decay >= 0:
            raise ConfigError("optim.warmup_steps and optim.weight_decay must not be negative.")
