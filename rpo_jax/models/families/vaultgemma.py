"""VaultGemma: Gemma 2 without the norms after attention and MLP."""

from __future__ import annotations

from rpo_jax.models.families.family import NORMS_AFTER, Family, decoder_weights
from rpo_jax.models.families.gemma2 import read_gemma, write_gemma

FAMILY = Family(
    architecture="VaultGemmaForCausalLM",
    config_class="VaultGemmaConfig",
    read=read_gemma,
    write=write_gemma,
    weights=decoder_weights(norms=NORMS_AFTER),
    activation="hidden_activation",
)
