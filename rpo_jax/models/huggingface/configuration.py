"""The architecture of a Hugging Face folder: transformers' configuration read, checked, and written again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax.config import PolicyConfig
from rpo_jax.core.files import read_json, refuse_gguf
from rpo_jax.models.architecture import LLAMA, ModelConfig
from rpo_jax.models.families import FAMILIES, check_family
from rpo_jax.models.families.family import Family
from rpo_jax.models.modules import ACTIVATIONS
from rpo_jax.models.rope import ROPE_KINDS, Rope, frequencies

log = logging.getLogger(__name__)

# ModelConfig's name -> transformers' name, where the value is the same. Arrays and lists are made of the sizes.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_SAME_VALUE = {
    **_SIZES,
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
MAX_SIZE = 1 << 24
_LARGEST = {"num_hidden_layers": 4096, "head_dim": 1 << 16}
VOCABULARY_MULTIPLE = 64


def new_config(
    *,
    family: str,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    tie_embeddings: bool,
    rope_theta: float,
    max_position_embeddings: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> ModelConfig:
    """Architecture of a model from scratch; what is not given here is as the family's transformers class has it."""
    check_family(family, f"model.family={family}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}.")
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "tie_word_embeddings": tie_embeddings,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    rope, kind = Rope(theta=rope_theta), FAMILIES[family]
    local = Rope(theta=kind.local_theta or rope_theta)
    values["rope_parameters"] = _rope_parameters(kind, {"full_attention": rope, "sliding_attention": local}, 1.0)
    return _from_transformers(family, _build(family, values), "float32")


def configured(sizes: PolicyConfig, vocab_size: int, max_position_embeddings: int, **token_ids: Any) -> ModelConfig:
    """Architecture of a model from scratch with a configuration's sizes; the vocabulary is rounded up, to be split.

    Args:
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer, where there is one.
    """
    values = {name: getattr(sizes, name) for name in inspect.signature(new_config).parameters if hasattr(sizes, name)}
    values["vocab_size"] = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return new_config(**values, max_position_embeddings=max_position_embeddings, **token_ids)


def read_config(folder: Path) -> ModelConfig:
    """The architecture that a folder's config.json describes; its dtype is what config.json says."""
    file = folder / "config.json"
    if not file.is_file():
        refuse_gguf(folder)
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} is an adapter without its base; merge it first, by peft's "
                f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(OUT), "
                "and save the tokenizer there too."
            )
        if (folder / "run_id").is_file():
            raise ValueError(f"{folder} is a run; first python -m rpo_jax.export --run {folder} --out FOLDER")
        raise ValueError(f"{folder} has no config.json; a model folder is what transformers' save_pretrained writes.")
    values = text_part(read_json(folder, file.name))
    if values.get("model_type") == "mistral" and "layer_types" in values:  # as transformers' AutoConfig reads it
        values |= {"model_type": "ministral", "architectures": [FAMILIES["ministral"].architecture]}
    family = str(values.get("model_type"))
    architectures = values.get("architectures") or [f"model_type {family}"]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{file}: architectures must be a list of names, got {architectures!r}.")
    _check_sizes(file, values)
    check_family(family, f"the architecture {architectures[0]!r} in {file}")
    known = FAMILIES[family].architecture
    if values.get("architectures") and known not in architectures:
        raise ValueError(f"{file} describes a {architectures[0]}; only {known} of the {family} family is supported.")
    try:
        model = described(values)
        _check_values(model)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error
    return model


