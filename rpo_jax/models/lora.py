"""LoRA: low-rank adapters beside a frozen base, which may be bfloat16 or int8.  W' = W + (alpha / rank) a b.

Source: arXiv 2106.09685, Section 4.1; training over quantized weights as in arXiv 2305.14314.

Adapters are a parameter tree of their own, float32 and stacked over layers like the others: {"layers": {"attention":
{"query": {"lora_a": ..., "lora_b": ...}, ...}}}. `combine` puts them beside the base's kernels in a tree that the
decoder reads; the base alone, as the decoder reads it too, is the model with its adapters off.

Why not qwix (0.1.8 tried): it makes adapters and int8 weights while it runs the model, layer by layer, and ours scan
over stacked layers: apply_lora_to_model fails there, and quantize_model leaves every layer as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PRNGKeyArray

from rpo_jax.config import LoraConfig
from rpo_jax.core.files import atomic_directory
from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params, param_axes
from rpo_jax.models.families import FAMILIES
from rpo_jax.models.huggingface.folders import copy_tokenizer
from rpo_jax.models.huggingface.loading import DTYPES, Weights, check_dtype, open_weights, place
from rpo_jax.models.huggingface.tensors import Index, flat_params
from rpo_jax.models.projection import Adapted, Quantized

A, B = "lora_a", "lora_b"
INT8_MAX = 127  # symmetric: -128 is not used


class Projection(NamedTuple):
    """One linear layer of every decoder layer, and of every expert if it is one of theirs, stacked.

    Attributes:
        path: of its kernel in the tree of parameters.
        module: its name in a Hugging Face model, with `{layer}`, and with `{expert}` unless experts share one tensor.
        layers: how many are stacked, along the axes of layers and of experts.
        inputs: sizes of its input axes, by name.
        outputs: sizes of its output axes, by name.
    """

    path: tuple[str, ...]
    module: str
    layers: dict[str, int]
    inputs: dict[str, int]
    outputs: dict[str, int]

    @property
    def of_experts(self) -> bool:
        return "experts" in self.layers

    @property
    def place(self) -> tuple[str, ...]:
        """Where its adapters are: beside the kernel, or, where that has no place of its own, in its place."""
        return self.path[:-1] if self.path[-1] == "kernel" else self.path


def check_targets(targets: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise ValueError unless the targets are some of the linear layers that are known."""
    if not targets or len({*targets} & {*known}) < len(targets):
        raise ValueError(f"lora.targets={list(targets)} must be some of {', '.join(known)}, each at most once.")


def projections(model_config: ModelConfig) -> dict[str, Projection]:
    """The linear layers of a model by the names that PEFT's target_modules have for them: q_proj, ..., down_proj."""
    shapes, axes = flat_params(abstract_params(model_config)), flat_params(param_axes(model_config))
    found = {}
    for name, rule in FAMILIES[model_config.family].lora_targets.items():
        sizes = list(zip(axes[rule.path], shapes[rule.path].shape, strict=True))
        # The first axis is that of the layers, then that of experts; all but the last lead into a joined layer.
        lead = 2 if rule.of_experts else 1
        split = len(sizes) - 1 if rule.layout == "joined_linear" else lead + 1
        sides = dict(sizes[:lead]), dict(sizes[lead:split]), dict(sizes[split:])
        found[name] = Projection(rule.path, rule.module, *sides)
    return found


def _quantized(model_config: ModelConfig, base_dtype: str) -> dict[tuple[str, ...], Projection]:
    """The linear layers that are stored in int8, by the path of their kernel."""
    kernels = (found for found in projections(model_config).values() if not found.of_experts)
    return {found.path: found for found in kernels} if base_dtype == "int8" else {}


def _adapter_sizes(model_config: ModelConfig, lora: LoraConfig) -> dict[tuple[str, ...], dict[str, int]]:
    """Sizes of every adapter's axes, by name."""
    known, rank = projections(model_config), {"rank": lora.rank}
    sizes = {}
    for target in lora.targets:
        _, _, layers, inputs, outputs = known[target]
        sizes[(*known[target].place, A)] = layers | inputs | rank
        sizes[(*known[target].place, B)] = layers | rank | outputs
    return sizes


def abstract_adapters(model_config: ModelConfig, lora: LoraConfig) -> Params:
    """Adapters as jax.ShapeDtypeStruct, float32."""
    sizes = _adapter_sizes(model_config, lora)
    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(tuple(axes.values()), jnp.float32) for path, axes in sizes.items()}
    )


def adapter_axes(model_config: ModelConfig, lora: LoraConfig) -> Params:
    """Names of every adapter's axes, as models.param_axes; `rank` is one more."""
    return unflatten_dict({path: tuple(axes) for path, axes in _adapter_sizes(model_config, lora).items()})


