"""LoRA: low-rank adapters beside a frozen base, which may be in 16, 8 or 4 bits.  W' = W + (alpha / rank) a b.

Source: arXiv 2106.09685, Section 4.1; training over quantized weights as in arXiv 2305.14314.

Adapters are a parameter tree of their own, float32 and stacked over layers like the others: {"layers": {"attention":
{"query": {"lora_a": ..., "lora_b": ...}, ...}}}. `combine` puts them beside the base's kernels in a tree that the
decoder reads; the base alone, as the decoder reads it too, is the model with its adapters off.

Why not qwix (0.1.8 tried): it makes adapters and int8 weights while it runs the model, layer by layer, and ours scan
over stacked layers: apply_lora_to_model fails there, and quantize_model leaves every layer as it was.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

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
from rpo_jax.models.huggingface.loading import DTYPES, check_dtype, open_weights
from rpo_jax.models.huggingface.tensors import flat_params
from rpo_jax.models.projection import BLOCK, Adapted
from rpo_jax.models.quantization import BY_BLOCKS, ROUNDED, Matrix, described, load_rounded

A, B = "lora_a", "lora_b"


def check_targets(targets: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise ValueError unless the targets are some of the linear layers that are known."""
    if not targets or len({*targets} & {*known}) < len(targets):
        raise ValueError(f"lora.targets={list(targets)} must be some of {', '.join(known)}, each at most once.")


def projections(model_config: ModelConfig) -> dict[str, Matrix]:
    """The linear layers of a model by the names that PEFT's target_modules have for them: q_proj, ..., down_proj."""
    by_path = matrices(model_config)
    return {name: by_path[rule.path] for name, rule in FAMILIES[model_config.family].lora_targets.items()}


def matrices(model_config: ModelConfig) -> dict[tuple[str, ...], Matrix]:
    """All matrices of decoder layers, those of experts included but no router, by their path."""
    shapes, axes = flat_params(abstract_params(model_config)), flat_params(param_axes(model_config))
    by_path = {}
    for rule in FAMILIES[model_config.family].weights:
        is_matrix = "{layer}" in rule.key and not rule.layout.startswith("vector") and rule.path[-1] != "router"
        if not is_matrix or rule.path not in axes:
            continue
        sizes = list(zip(axes[rule.path], shapes[rule.path].shape, strict=True))
        # Axes of layers and experts come first; of the others, all but the last lead into a joined layer.
        lead = 2 if "experts" in axes[rule.path] else 1
        split = len(sizes) - 1 if rule.layout == "joined_linear" else lead + 1
        parts = (dict(part) for part in (sizes[:lead], sizes[lead:split], sizes[split:]))
        by_path[rule.path] = Matrix(rule.path, rule.module, *parts)
    return by_path


def _rounded(model_config: ModelConfig, base_dtype: str) -> dict[tuple[str, ...], Matrix]:
    """The matrices that are stored in 8 or 4 bits, by path."""
    return matrices(model_config) if base_dtype in ROUNDED else {}


def check_base_dtype(model_config: ModelConfig, base_dtype: str) -> None:
    """Raise ValueError where blocks of 64 do not divide a matrix's inputs, if the base is to be rounded by blocks."""
    for matrix in matrices(model_config).values() if base_dtype in BY_BLOCKS else ():
        if (inputs := prod(matrix.inputs.values())) % BLOCK:
            raise ValueError(
                f"lora.base_dtype={base_dtype} rounds blocks of {BLOCK} inputs, and {matrix.name((0, 0))} has "
                f"{inputs}; use lora.base_dtype=int8."
            )


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

    In 8 or 4 bits are the layers' matrices alone: the head's rounding errors would go straight into every log-prob, the
    embedding's into every layer, and norms and routers are too small to save anything.
    """
    dtype = "float32" if base_dtype in ROUNDED else base_dtype
    shapes = flat_params(abstract_params(model_config)).items()
    flat: dict[tuple[str, ...], Any] = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in shapes}
    rounded = _rounded(model_config, base_dtype).items()
    return unflatten_dict(flat | {path: described(matrix, base_dtype)[0] for path, matrix in rounded})


def base_axes(model_config: ModelConfig, base_dtype: str) -> Params:
    """Names of the axes of the frozen base, in its tree."""
    flat, rounded = flat_params(param_axes(model_config)), _rounded(model_config, base_dtype).items()
    return unflatten_dict(flat | {path: described(matrix, base_dtype)[1] for path, matrix in rounded})


def load_sharded(path: str | Path, shardings: Any, dtype: str = "float32") -> Params:
    """Parameters of a Hugging Face folder or hub name on devices; each process reads what its devices hold.

    Args:
        shardings: of every array, in the tree of the parameters, or for int8, nf4 and int4 of `abstract_base`; they may
            span several processes.
        dtype: of the parameters; what int8, nf4 and int4 are is in rpo_jax.models.quantization.

    Errors as check_pretrained's, and ValueError for weights that cannot be rounded.
    """
    check_dtype(dtype, *ROUNDED)
    weights = open_weights(path)
    check_base_dtype(weights.model_config, dtype)
    weights.check_tied()
    rounded, places = _rounded(weights.model_config, dtype), flat_params(shardings)
    loaded = {}
    for name, leaf in flat_params(abstract_base(weights.model_config, dtype)).items():
        if name in rounded:
            loaded[name] = load_rounded(weights, rounded[name], leaf, places[name])
        else:
            loaded[name] = weights.place(name, leaf, places[name])
    return unflatten_dict(loaded)


def merge(
    model_config: ModelConfig, params: Params, adapters: Params, lora: LoraConfig, *, in_place: bool = False
) -> Params:
    """float32 parameters in host memory with the adapters added.  W + (alpha / rank) a b.

    Args:
        in_place: whether the arrays of `params`, float32 ones, may be changed, which halves the memory.
    """
    flat, pairs = flat_params(params), flat_params(adapters)
    known = projections(model_config)
    for target in lora.targets:
        path, lead = known[target].path, len(known[target].layers)
        a, b = (np.asarray(pairs[(*known[target].place, name)], np.float32) for name in (A, B))
        merged = flat[path] if in_place else np.array(flat[path], np.float32)
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
    within: str | None = None,
) -> Path:
    """Write a PEFT folder that peft.PeftModel.from_pretrained loads onto the base; whole or not at all.

    Args:
        path: folder to make; an existing one is refused unless `overwrite`.
        base: folder or hub name of the base, for those who load the adapter alone.
        tokenizer: folder whose tokenizer files and chat template are copied.
        dtype: of the written tensors; float32 where not given.
        readme: the folder's README.md.
        overwrite: replace an existing folder.
        within: of a base that is more than this model, such as one that sees, the module that holds its layers.
    """
    from safetensors.numpy import save

    check_dtype(dtype or "float32")
    tensors, parameters = _peft_tensors(model_config, adapters, lora)
    modules: str | list[str] = [target for target in lora.targets if target not in parameters]
    if within is not None:  # other parts of the base have modules of the same names
        whole = f"base_model.model.model.{within}."
        tensors = {name.replace("base_model.model.model.", whole, 1): tensor for name, tensor in tensors.items()}
        modules = rf"model\.{within}\..*\.({'|'.join(modules)})"
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
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
            # As torch has linear layers, outputs first.
            name = f"base_model.model.{kernel.name(number)}"
            tensors[f"{name}.lora_A.weight"] = a[number].reshape(-1, lora.rank).T
            tensors[f"{name}.lora_B.weight"] = b[number].reshape(lora.rank, -1).T
    return tensors, {target: known[target].module.partition("{layer}.")[2] for target in joined}
