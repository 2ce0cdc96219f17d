"""OLMo 3: OLMo 2 with a window in three layers of four, whose rope is not scaled where the others' is."""

from __future__ import annotations

from rpo_jax.models.families.family import (
    ATTENTION_BIASES,
    NORMS_AFTER,
    Family,
    decoder_weights,
    read_windows,
    write_windows,
)
from rpo_jax.models.families.olmo2 import read_olmo

FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    config_class="Olmo3Config",
    read=lambda config: {**read_olmo(config), "sliding_windows": read_windows(config)},
    write=write_windows,
    same=ATTENTION_BIASES,
    weights=decoder_weights(norms=NORMS_AFTER),
    ropes_by_layer=True,
)
