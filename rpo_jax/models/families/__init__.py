"""The table of model families: every module of this folder that declares `FAMILY` is in it, under the module's name.

To add a family: put a module here, named as transformers' model_type, and a case into tests/models/conftest.py. Reading
and writing folders, LoRA's targets, planning, decoding and messages follow from what it declares; docs/families.md has
the recipe.
"""

from __future__ import annotations

from rpo_jax.core.discovery import discovered
from rpo_jax.models.families.family import Family

FAMILIES: dict[str, Family] = discovered(__name__, "FAMILY")


_SHARED = "it has experts that every token uses"
_LAYER_NORMS = "its norms subtract a mean"
_NEIGHBOURS = "its rotary embedding turns neighbouring dimensions"
# What keeps families that look like those above from being read, by transformers' model_type.
_DIFFERENCES = {
    "apertus": "its MLP has no gate and an activation with parameters",
    "arcee": "its MLP has no gate",
    "cohere": f"{_LAYER_NORMS}, and {_NEIGHBOURS}",
    "cohere2": f"{_LAYER_NORMS}, and {_NEIGHBOURS}",
    "diffllama": "its attention is a difference of two",
    "ernie4_5": _NEIGHBOURS,
    "gemma3n": "its layers have embeddings of their own",
    "glm": _NEIGHBOURS,
    "glm4": _NEIGHBOURS,
    "granite_swa": "it has attention sinks",
    "helium": _NEIGHBOURS,
    "hunyuan_v1_dense": "it norms queries and keys after their rotation",
    "ministral3": "it scales queries by their position",
    "nemotron": f"{_LAYER_NORMS}, and its MLP has no gate",
    "olmo": _LAYER_NORMS,
    "phi": f"{_LAYER_NORMS}, and attention and MLP read the same input",
    "qwen3_next": "it has layers of linear attention",
    "stablelm": _LAYER_NORMS,
    "starcoder2": _LAYER_NORMS,
    "deepseek_v3": "its keys and values are compressed",
    "glm4_moe": _SHARED,
    "granitemoe": "its experts' matrices are joined",
    "phimoe": f"{_LAYER_NORMS}, and its router is another",
    "qwen2_moe": _SHARED,
}


def check_family(family: str, what: str) -> None:
    """Raise ValueError for a family that is not known, saying what differs where it is near one; `what` begins it."""
    if family not in FAMILIES:
        why = f": {_DIFFERENCES[family]}" if family in _DIFFERENCES else ""
        raise ValueError(f"{what} is not supported{why}; known families: {', '.join(FAMILIES)}.")
