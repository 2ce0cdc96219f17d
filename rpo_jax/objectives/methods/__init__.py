"""The table of objectives: every module of this folder adds its own rows and their options.

To add an objective: put a module here with `OBJECTIVES`, a dict of names and rows, and its law into
tests/objectives/test_NAME.py. The configuration's section, its --help, its range checks and the training step read
the table.
"""

from __future__ import annotations

import importlib
import pkgutil

from rpo_jax.objectives.objective import Objective, Option


def _collected() -> tuple[dict[str, Objective], dict[str, Option]]:
    objectives: dict[str, Objective] = {}
    options: dict[str, Option] = {}
    for found in pkgutil.iter_modules(__path__):
        rows: dict[str, Objective] = importlib.import_module(f"{__name__}.{found.name}").OBJECTIVES
        for name, row in rows.items():
            assert name not in objectives, f"two objectives are named {name}"
            objectives[name] = row
            for key, option in row.options.items():
                assert options.setdefault(key, option) is option, f"two options are named {key}"
    return objectives, options


OBJECTIVES, OPTIONS = _collected()
