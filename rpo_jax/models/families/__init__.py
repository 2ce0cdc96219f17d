"""The table of model families: every module of this folder that declares `FAMILY` is in it, under the module's name.

To add a family: put a module here, named as transformers' model_type, and a case into tests/models/conftest.py. Reading
and writing folders, LoRA's targets, planning, decoding and messages follow from what it declares.
"""

from __future__ import annotations

from rpo_jax.models.discovery import discovered
from rpo_jax.models.families.family import Family

FAMILIES: dict[str, Family] = discovered(__name__, "FAMILY")


def check_family(family: str, what: str) -> None:
    """Raise ValueError for a family that is not known; `what` begins the message."""
    if family not in FAMILIES:
        known = ", ".join(f"{name} ({entry.architecture})" for name, entry in FAMILIES.items())
        raise ValueError(f"{what} is not supported; known families: {known}.")
