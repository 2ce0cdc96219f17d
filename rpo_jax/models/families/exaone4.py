"""EXAONE 4: norms after attention and MLP only; where layers have windows, those without have no rope."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import Variant
from rpo_jax.models.families.family import NORMS_AFTER, Family, decoder_weights, read_windows, write_windows


def _read(config: Any) -> dict[str, Any]:
    windows = read_windows(config)
    everywhere = config.sliding_window is None
    unrotated = tuple(n for n, window in enumerate(windows) if window is None and not everywhere)
    variant = Variant(norm_before=False, norm_after=True, unrotated_layers=unrotated)
    return {"qk_norm": True, "sliding_windows": windows, "variant": variant}


FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    config_class="Exaone4Config",
    read=_read,
    write=write_windows,
    weights=decoder_weights(norms=NORMS_AFTER),
)