def init_adapters(model_config: ModelConfig, lora: LoraConfig, key: PRNGKeyArray) -> Params:
    """New adapters as peft makes them: a uniform within 1 / sqrt(inputs), b zero, so that the model is the base."""
    filled = {}
    for number, (path, axes) in enumerate(_adapter_sizes(model_config, lora).items()):
        shape = tuple(axes.values())
        if path[-1] == A:
            bound = np.prod(shape[2 if "experts" in axes else 1 : -1]) ** -0.5
            filled[path] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        else:
            filled[path] = jnp.zeros(shape, jnp.float32)
    return unflatten_dict(filled)


def combine(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters that the decoder reads: the base with (alpha / rank) a b beside its kernels."""
    flat, pairs = flat_params(base), flat_params(adapters)
    for path, a in pairs.items():
        if path[-1] == A:
            kernel = path[:-1] if path[:-1] in flat else (*path[:-1], "kernel")
            flat[kernel] = Adapted(flat[kernel], a, pairs[(*path[:-1], B)] * (lora.alpha / lora.rank))
    return unflatten_dict(flat)


def abstract_base(model_config: ModelConfig, base_dtype: str) -> Params:
    """The frozen base as jax.ShapeDtypeStruct, as `load_sharded` gives it.

    In int8 are the linear layers alone: the head's rounding errors would go straight into every log-prob, the
    embedding's into every layer, and norms are too small to save anything.
    """
    dtype = "float32" if base_dtype == "int8" else base_dtype
    shapes = flat_params(abstract_params(model_config)).items()
    flat: dict[tuple[str, ...], Any] = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in shapes}
    for path, kernel in _quantized(model_config, base_dtype).items():
        scale = jax.ShapeDtypeStruct(tuple((kernel.layers | kernel.outputs).values()), jnp.float32)
        flat[path] = Quantized(cast(Any, jax.ShapeDtypeStruct(flat[path].shape, jnp.int8)), cast(Any, scale))
    return unflatten_dict(flat)


def base_axes(model_config: ModelConfig, base_dtype: str) -> Params:
    """Names of the axes of the frozen base, in its tree."""
    flat = flat_params(param_axes(model_config))
    for path, kernel in _quantized(model_config, base_dtype).items():
        flat[path] = Quantized(cast(Any, flat[path]), cast(Any, tuple(kernel.layers | kernel.outputs)))
    return unflatten_dict(flat)


def load_sharded(path: str | Path, shardings: Any, dtype: str = "float32") -> Params:
    """Parameters of a Hugging Face folder or hub name on devices; each process reads what its devices hold.

    Args:
        shardings: of every array, in the tree of the parameters, or for int8 of `abstract_base`; they may span several
            processes.
        dtype: of the parameters; `int8` is symmetric, with one scale per output channel and layer,
            values = round(W / scale), scale = max over inputs |W| / 127.

    Errors as check_pretrained's.
    """
    check_dtype(dtype, "int8")
    weights = open_weights(path)
    weights.check_tied()
    kernels, places = _quantized(weights.model_config, dtype), flat_params(shardings)
    loaded = {}
    for name, leaf in flat_params(abstract_base(weights.model_config, dtype)).items():
        if name in kernels:
            loaded[name] = _load_quantized(weights, kernels[name], leaf, places[name])
        else:
            loaded[name] = weights.place(name, leaf, places[name])
    return unflatten_dict(loaded)


def _load_quantized(weights: Weights, kernel: Projection, shapes: Quantized, places: Any) -> Quantized:
    """A kernel in int8 without the whole of it: values by parts, after a pass over all inputs for the scale.

    Every process reads all inputs of the outputs that its devices hold, a layer at a time, and so finds the same scale
    as every other without asking.
    """
    num_inputs = len(kernel.inputs)
    everything = (slice(None),) * num_inputs
    known: dict[Any, np.ndarray] = {}

    def read_layers(index: Index) -> Iterator[np.ndarray]:
        for layer in range(shapes.values.shape[0])[index[0]]:
            yield weights.read(kernel.path, (slice(layer, layer + 1), *index[1:]), "float32")[0]

    def read_scale(index: Index) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shapes.scale.shape, strict=True))
        if key not in known:
            layers = read_layers((index[0], *everything, *index[1:]))
            known[key] = np.stack(
                [_scale(wide, num_inputs, kernel, layer) for layer, wide in enumerate(layers, index[0].start)]
            )
        return known[key]

    def read_values(index: Index) -> np.ndarray:
        scales = read_scale((index[0], *index[1 + num_inputs :]))
        return np.stack([_rounded(wide, scale) for wide, scale in zip(read_layers(index), scales, strict=True)])

    scale = place(shapes.scale.shape, places.scale, read_scale)
    return Quantized(place(shapes.values.shape, places.values, read_values), scale)


def _scale(wide: np.ndarray, num_inputs: int, kernel: Projection, layer: int) -> np.ndarray:
    """Steps of one layer's output channels; ValueError for weights that are not finite."""
    largest = np.max(np.abs(wide), axis=tuple(range(num_inputs)))
    if not np.isfinite(largest).all():
        name = kernel.module.format(layer=layer)
        raise ValueError(f"{name} of the base has weights that are not finite; they cannot be made int8.")
    return np.where(largest > 0, largest / INT8_MAX, 1.0).astype(np.float32)


def _rounded(wide: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(wide / scale).astype(np.int8)


def merge(model_config: ModelConfig, params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """float32 parameters in host memory with the adapters added.  W + (alpha / rank) a b."""
    flat, pairs = flat_params(params), flat_params(adapters)
    known = projections(model_config)
    for target in lora.targets:
        path, lead = known[target].path, len(known[target].layers)
        a, b = (np.asarray(pairs[(*known[target].place, name)], np.float32) for name in (A, B))
        merged = np.array(flat[path], np.float32)
        for number in np.ndindex(merged.shape[:lead]):
            merged[number] += (lora.alpha / lora.rank) * np.tensordot(a[number], b[number], axes=1)
        flat[path] = merged
    return unflatten_dict(flat)


def save_adapter(
    path: str | Path,
    model_config: ModelConfig,
    adapters: Params,
    lora: LoraConfig,
    *,
    base: str,
    tokenizer: str | Path,
    dtype: str | None = None,
    readme: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a PEFT folder that peft.PeftModel.from_pretrained loads onto the base; whole or not at all.

    Args:
        path: folder to make; an existing one is refused unless `overwrite`.
        base: folder or hub name of the base, for those who load the adapter alone.
        tokenizer: folder whose tokenizer files and chat template are copied.
        dtype: of the written tensors; float32 where not given.
        readme: the folder's README.md.
        overwrite: replace an existing folder.
    """
    from safetensors.numpy import save

    check_dtype(dtype or "float32")
    tensors, parameters = _peft_tensors(model_config, adapters, lora)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [target for target in lora.targets if target not in parameters],
        **({"target_parameters": list(parameters.values())} if parameters else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    target_dtype, target = DTYPES[dtype or "float32"], Path(path).expanduser()
    with atomic_directory(target, overwrite=overwrite) as folder:
        copy_tokenizer(tokenizer, folder)
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        # The library writes the buffer as it lies in memory, so a transposed view must become an array of its own.
        contiguous = {name: np.ascontiguousarray(tensor.astype(target_dtype)) for name, tensor in tensors.items()}
        # Not its save_file, whose file only its owner can read.
        (folder / "adapter_model.safetensors").write_bytes(save(contiguous, metadata={"format": "pt"}))
        (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return target


def _peft_tensors(
    model_config: ModelConfig, adapters: Params, lora: LoraConfig
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a PEFT folder, and of the targets that are no modules there PEFT's names.

    An expert's own matrix is a module, also where transformers 5 has joined them all: PEFT joins the adapters then.
    Those that are one tensor in files are a parameter of the module of all experts, which PEFT wraps once for each.
    """
    known, pairs = projections(model_config), flat_params(adapters)
    chosen = {target: kernel for target, kernel in known.items() if target in lora.targets}
    apart = {target for target, kernel in chosen.items() if kernel.path[-1] in ("gate", "up")}
    if len(apart) == 1:
        both = " and ".join(target for target, kernel in known.items() if kernel.path[-1] in ("gate", "up"))
        raise ValueError(
            f"PEFT joins the adapters of an expert's {both}, and here only {apart.pop()} has one: train both, or "
            "export the merged model (without --adapter)."
        )
    joined = [target for target, kernel in chosen.items() if kernel.of_experts and "{expert}" not in kernel.module]
    tensors: dict[str, np.ndarray] = {}
    for target, kernel in chosen.items():
        a, b = (np.asarray(pairs[(*kernel.place, name)]) for name in (A, B))
        if target in joined:
            module = kernel.module.rpartition(".")[0] + ".base_layer" * (len(joined) - 1 - joined.index(target))
            for layer in range(len(a)):
                name = f"base_model.model.{module.format(layer=layer)}"
                count, inputs, rank = a[layer].shape
                tensors[f"{name}.lora_A.weight"] = a[layer].transpose(0, 2, 1).reshape(count * rank, inputs)
                outputs = b[layer].reshape(count, rank, -1).transpose(2, 1, 0)
                tensors[f"{name}.lora_B.weight"] = outputs.reshape(-1, rank * count)
            continue
        for number in np.ndindex(*kernel.layers.values()):
            module = kernel.module.format(**dict(zip(("layer", "expert"), number, strict=False)))
            # As torch has linear layers, outputs first.
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[number].reshape(-1, lora.rank).T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[number].reshape(lora.rank, -1).T
    return tensors, {target: known[target].module.partition("{layer}.")[2] for target in joined}
