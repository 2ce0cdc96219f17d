"""Everything that the first step needs: weights on the mesh, the reference's log-probs, batches, compiled functions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config, resolve
from rpo_jax.core.records import PreferenceData
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.tokenizer import VOCABULARY_FILES, load_tokenizer
from rpo_jax.hosts import processes, sharding
from rpo_jax.models import ModelConfig, lora
from rpo_jax.models.huggingface.folders import folder_fingerprint
from rpo_jax.objectives.methods.mrpo import mixed_reference
from rpo_jax.runs.folder import MODEL
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.end_tokens import end_tokens
from rpo_jax.training.diagnosis import Diagnosis
from rpo_jax.training.hooks.samples import Sampler
from rpo_jax.training.prepare import Prepared, batches_of, is_paired, reference_pass, sweep_of
from rpo_jax.training.reference import cached_log_probs, compute_log_probs, params_fingerprint
from rpo_jax.training.step import Params, Steps, TrainState, build_log_probs, build_steps, put_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Start:
    """What the training loop starts from.

    Attributes:
        state: the state of step 0; shapes and shardings alone where a checkpoint is going to be restored.
        live_reference: parameters of a reference that runs beside the policy; None where none does.
        diagnosis: of a batch whose numbers are not finite.
        sampler: answers prompts at every evaluation; None where that was not asked for.
    """

    steps: Steps
    state: TrainState
    live_reference: Params | None
    batches: PreferenceBatches
    held_out: PreferenceBatches | None
    total_steps: int
    diagnosis: Diagnosis
    sampler: Sampler | None


def policy_config(config: Config, prepared: Prepared, loaded: ModelConfig | None, reporter: Reporter) -> ModelConfig:
    """Architecture of the policy: that of its folder, or one of the configured sizes for the tokenizer at hand.

    Raises ValueError for a tokenizer with more tokens than the folder's model.
    """
    tokenizer, size = prepared.tokenizer, config.model
    if loaded is not None:
        if len(tokenizer) > loaded.vocab_size:
            raise ValueError(
                f"The tokenizer in {size.path} has {len(tokenizer)} tokens, its model only {loaded.vocab_size}; "
                "use the tokenizer that belongs to the model."
            )
        if config.data.max_tokens > loaded.max_position_embeddings:
            reporter.say(
                f"data.max_tokens={config.data.max_tokens} is more than the {loaded.max_position_embeddings} positions "
                f"that {size.path} was made for"
            )
        return loaded
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return models.configured(size, len(tokenizer), config.data.max_tokens, **ids)


def _reference_config(path: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Architecture of a reference of its own; ValueError unless it reads the policy's tokens as the policy does."""
    reference_config, folder = models.check_pretrained(path), models.resolve_folder(path)
    if len(tokenizer) > reference_config.vocab_size:
        raise ValueError(
            f"reference.path={path} has a vocabulary of {reference_config.vocab_size} tokens, the policy's tokenizer "
            f"{len(tokenizer)}; use a reference that was trained with the policy's tokenizer."
        )
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        theirs = load_tokenizer(folder).get_vocab()
        for token, number in tokenizer.get_vocab().items():
            if theirs.get(token) != number:
                raise ValueError(
                    f"reference.path={path} has another vocabulary than the policy: token {token!r} has id "
                    f"{theirs.get(token)} there and {number} in the policy's tokenizer; use a reference that was "
                    "trained with the policy's tokenizer."
                )
    return reference_config


def _initial_params(config: Config, model_config: ModelConfig, shardings: Any, reporter: Reporter) -> Params:
    with reporter.phase("load model") as notes:
        if config.model.path is not None:
            params = models.load_sharded(config.model.path, shardings)
        else:
            # Compiled with its output's shardings: each device makes only its own part.
            init = jax.jit(models.init_params, static_argnums=0, out_shardings=shardings)
            params = init(model_config, jax.random.key(config.run.seed))
        notes.append(f"{models.count_params(model_config):,} parameters, {model_config.family}")
        return jax.block_until_ready(params)