def described(values: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json's values describe, by a model_type that is a family's."""
    family = str(values["model_type"])
    return _from_transformers(family, _build(family, values), _stored_dtype(values))


def text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in a folder that also sees or hears; the values where it is alone."""
    text, kind = values.get("text_config"), values.get("model_type")
    family = next((name for name, entry in FAMILIES.items() if kind in entry.multimodal), None)
    if family is None or not isinstance(text, Mapping):
        return dict(values)
    architectures = values.get("architectures")
    if architectures == [FAMILIES[family].multimodal[str(kind)]]:
        architectures = [FAMILIES[family].architecture]
    # What the whole folder says of tokens and of its tensors holds for the part.
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    outer += ("dtype", "torch_dtype", "quantization_config")
    given_outside = {name: values[name] for name in outer if values.get(name) is not None}
    return {**text, **given_outside, "model_type": text.get("model_type") or family, "architectures": architectures}


def is_text_part(folder: Path, model: ModelConfig) -> bool:
    """Whether a folder of this architecture holds more than its text."""
    return read_json(folder, "config.json").get("model_type") in FAMILIES[model.family].multimodal


def rows_needed(tokenizer: Any) -> int:
    """How many rows of an embedding a tokenizer's texts need.

    A special token that ends no text and is in no template may lie beyond, as the one for images does that Gemma 3's
    models of text alone have no row for; `check_ids` refuses a text that has it.
    """
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    written, ends = str(tokenizer.chat_template or ""), (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unused = {number for number, token in added.items() if token not in written and number not in ends}
    return max(set(tokenizer.get_vocab().values()) - unused, default=-1) + 1


def check_tokenizer(tokenizer: Any, model: ModelConfig, folder: str | Path) -> None:
    """ValueError for a tokenizer that is not the model's: with ids beyond its embedding, or without its special tokens.

    Fewer tokens than the embedding has rows are usual: those are rounded up. A padding token is not asked for, since
    some models name one that nobody has; nothing here pads with it.
    """
    if (count := rows_needed(tokenizer)) > model.vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {count} tokens, its model only {model.vocab_size}; use the tokenizer that "
            "belongs to the model."
        )
    ids = set(tokenizer.get_vocab().values())
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(model, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number >= 0 and number not in ids:  # some configurations say -1 for none
                raise ValueError(
                    f"The tokenizer in {folder} has no token {number}, which config.json there gives as {name}; use "
                    "the tokenizer that belongs to the model, or correct config.json."
                )


def check_ids(tokenizer: Any, model: ModelConfig, texts: Iterable[tuple[str, np.ndarray]]) -> None:
    """ValueError for token ids beyond the model's embedding, of texts by the row that they are from."""
    if max(tokenizer.get_vocab().values(), default=-1) < model.vocab_size:
        return
    for row_id, ids in texts:
        if len(beyond := ids[ids >= model.vocab_size]):
            raise ValueError(
                f"{row_id}: the text has {tokenizer.convert_ids_to_tokens(int(beyond[0]))!r}, token {beyond[0]}, and "
                f"the model has no more than {model.vocab_size}; mend the row, or leave it out."
            )


def _check_sizes(file: Path, values: Mapping[str, Any]) -> None:
    """ValueError for sizes that no model has, before lists are made of their length."""
    for name in (*_SIZES.values(), "head_dim"):
        value, largest = values.get(name), _LARGEST.get(name, MAX_SIZE)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise ValueError(f"{file}: {name} must be an integer from 1 to {largest:,}, got {str(value)[:100]}.")


def _check_values(model: ModelConfig) -> None:
    """ValueError for values that are no numbers, or that no frequencies follow from."""
    for name in ("rms_norm_eps", "initializer_range"):
        value = getattr(model, name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {str(value)[:100]}.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model, name)
        if not all(token is None or type(token) is int for token in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} must be a token's number, got {str(value)[:100]}.")
    for rope in filter(None, model.ropes):
        with np.errstate(all="ignore"):  # what comes out says enough
            of_rope = frequencies(rope, model.rotated_dim)[0]
        if not np.isfinite(of_rope).all():
            raise ValueError("the rope parameters give frequencies that are not finite.")
    hash(model)  # a list where a number belongs


def to_transformers(model: ModelConfig, dtype: str) -> Any:
    """The transformers configuration whose model class loads these weights."""
    family = FAMILIES[model.family]
    eos = model.eos_token_id
    values = {
        **{theirs: getattr(model, ours) for ours, theirs in {**_SAME_VALUE, **family.same}.items()},
        **family.write(model),
        family.activation: model.parts.activation,
        "head_dim": model.head_dim,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "rope_parameters": _written_ropes(model),
        "architectures": [family.architecture],
        "dtype": dtype,
    }
    config = _build(model.family, values)
    if _from_transformers(model.family, config, model.dtype) != model:
        raise ValueError(f"transformers' {family.config_class} cannot express this architecture: {model}.")
    return config


def write_config(folder: Path, model: ModelConfig, dtype: str, base: Path | None = None) -> None:
    """Write a config.json that transformers 4 and 5 read alike.

    Version 5 has the whole rotary embedding in rope_parameters, 4 looks for rope_theta, rope_scaling and, for layers
    with a window, rope_local_base_freq, and where they are absent goes on with a base of 10000 without scaling, and
    without a word. Both are written.

    Args:
        dtype: of the weights beside it.
        base: folder whose config.json is kept but for what is said here, byte for byte where that is nothing.

    Raises ValueError where the base's architecture is another.
    """
    if base is None:
        content, original = None, {}
        values = {"torch_dtype": dtype, **json.loads(to_transformers(model, dtype).to_json_string())}
    else:
        if dataclasses.replace(read_config(base), dtype=model.dtype) != model:
            raise ValueError(f"{base / 'config.json'} describes another architecture than {model}.")
        content, original = (base / "config.json").read_bytes(), read_json(base, "config.json")
        values = text_part(original)
    values.pop("auto_map", None)  # names code that is neither needed nor beside it
    values.pop("quantization_config", None)  # of the base's tensors: those beside it are not quantized
    if values.get("rope_parameters") is None:
        values["rope_parameters"] = _written_ropes(model)
    if values.get("rope_theta") is None:
        values["rope_theta"] = model.rope.theta
    if values.get("rope_scaling") is None:
        values["rope_scaling"] = _rope_scaling(model.rope)
    if model.rotated_dim != model.head_dim and values.get("partial_rotary_factor") is None:
        values["partial_rotary_factor"] = model.rotated_dim / model.head_dim
    if model.parts.local_rope is not None and values.get("rope_local_base_freq") is None:
        values["rope_local_base_freq"] = model.parts.local_rope.theta
    for name, value in _renamed(model, values).items():
        values.setdefault(name, value)
    named = [name for name in ("dtype", "torch_dtype") if values.get(name) is not None]
    if named or dtype != "float32":
        values |= dict.fromkeys(named or ("dtype", "torch_dtype"), dtype)
    if content is None or values != original:
        content = (json.dumps(values, indent=2, sort_keys=base is None, ensure_ascii=False) + "\n").encode()
    (folder / "config.json").write_bytes(content)


def _renamed(model: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """What version 5 writes under another name than 4 reads, by the latter: num_experts of some mixtures."""
    import transformers

    names = getattr(transformers, FAMILIES[model.family].config_class).attribute_map
    written = FAMILIES[model.family].write(model)
    return {older: written[older] for older, newer in names.items() if newer in values and older in written}


def _stored_dtype(values: Mapping[str, Any]) -> str:
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")


def _build(family: str, values: Mapping[str, Any]) -> Any:
    """The transformers configuration of a config.json's values; it fills in defaults and renames older keys."""
    import transformers

    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if not (method == "mxfp4" and FAMILIES[family].reads_mxfp4):
            raise ValueError(
                f"quantized weights are not supported{f' ({str(method)[:100]})' if method else ''}; use the folder of "
                "the unquantized model."
            )
        values = {name: value for name, value in values.items() if name != "quantization_config"}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}.")
    for part in [part for part in rope.values() if isinstance(part, Mapping)] or [rope]:
        kind = part.get("rope_type") or part.get("type") or "default"
        # LongRoPE's name in older configurations of Phi-3, which transformers reads so.
        if kind not in ROPE_KINDS and not (family == "phi3" and kind == "su"):
            raise ValueError(f"rope type {kind!r} is not supported; known types: {', '.join(ROPE_KINDS)}.")
        if kind == "su":  # transformers 5 looks for what LongRoPE needs before it has renamed it
            values = {**values, "rope_scaling": {**rope, "type": "longrope", "rope_type": "longrope"}}
    try:
        return getattr(transformers, FAMILIES[family].config_class).from_dict(dict(values))
    except Exception as error:  # a config.json may hold anything, and whatever it breaks the user can do the same
        raise ValueError(f"transformers does not accept it: {error}") from error


def _from_transformers(family: str, config: Any, dtype: str) -> ModelConfig:
    kind = FAMILIES[family]
    fields = {"sliding_windows": (None,) * config.num_hidden_layers, **kind.read(config)}
    activation = {"swish": "silu"}.get(found := getattr(config, kind.activation), found)  # another name of it
    if activation not in ACTIVATIONS:
        raise ValueError(f"{kind.activation} {activation!r} is not supported; known ones: {', '.join(ACTIVATIONS)}.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope, local, share = _read_ropes(family, config)
    variant = dataclasses.replace(
        fields.pop("variant", LLAMA),
        activation=activation,
        rotated_dim=None if share == 1 else int(head_dim * share),
        local_rope=None if local == rope else local,
    )
    eos = config.eos_token_id
    return ModelConfig(
        family=family,
        **{ours: getattr(config, theirs) for ours, theirs in {**_SAME_VALUE, **kind.same}.items()},
        **fields,
        head_dim=head_dim,
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        rope=rope,
        dtype=dtype,
        variant=variant,
    )


def _read_ropes(family: str, config: Any) -> tuple[Rope, Rope, float]:
    """The rope of the layers that see everything, that of those with a window, and what share of a head it turns."""
    parameters = config.rope_parameters
    by_layer = FAMILIES[family].ropes_by_layer
    if not by_layer and any(isinstance(part, Mapping) for part in parameters.values()):
        raise ValueError(f"a rope for each type of layer is not supported for the {family} family.")
    names = ("full_attention", "sliding_attention")
    ropes = [_read_rope(dict(parameters[name] if by_layer else parameters), config) for name in names]
    shares = {share for _, share in ropes}
    if shares != {1.0} and (len(shares) > 1 or not FAMILIES[family].rotates_part):
        raise ValueError("partial_rotary_factor is not supported: every dimension of a head is rotated.")
    return ropes[0][0], ropes[1][0], shares.pop()


def _read_rope(parameters: Mapping[str, Any], config: Any) -> tuple[Rope, float]:
    scaling = {name: value for name, value in parameters.items() if value is not None}
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    scaling.pop("type", None)  # the older name of rope_type
    share = float(scaling.pop("partial_rotary_factor", 1.0))
    if kind == "longrope":
        scaling |= {name: tuple(scaling[name]) for name in ("short_factor", "long_factor")}
        scaling.setdefault("factor", config.max_position_embeddings / scaling["original_max_position_embeddings"])
    known = inspect.signature(ROPE_KINDS[kind]).parameters
    if ignored := sorted(set(scaling) - set(known)):  # as by transformers
        log.warning("rope type %s has no %s: ignored.", kind, ", ".join(ignored))
    scaling = {name: value for name, value in scaling.items() if name in known}
    return Rope(theta=float(theta), kind=kind, scaling=tuple(sorted(scaling.items()))), share


def _written_ropes(model: ModelConfig) -> dict[str, Any]:
    """rope_parameters of transformers 5."""
    local = model.parts.local_rope or model.rope
    ropes = {"full_attention": model.rope, "sliding_attention": local}
    return _rope_parameters(FAMILIES[model.family], ropes, model.rotated_dim / model.head_dim)


def _rope_parameters(family: Family, ropes: Mapping[str, Rope], share: float) -> dict[str, Any]:
    """rope_parameters of these ropes by type of layer; of the first one where the family has one alone."""

    def one(rope: Rope) -> dict[str, Any]:
        partial = {} if share == 1 else {"partial_rotary_factor": share}
        return {"rope_type": rope.kind, "rope_theta": rope.theta, **_scaling(rope), **partial}

    return {name: one(rope) for name, rope in ropes.items()} if family.ropes_by_layer else one(ropes["full_attention"])


def _scaling(rope: Rope) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in rope.scaling}


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    """rope_scaling of transformers 4, which for LongRoPE takes these three and finds the rest beside it."""
    if rope.kind == "longrope":
        scaling = dict(_scaling(rope))
        return {"type": rope.kind, **{name: scaling[name] for name in ("short_factor", "long_factor")}}
    return None if rope.kind == "default" else {"rope_type": rope.kind, **_scaling(rope)}
