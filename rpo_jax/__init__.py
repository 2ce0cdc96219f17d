"""Relative Preference Optimization (arXiv 2402.10958) in JAX: one contrast matrix over all devices.

config = rpo_jax.load_config("quickstart", ["optim.learning_rate=1e-4"])  # a preset, or a file
result = rpo_jax.run(config)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpo_jax import models, objectives
    from rpo_jax.config import Config
    from rpo_jax.config.reading import load_config
    from rpo_jax.tools.sampling.rounds import run
    from rpo_jax.training.hooks.hook import Hook
    from rpo_jax.training.run import RunResult

__version__ = "0.1.0"
__all__ = ["Config", "Hook", "RunResult", "__version__", "load_config", "models", "objectives", "run"]

_HOMES = {
    "Config": "rpo_jax.config",
    "Hook": "rpo_jax.training.hooks.hook",
    "RunResult": "rpo_jax.training.run",
    "load_config": "rpo_jax.config.reading",
    "run": "rpo_jax.tools.sampling.rounds",
}


if importlib.util.find_spec("torch") is None:
    # It is an extra here; transformers would say at every start that its models cannot be had, which nobody asks for.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "true")


def __getattr__(name: str) -> Any:
    # On demand: the package and rpo_jax.data load no jax; each of these names does.
    if name in ("models", "objectives"):
        return importlib.import_module(f"rpo_jax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rpo_jax' has no attribute {name!r}")