def _frozen_base(config: Config, model_config: ModelConfig, mesh: Mesh, reporter: Reporter) -> Params:
    """The weights that LoRA leaves as they are, on the mesh."""
    assert config.model.path is not None, "checked with the configuration"
    shapes = lora.abstract_base(model_config, config.lora.base_dtype)
    axes = lora.base_axes(model_config, config.lora.base_dtype)
    adapters = jax.tree.leaves(lora.abstract_adapters(model_config, config.lora))
    with reporter.phase("load model") as notes:
        shardings = sharding.parameter_shardings(mesh, axes, shapes)
        base = models.load_sharded(config.model.path, shardings, config.lora.base_dtype)
        notes.append(
            f"{models.count_params(model_config):,} parameters frozen in {config.lora.base_dtype}, "
            f"{sum(leaf.size for leaf in adapters):,} trained, {model_config.family}"
        )
        return jax.block_until_ready(base)


def _initial_adapters(config: Config, model_config: ModelConfig, shardings: Any) -> Params:
    init = jax.jit(lora.init_adapters, static_argnums=(0, 1), out_shardings=shardings)
    return init(model_config, config.lora, jax.random.key(config.run.seed))


def _with_cached_reference(
    config: Config,
    reference_config: ModelConfig,
    start_params: Callable[[], Params],
    base_fingerprint: str | None,
    prepared: Prepared,
    mesh: Mesh,
    reporter: Reporter,
) -> Prepared:
    """The data with the reference's log-probs, or those of the mixture, from the cache or computed now.

    Args:
        start_params: the policy before training; with LoRA its base, which is the same.
        base_fingerprint: of the folder that LoRA's base comes from; None without LoRA.
    """
    arguments = (start_params, base_fingerprint, prepared, mesh, reporter)
    first = _of_reference(config, config.reference.path, reference_config, *arguments)
    if not config.reference.others:
        return first
    found = [first]
    for path in config.reference.others:
        theirs = _reference_config(path, prepared.tokenizer)
        found.append(_of_reference(config, path, theirs, *arguments, slot=f", reference {path}"))

    def mixed(name: str) -> PreferenceData | None:
        data: PreferenceData | None = getattr(first, name)
        if data is None:
            return None
        tables = jnp.stack([getattr(one, name).reference_log_probs for one in found])
        mixture = mixed_reference(tables, jnp.array(config.reference.mixture), config.reference.clip)
        return dataclasses.replace(data, reference_log_probs=np.asarray(mixture))

    return dataclasses.replace(prepared, train=mixed("train"), held_out=mixed("held_out"))


def _of_reference(
    config: Config,
    own: str | None,
    reference_config: ModelConfig,
    start_params: Callable[[], Params],
    base_fingerprint: str | None,
    prepared: Prepared,
    mesh: Mesh,
    reporter: Reporter,
    slot: str = "",
) -> Prepared:
    """The data with one reference's log-probs.

    Args:
        own: the reference's folder; None for the policy before training.
        slot: added to what a message about the cache calls the data.
    """
    log_probs, shardings = build_log_probs(config, reference_config, mesh)
    source = own or config.model.path
    if own is None and base_fingerprint is not None:
        # A rounded base is a reference of its own: log-ratios start at 0.
        stored = "" if config.lora.base_dtype == "float32" else f" in {config.lora.base_dtype}"
        weights = base_fingerprint + stored
    elif source is None:
        weights = params_fingerprint(start_params())
    else:
        # Whoever looks into the cache needs it; the others need not read a whole model for it.
        weights = folder_fingerprint(models.resolve_folder(source)) if processes.is_main() else ""

    @functools.cache  # loaded at most once, and only where the cache lacks something
    def reference_params() -> Params:
        return start_params() if own is None else models.load_sharded(own, shardings)

    def compute(name: str, data: PreferenceData, missing: tuple[str, ...]) -> np.ndarray:
        own_rows = functools.partial(sharding.own_rows, mesh)
        passes = reference_pass(config, data, missing, sharding.row_shards(mesh), own_rows)
        with reporter.progress(f"reference, {name}", len(passes)) as update:
            return compute_log_probs(
                passes, lambda batch: log_probs(reference_params(), put_batch(mesh, batch)), update
            )

    parts = {
        "weights": weights,
        "architecture": hashlib.sha256(repr(reference_config).encode()).hexdigest(),
        "compute_dtype": config.model.compute_dtype,
    }
    filled = {}
    with reporter.phase("reference log-probs") as notes:
        for name, responses in (("train", prepared.responses), ("held_out", prepared.eval_responses)):
            data: PreferenceData | None = getattr(prepared, name)
            if data is None:
                continue
            origins = prepared.origins[name]
            filled[name], computed = cached_log_probs(
                data,
                responses,
                {**parts, **origins, "slot": origins["slot"] + slot},
                Path(config.run.cache_dir).expanduser(),
                functools.partial(compute, name, data),
                reporter.say,
            )
            notes.append(f"{name} {'computed' if computed else 'from the cache'}")
    return dataclasses.replace(prepared, **filled)


