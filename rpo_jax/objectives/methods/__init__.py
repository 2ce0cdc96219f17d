"""The registry of objectives: every module of this folder adds its own, with their options.

To add an objective: put a module here with `OBJECTIVES`, a dict of names and objectives with their own defaults, and
its law into tests/objectives/test_NAME.py. The configuration's section, its --help, its range checks and the training
step read the registry.
"""

from __future__ import annotations

from dataclasses import fields

from rpo_jax.core.discovery import discovered
from rpo_jax.objectives.objective import Objective, Option


def _collected() -> tuple[dict[str, Objective], dict[str, Option]]:
    objectives: dict[str, Objective] = {}
    options: dict[str, Option] = {}
    for named in discovered(__name__, "OBJECTIVES").values():
        for name, objective in named.items():
            assert name not in objectives, f"two objectives are named {name}"
            objectives[name] = objective
            for entry in fields(objective):
                if option := entry.metadata.get("option"):
                    assert options.setdefault(entry.name, option) is option, f"two options are named {entry.name}"
    return objectives, options


OBJECTIVES, OPTIONS = _collected()
