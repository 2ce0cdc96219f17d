"""HyperCLOVA X: Granite, with norms after attention and MLP where the configuration says so."""

from __future__ import annotations

from typing import Any

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.families.family import BIASES, NORMS, Family, decoder_weights
from rpo_jax.models.families.granite import read_granite, write_granite


def _read(config: Any) -> dict[str, Any]:
    # It multiplies logits by what Granite's configuration divides them by.
    return read_granite(config, 1 / config.logits_scaling, norm_after=config.use_post_norm)


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        **write_granite(model),
        "logits_scaling": 1 / model.parts.logit_divisor,
        "use_post_norm": model.parts.norm_after,
    }


FAMILY = Family(
    architecture="HyperCLOVAXForCausalLM",
    config_class="HyperCLOVAXConfig",
    read=_read,
    write=_write,
    same=BIASES,
    weights=decoder_weights(
        norms={**NORMS, "post_norm1": ("attention_output_norm",), "post_norm2": ("mlp_output_norm",)}
    ),
)
