"""A policy as training, sampling and exporting see it, whatever of it is trained: the one narrow interface to models.

A policy's *weights* are what a model folder holds, as they are kept in memory. Either they are trained themselves, or
they are *frozen* and adapters beside them are *trained* (LoRA). Where nothing is frozen, `frozen` is an empty tree, so
that callers pass it on without asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from rpo_jax.config import LoraConfig, PolicyConfig
from rpo_jax.models import lora as adapters
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.attention.registry import Asked, check_attention, check_attention_name
from rpo_jax.models.decoder import (
    Execution,
    Params,
    abstract_params,
    count_params,
    hidden_states_and_routing,
    init_params,
    output_head,
    param_axes,
)
from rpo_jax.models.experts import Routing
from rpo_jax.models.families import FAMILIES, check_family
from rpo_jax.models.huggingface.loading import load_pretrained
from rpo_jax.models.huggingface.saving import save_pretrained
from rpo_jax.models.projection import Adapted, with_wide_gradient

ROW_IDS = ("tokens", "positions", "segment_ids", "branch_ids")  # what a decoder reads of packed rows


class Parameters(NamedTuple):
    """Parameters without values, in two trees of one structure.

    Attributes:
        axes: names of each parameter's axes, a tuple.
        shapes: each parameter's shape and dtype, a jax.ShapeDtypeStruct.
    """

    axes: Params
    shapes: Params


class Outputs(NamedTuple):
    """What a policy says of packed rows, before any log-prob is made of it.

    Attributes:
        hidden: of every token, in the compute dtype.
        head: float32, whole over the devices that share rows, rounded to the compute dtype where these send it;
            hidden times head gives the logits, before their cap.
        routing: where the experts of every layer have their tokens from; None without experts.
    """

    hidden: Float[Array, "B T D"]
    head: Float[Array, "D V"]
    routing: Routing | None


@dataclass(frozen=True)
class Policy:
    """A decoder of which all weights are trained, or with `lora.rank` adapters beside frozen weights.

    Hashable: it can be a static argument of a jitted function. ValueError for LoRA targets that the family has not,
    and for a base that cannot be stored as asked.
    """

    model_config: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.trains_adapters:
            adapters.check_targets(self.lora.targets, tuple(FAMILIES[self.model_config.family].lora_targets))
            adapters.check_base_dtype(self.model_config, self.stored_dtype)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, which mean nothing without the weights that they were trained on."""
        return self.lora.rank > 0

    @property
    def stored_dtype(self) -> str:
        """How the weights are kept in memory: float32, bfloat16, int8, nf4 or int4."""
        return self.lora.base_dtype

    @property
    def weights(self) -> Parameters:
        """What `load` gives."""
        dtype = self.stored_dtype
        return Parameters(
            adapters.base_axes(self.model_config, dtype), adapters.abstract_base(self.model_config, dtype)
        )

    @property
    def trained(self) -> Parameters:
        """What an optimizer changes and a checkpoint holds."""
        if not self.trains_adapters:
            return Parameters(param_axes(self.model_config), abstract_params(self.model_config))
        arguments = self.model_config, self.lora
        return Parameters(adapters.adapter_axes(*arguments), adapters.abstract_adapters(*arguments))

    @property
    def decayed(self) -> Params:
        """Which of what is trained weight decay shrinks, a tree of bools: not what files hold as a vector.

        That is scales of norms, and biases. By their own shapes they cannot be told: layers are stacked, and the bias
        of a projection has heads.
        """
        rules = FAMILIES[self.model_config.family].weights
        vectors = {rule.path for rule in rules if rule.layout in ("vector", "vectors")}
        return unflatten_dict({path: path not in vectors for path in flatten_dict(self.trained.shapes)})

    @property
    def frozen(self) -> Parameters:
        """The weights if adapters are trained, otherwise empty trees."""
        return self.weights if self.trains_adapters else Parameters({}, {})

    @property
    def summary(self) -> str:
        """One line on how many parameters there are, and of what family."""
        count, family = f"{count_params(self.model_config):,} parameters", self.model_config.family
        if not self.trains_adapters:
            return f"{count}, {family}"
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.trained.shapes))
        return f"{count} frozen in {self.stored_dtype}, {trained:,} trained, {family}"

    def load(self, path: str | Path, shardings: Any) -> Params:
        """The weights of a Hugging Face folder or hub name on devices; each process reads what its devices hold.

        Args:
            shardings: one for each parameter, in the tree of `weights`.

        Errors as rpo_jax.models.check_pretrained's.
        """
        return adapters.load_sharded(path, shardings, self.stored_dtype)

    def init(self, key: PRNGKeyArray) -> Params:
        """New values of what is trained; new adapters change nothing yet.

        A pure function: under jax.jit with out_shardings each device makes only its own part.
        """
        if self.trains_adapters:
            return adapters.init_adapters(self.model_config, self.lora, key)
        return init_params(self.model_config, key)

    def begin(self, weights: Params, key: PRNGKeyArray, shardings: Any) -> tuple[Params, Params]:
        """What is trained and what is frozen when training begins on these weights.

        Args:
            shardings: in the tree of `trained`.
        """
        if not self.trains_adapters:
            return weights, {}
        return jax.jit(self.init, out_shardings=shardings)(key), weights

    def combine(self, trained: Params, frozen: Params) -> Params:
        """The parameters that the decoder reads."""
        return adapters.combine(frozen, trained, self.lora) if self.trains_adapters else trained

    def with_wide_gradients(self, params: Params) -> Params:
        """The parameters that the decoder reads, with the gradients of the layers' matrices in float32.

        In a narrower compute dtype products give them in that, and devices add them so. Where there are adapters it is
        theirs: what lies beside them is frozen.
        """
        flat, matrices = flatten_dict(params), adapters.matrices(self.model_config)
        adapted = {path for path, kernel in flat.items() if isinstance(kernel, Adapted)}
        trained = adapted or matrices
        return unflatten_dict(flat | {path: with_wide_gradient(cast(Any, flat[path])) for path in trained})

    def check(self, how: Execution, row_tokens: int | None) -> None:
        """Raise ValueError where the attention that is asked for cannot be had; row_tokens as for check_attention."""
        asked = Asked.of(self.model_config, how.compute_dtype, row_tokens, how.split.share.context)
        check_attention(how.attention, how.platform or jax.default_backend(), asked)

    def outputs(self, params: Params, rows: Mapping[str, Array], how: Execution) -> Outputs:
        """Hidden states and head for packed rows.

        Args:
            params: as `combine` gives them, or weights.
            rows: what ROW_IDS names, each [B, T], as in core.records.Batch; striped, as the hidden states are then,
                where devices share a row's tokens.
        """
        tokens, positions, segments, branches = (rows[name] for name in ROW_IDS)
        hidden, routing = hidden_states_and_routing(
            self.model_config, params, tokens, positions, segments, branches, how
        )
        # Whole over fsdp before the chunks of a loss run, or each chunk would gather it again.
        head = how.split.gather(output_head(self.model_config, params), ("embed", "vocab"), how.compute_dtype)
        return Outputs(hidden, head, routing)

    def save(self, out: str | Path, trained: Params, weights: str | Path | None, **settings: Any) -> Path:
        """Write a Hugging Face folder of the whole policy, adapters added to the weights in float32.

        Args:
            weights: folder of the weights that adapters were trained on; not read without adapters.
            settings: of rpo_jax.models.save_pretrained.
        """
        params = trained
        if self.trains_adapters:
            _, base = load_pretrained(weights or "")
            params = adapters.merge(self.model_config, base, trained, self.lora, in_place=True)
        return save_pretrained(out, self.model_config, params, **settings)

    def save_adapter(self, out: str | Path, trained: Params, *, base: str, **settings: Any) -> Path:
        """Write the adapters alone as a PEFT folder; the settings are those of rpo_jax.models.lora.save_adapter."""
        assert self.trains_adapters
        return adapters.save_adapter(out, self.model_config, trained, self.lora, base=base, **settings)


def check_choices(model: PolicyConfig, lora: LoraConfig) -> None:
    """Raise ValueError for names in a configuration that no registry has: family, attention, LoRA's targets.

    The family of an existing folder is not known here: its targets are checked again with the Policy.
    """
    check_attention_name(model.attention)
    if model.path is None:
        check_family(model.family, f"model.family={model.family}")
    if lora.rank:
        names = [target for family in FAMILIES.values() for target in family.lora_targets]
        adapters.check_targets(lora.targets, tuple(dict.fromkeys(names)))
