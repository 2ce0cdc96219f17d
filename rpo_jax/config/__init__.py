"""Configuration: frozen dataclasses, the one home of every default. rpo_jax.config.reading reads them from files.

Every range is checked when a section is built and every combination when all are, so that a bad value stops a run
before any file is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rpo_jax.config.checks import ConfigError, check_fields
from rpo_jax.config.data import BatchConfig, DataConfig, EmbeddingConfig
from rpo_jax.config.guard import GuardConfig
from rpo_jax.config.model import LoraConfig, PolicyConfig, ReferenceConfig
from rpo_jax.config.objective import ContrastConfig, ObjectiveConfig, OptimConfig
from rpo_jax.config.resolve import Method, check_unread, options_taken, resolve, with_defaults_taken
from rpo_jax.config.rounds import RoundsConfig
from rpo_jax.config.run import DistributedConfig, MeshConfig, RunConfig, TrackingConfig, TrainConfig

__all__ = [
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
    "Method",
    "ObjectiveConfig",
    "OptimConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "RoundsConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "check_unread",
    "options_taken",
    "resolve",
    "with_defaults_taken",
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
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            kind: Any = section.default_factory
            given = getattr(self, section.name)
            if not isinstance(given, kind):
                raise ConfigError(f"{section.name} must be a {kind.__name__}, not {type(given).__name__}.")
            check_fields(section.name, given)
        resolve(self)
