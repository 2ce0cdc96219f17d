"""Configuration: frozen dataclasses, the one home of every default. rpo_jax.config.reading reads them from files.

Every range is checked when a section is built, so a bad value stops a run before any file is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rpo_jax.config.checks import ConfigError
from rpo_jax.config.data import BatchConfig, DataConfig, EmbeddingConfig
from rpo_jax.config.guard import GuardConfig
from rpo_jax.config.model import LoraConfig, PolicyConfig, ReferenceConfig
from rpo_jax.config.objective import DEFAULT_PERPLEXITY, ContrastConfig, ObjectiveConfig, OptimConfig
from rpo_jax.config.run import DistributedConfig, MeshConfig, RunConfig, TrackingConfig, TrainConfig
from rpo_jax.objectives.losses import OBJECTIVES

__all__ = [
    "DEFAULT_PERPLEXITY",
    "BatchConfig",
    "Config",
    "ConfigError",
    "ContrastConfig",
    "DataConfig",
    "DistributedConfig",
    "EmbeddingConfig",
    "GuardConfig",
    "LoraConfig",
    "MeshConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run needs; one section per part of the system."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: PolicyConfig = field(default_factory=PolicyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        group, pairs = self.contrast.group, self.batch.pairs
        if group != "global" and pairs % group:
            divisors = ", ".join(str(d) for d in range(1, pairs + 1) if pairs % d == 0)
            raise ConfigError(
                f"contrast.group={group} does not divide the {pairs} pairs of a batch; "
                f"use one of {divisors} or 'global'."
            )
        if self.objective.partition == "learned" and group == 1:
            raise ConfigError(
                "objective.partition=learned does nothing with contrast.group=1: log Z is the same for both responses "
                "of a pair; set objective.partition=none, or contrast.group to more pairs or 'global'."
            )
        objective = OBJECTIVES.get(self.objective.name)
        if objective is not None and objective.mixes_references and not self.reference.others:
            raise ConfigError(
                f"objective.name={self.objective.name} mixes several references, but reference.others names none "
                "besides the first; give their folders."
            )
        if objective is not None and not objective.uses_reference and self.reference.others:
            raise ConfigError(
                f"objective.name={self.objective.name} uses no reference, so reference.others would not be read; leave "
                "it out."
            )
        if objective is not None and objective.uses_tokens and self.reference.mode in ("cached", "none"):
            raise ConfigError(
                f"objective.name={self.objective.name} compares every token with the reference's, and "
                f"reference.mode={self.reference.mode} has no log-probs of single tokens; set reference.mode=live, or "
                "adapter with LoRA."
            )
        if self.data.pairing == "unpaired" and self.contrast.weights in ("diagonal", "pair"):
            raise ConfigError(
                f"contrast.weights={self.contrast.weights} needs pairs that share a prompt, but data.pairing is "
                "unpaired; use contrast.weights=embedding or uniform, or data.pairing=paired."
            )
        if self.lora.rank and self.model.path is None:
            raise ConfigError(
                f"lora.rank={self.lora.rank} adapts a model that exists; name it with model.path, or set lora.rank=0."
            )
        if self.reference.mode == "adapter" and not self.lora.rank:
            raise ConfigError(
                "reference.mode=adapter is the policy with its LoRA adapters off, but lora.rank=0 gives it none; set "
                "lora.rank, or reference.mode=cached."
            )
        if self.reference.mode == "adapter" and self.reference.path is not None:
            raise ConfigError(
                f"reference.mode=adapter uses the policy's own base, so reference.path={self.reference.path} would "
                "not be read; leave it out, or use reference.mode=cached or live."
            )