def _with_reference(
    config: Config,
    reference_config: ModelConfig,
    start_params: Callable[[], Params],
    base_fingerprint: str | None,
    prepared: Prepared,
    mesh: Mesh,
    reporter: Reporter,
) -> tuple[Prepared, Params | None]:
    """The data with the reference's log-probs where they are cached, and the reference where it is another model."""
    reference = resolve(config).reference
    if reference in (None, "adapter"):  # the step has the base already
        return prepared, None
    if reference == "cached":
        arguments = (start_params, base_fingerprint, prepared, mesh, reporter)
        return _with_cached_reference(config, reference_config, *arguments), None
    if config.reference.path is not None:
        shardings = build_log_probs(config, reference_config, mesh)[1]
        return prepared, models.load_sharded(config.reference.path, shardings)
    # The step gives its state's buffers up, so a reference made of them needs its own; LoRA's base is not of them.
    return prepared, start_params() if config.lora.rank else jax.tree.map(jnp.copy, start_params())


def _check_data(config: Config, prepared: Prepared, shards: int) -> None:
    """ValueError for data that cannot be packed or contrasted, before anything is loaded."""
    batches_of(config, prepared.train, prepared.responses, shards)
    if prepared.held_out is None:
        return
    sweep_of(config, prepared.held_out, prepared.eval_responses, shards)
    if resolve(config).needs_pairs and not is_paired(prepared.held_out):
        raise ValueError(
            f"objective.name={config.objective.name} contrasts the two responses of a pair, but the held-out data has "
            "examples with only one; evaluate on pairs."
        )


def make_start(
    config: Config,
    model_config: ModelConfig,
    prepared: Prepared,
    mesh: Mesh,
    reporter: Reporter,
    *,
    base_fingerprint: str | None,
    resuming: bool,
) -> Start:
    """Load, place and compile what training needs.

    Raises ValueError for data or a reference that does not fit, before anything is loaded or compiled.
    """
    shards = sharding.row_shards(mesh)
    _check_data(config, prepared, shards)
    models.to_transformers(model_config, model_config.dtype)
    reference_config = model_config
    if config.reference.path is not None and resolve(config).reference is not None:
        reference_config = _reference_config(config.reference.path, prepared.tokenizer)
    for path in config.reference.others:
        _reference_config(path, prepared.tokenizer)
    steps_per_epoch = batches_of(config, prepared.train, prepared.responses, shards).steps_per_epoch
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    steps = build_steps(
        config,
        model_config,
        mesh,
        total_steps,
        eval_paired=prepared.held_out is not None and is_paired(prepared.held_out),
        reference_config=reference_config,
    )

    # Loaded at once for a new run; a resumed one needs the initial weights only if the reference is made of them, or
    # if they are LoRA's base.
    @functools.cache
    def params() -> Params:
        if config.lora.rank:
            return _frozen_base(config, model_config, mesh, reporter)
        return _initial_params(config, model_config, steps.model_shardings, reporter)

    base = params() if config.lora.rank else None
    diagnosis = Diagnosis(config, model_config, mesh, steps, base)
    if base is not None:
        steps = steps.on(base)
    elif not resuming:
        params()
    processes.agree()  # a host that cannot read the weights says so before the others wait for its devices
    prepared, live = _with_reference(config, reference_config, params, base_fingerprint, prepared, mesh, reporter)
    if resuming:
        state = steps.abstract_state
    elif config.lora.rank:
        state = steps.init(_initial_adapters(config, model_config, steps.model_shardings))
    else:
        state = steps.init(params())
    rows = shards, functools.partial(sharding.own_rows, mesh)
    batches = batches_of(config, prepared.train, prepared.responses, *rows)
    held_out = prepared.held_out and sweep_of(config, prepared.held_out, prepared.eval_responses, *rows)
    sampler = None
    if config.train.sample_prompts:
        folder = Path(config.run.dir).expanduser() / MODEL if resuming else None
        if folder is None and config.model.path is not None:
            folder = models.resolve_folder(config.model.path)
        end_ids = end_tokens(folder, model_config, prepared.tokenizer)
        sampler = Sampler(config, model_config, prepared, end_ids, mesh, base)
    return Start(steps, state, live, batches, held_out, total_steps, diagnosis, sampler)
