"""Everything that the first step needs: weights on the mesh, the reference's log-probs, batches, compiled functions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config, PolicyConfig, resolve
from rpo_jax.core.records import PreferenceData
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.tokenizer import VOCABULARY_FILES, load_tokenizer, padding_id
from rpo_jax.hosts import processes, sharding
from rpo_jax.models import ModelConfig
from rpo_jax.models.huggingface.folders import folder_fingerprint
from rpo_jax.objectives.methods.mrpo import adaptive_reference, mixed_reference
from rpo_jax.runs.folder import MODEL
from rpo_jax.runs.tracking import MetricsLog, Reporter
from rpo_jax.sampling.end_tokens import end_tokens
from rpo_jax.training.diagnosis import Diagnosis
from rpo_jax.training.hooks.samples import Sampler
from rpo_jax.training.hooks.saving import Saving
from rpo_jax.training.prepare import (
    Prepared,
    batches_of,
    eval_pairing,
    is_paired,
    reference_pass,
    sweep_of,
    total_steps,
)
from rpo_jax.training.reference import cached_log_probs, compute_log_probs, params_fingerprint
from rpo_jax.training.rounds import Rater, RoundBatches, RoundModels, Rounds, round_steps
from rpo_jax.training.step import Params, Steps, TrainState, build_log_probs, build_steps, put_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingSetup:
    """What the training loop starts from.

    Attributes:
        state: the state of step 0; shapes and shardings alone where a checkpoint is going to be restored.
        live_reference: parameters of a reference that runs beside the policy; None where none does.
        frozen: weights of the policy that are not trained; an empty tree where all are.
        diagnosis: of a batch whose numbers are not finite.
        sampler: answers prompts at every evaluation; None where that was not asked for.
        rounds: makes the hook that samples each round's data, of what scores answers, the hook that saves, and the
            log; None without rounds.
    """

    steps: Steps
    state: TrainState
    live_reference: Params | None
    frozen: Params
    batches: PreferenceBatches | RoundBatches
    held_out: PreferenceBatches | None
    total_steps: int
    diagnosis: Diagnosis
    sampler: Sampler | None
    rounds: Callable[[Rater, Saving, MetricsLog], Rounds] | None = None


def policy_config(
    size: PolicyConfig,
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    loaded: ModelConfig | None,
    reporter: Reporter,
) -> ModelConfig:
    """Architecture of the policy: that of its folder, or one of the configured sizes for the tokenizer at hand.

    Raises ValueError for a tokenizer that is not the folder's model's.
    """
    if loaded is not None:
        models.check_tokenizer(tokenizer, loaded, str(size.path))
        if max_tokens > loaded.positions:
            reporter.say(
                f"data.max_tokens={max_tokens} is more than the {loaded.positions} positions "
                f"that {size.path} was made for"
            )
        return loaded
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return models.configured(size, len(tokenizer), max_tokens, **ids)


def _check_tokens(prepared: Prepared, smallest: ModelConfig) -> None:
    """ValueError for data with tokens that the smallest of the models has no row for."""
    prompts = (one.data for one in prepared.prompts.values())
    for data in filter(None, (prepared.train, prepared.held_out, *prompts)):
        texts = ((e.row_id, np.concatenate([*e.prompts, *(one.ids for one in e.responses)])) for e in data.examples)
        models.check_ids(prepared.tokenizer, smallest, texts)


def _reference_config(path: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Architecture of a reference of its own; ValueError unless it reads the policy's tokens as the policy does."""
    reference_config, folder = models.check_pretrained(path), models.resolve_folder(path)
    if (count := models.rows_needed(tokenizer)) > reference_config.vocab_size:
        raise ValueError(
            f"reference.path={path} has a vocabulary of {reference_config.vocab_size} tokens, the policy's tokenizer "
            f"{count}; use a reference that was trained with the policy's tokenizer."
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


def _load_weights(policy: models.Policy, path: str | None, seed: int, mesh: Mesh, reporter: Reporter) -> Params:
    """The policy's weights before training, on the mesh: those of its folder, or new ones."""
    with reporter.phase("load model") as notes:
        shardings = sharding.parameter_shardings(mesh, *policy.weights)
        if path is not None:
            weights = policy.load(path, shardings)
        else:
            # Compiled with its output's shardings: each device makes only its own part.
            weights = jax.jit(policy.init, out_shardings=shardings)(jax.random.key(seed))
        notes.append(policy.summary)
        return jax.block_until_ready(weights)


@dataclass(frozen=True)
class _References:
    """Makes the reference's log-probs of a data set, or those of a mixture, or the reference that runs beside.

    Attributes:
        architecture: of the first reference.
        weights: of the policy before training, which are the first reference where it has no folder of its own.
        base: what adapters are trained on; None where all weights are trained.
    """

    config: Config
    architecture: ModelConfig
    mesh: Mesh
    reporter: Reporter
    weights: Callable[[], Params]
    base: Mapping[str, str] | None

    def apply(self, prepared: Prepared) -> tuple[Prepared, Params | None]:
        """The data with log-probs where they are cached, and the reference where it is another model beside."""
        reference, path = resolve(self.config).reference, self.config.reference.path
        if reference in (None, "adapter"):  # the step has the frozen weights already
            return prepared, None
        if reference == "cached":
            return self._cached(prepared), None
        if path is not None:
            return prepared, models.load_sharded(path, build_log_probs(self.config, self.architecture, self.mesh)[1])
        # The step gives its state's buffers up, so a reference made of them needs its own; frozen ones are not of them.
        return prepared, self.weights() if self.config.lora.rank else jax.tree.map(jnp.copy, self.weights())

    def _cached(self, prepared: Prepared) -> Prepared:
        """The data with the reference's log-probs, or those of the mixture, from the cache or computed now."""
        settings = self.config.reference
        first = self._of_one(prepared, settings.path, self.architecture)
        if not settings.others:
            return first
        references = [first]
        for path in settings.others:
            theirs = _reference_config(path, prepared.tokenizer)
            references.append(self._of_one(prepared, path, theirs, slot=f", reference {path}"))

        def mixed(name: str) -> PreferenceData | None:
            data: PreferenceData | None = getattr(first, name)
            if data is None:
                return None
            tables = jnp.stack([getattr(one, name).reference_log_probs for one in references])
            if settings.adaptive:
                chosen, rejected, is_chosen = map(jnp.asarray, _pairs_of(data))
                mixture = adaptive_reference(tables, chosen, rejected, is_chosen, settings.clip)
            else:
                mixture = mixed_reference(tables, jnp.array(settings.mixture), settings.clip)
            return dataclasses.replace(data, reference_log_probs=np.asarray(mixture))

        return dataclasses.replace(prepared, train=mixed("train"), held_out=mixed("held_out"))

    def _of_one(self, prepared: Prepared, own: str | None, architecture: ModelConfig, slot: str = "") -> Prepared:
        """The data with one reference's log-probs.

        Args:
            own: the reference's folder; None for the policy before training.
            slot: added to what a message about the cache calls the data.
        """
        config, mesh = self.config, self.mesh
        log_probs, shardings = build_log_probs(config, architecture, mesh)

        @functools.cache  # loaded at most once, and only where the cache lacks something
        def reference_params() -> Params:
            return self.weights() if own is None else models.load_sharded(own, shardings)

        def compute(name: str, data: PreferenceData, missing: tuple[str, ...]) -> np.ndarray:
            own_rows = functools.partial(sharding.own_rows, mesh)
            passes = reference_pass(config, data, missing, sharding.row_shards(mesh), own_rows)
            with self.reporter.progress(f"reference, {name}", len(passes)) as update:
                return compute_log_probs(
                    passes, lambda batch: log_probs(reference_params(), put_batch(mesh, batch)), update
                )

        parts = {
            "weights": self._fingerprint(own),
            "architecture": hashlib.sha256(repr(architecture).encode()).hexdigest(),
            "compute_dtype": config.model.compute_dtype,
        }
        filled = {}
        with self.reporter.phase("reference log-probs") as notes:
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
                    self.reporter.say,
                )
                notes.append(f"{name} {'computed' if computed else 'from the cache'}")
        return dataclasses.replace(prepared, **filled)

    def _fingerprint(self, own: str | None) -> str:
        """What a reference's weights are told apart by."""
        if own is None and self.base is not None:
            # A rounded base is a reference of its own: log-ratios start at 0.
            stored = self.config.lora.base_dtype
            return self.base["fingerprint"] + ("" if stored == "float32" else f" in {stored}")
        source = own or self.config.model.path
        if source is None:
            return params_fingerprint(self.weights())
        # Whoever looks into the cache needs it; the others need not read a whole model for it.
        return folder_fingerprint(models.resolve_folder(source)) if processes.is_main() else ""


def _pairs_of(data: PreferenceData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each response the first chosen and the first rejected one of its example, and whether it is a chosen one."""
    firsts = []
    for kind in ("chosen", "rejected"):
        numbers, first = data.of_kind(kind), np.zeros(len(data.examples), np.int64)
        first[data.example_index[numbers][::-1]] = numbers[::-1]  # of several the first stays
        firsts.append(first[data.example_index])
    is_chosen = np.isin(np.arange(data.num_responses), data.of_kind("chosen"))
    return *firsts, is_chosen


def _check_held_out(config: Config, prepared: Prepared, shards: int) -> None:
    """ValueError for held-out data that cannot be packed or contrasted, before anything is loaded."""
    if prepared.held_out is None:
        return
    try:
        sweep_of(config, prepared.held_out, prepared.eval_responses, shards)
    except ValueError as error:
        last = f"the last data.eval_rows={config.data.eval_rows} of the data; shuffle it, or give data.eval_path"
        raise ValueError(f"Held-out data ({config.data.eval_path or last}): {error}") from None
    if (resolve(config).needs_pairs or config.reference.adaptive) and not is_paired(prepared.held_out):
        raise ValueError(
            f"objective.name={config.objective.name} contrasts the two responses of a pair, but the held-out data has "
            "examples with only one; evaluate on pairs."
        )


def run_length(config: Config, prepared: Prepared, mesh: Mesh) -> tuple[int, int]:
    """Steps of a run, and what an epoch draws (with rounds, prompts); ValueError for data that gives no batch."""
    if config.train.rounds:
        prompts = len(prepared.train.examples)
        return config.train.rounds * round_steps(config, prompts), prompts
    batches = batches_of(config, prepared.train, prepared.responses, sharding.row_shards(mesh))
    return total_steps(config.train, batches.steps_per_epoch), batches.epoch_draws


def make_setup(
    config: Config,
    model_config: ModelConfig,
    prepared: Prepared,
    mesh: Mesh,
    reporter: Reporter,
    *,
    total_steps: int,
    base: Mapping[str, str] | None,
    resuming: bool,
) -> TrainingSetup:
    """Load, place and compile what training needs.

    Args:
        total_steps: as run_length gives it, which refuses training data that no batch can be made of.
        base: as base_record gives it; None where all weights are trained.

    Raises ValueError for data or a reference that does not fit, before anything is loaded or compiled.
    """
    shards, policy = sharding.row_shards(mesh), models.Policy(model_config, config.lora)
    _check_held_out(config, prepared, shards)
    models.to_transformers(model_config, model_config.dtype)
    if resolve(config).objective.uses_reward_head:
        models.classifier_name(model_config)
    architecture = model_config
    if config.reference.path is not None and resolve(config).reference is not None:
        architecture = _reference_config(config.reference.path, prepared.tokenizer)
    others = [_reference_config(path, prepared.tokenizer) for path in config.reference.others]
    _check_tokens(prepared, min((model_config, architecture, *others), key=lambda model: model.vocab_size))
    steps = build_steps(
        config,
        model_config,
        mesh,
        total_steps,
        eval_paired=prepared.held_out is not None and eval_pairing(config.data.pairing, prepared.held_out) == "paired",
        reference_config=architecture,
        pad_id=padding_id(prepared.tokenizer, model_config.vocab_size),
    )

    # Loaded at once for a new run; a resumed one needs them only if the reference is made of them, or if they are
    # frozen.
    weights = functools.cache(
        functools.partial(_load_weights, policy, config.model.path, config.run.seed, mesh, reporter)
    )
    frozen = weights() if policy.trains_adapters else {}
    diagnosis = Diagnosis(config, model_config, mesh, steps, frozen)
    if not resuming:
        weights()
    processes.agree()  # a host that cannot read the weights says so before the others wait for its devices
    references = _References(config, architecture, mesh, reporter, weights, base)
    # A round's log-probs are computed when it is sampled.
    by_round = bool(config.train.rounds) and resolve(config).reference == "cached"
    prepared, live = (prepared, None) if by_round else references.apply(prepared)
    start: Params | None = None
    if config.train.rounds:  # where a step is to give these weights up, a copy
        start = frozen or live or (weights() if resuming else jax.tree.map(jnp.copy, weights()))
    if resuming:
        state = steps.abstract_state
    else:
        key = jax.random.key(config.run.seed)
        state = steps.init(policy.begin(weights(), key, steps.model_shardings)[0])
    rows = shards, functools.partial(sharding.own_rows, mesh)
    batches: PreferenceBatches | RoundBatches
    if config.train.rounds:
        batches = RoundBatches(round_steps(config, len(prepared.train.examples)))
    else:
        batches = batches_of(config, prepared.train, prepared.responses, *rows)
    held_out = prepared.held_out and sweep_of(config, prepared.held_out, prepared.eval_responses, *rows)
    sampler = make_rounds = None
    if config.train.sample_prompts or config.train.rounds:
        folder = Path(config.run.dir).expanduser() / MODEL if resuming else None
        if folder is None and config.model.path is not None:
            folder = models.resolve_folder(config.model.path)
        end_ids = end_tokens(folder, model_config, prepared.tokenizer, config.data.template_arguments)
        if config.train.sample_prompts:
            sampler = Sampler(config, model_config, prepared, end_ids, mesh, frozen, reporter.say)
        if isinstance(batches, RoundBatches):
            of_round = RoundModels(model_config, mesh, start, frozen, end_ids)
            make_rounds = functools.partial(Rounds, config, prepared, of_round, batches, reporter)
    return TrainingSetup(
        steps.on(frozen), state, live, frozen, batches, held_out, total_steps, diagnosis, sampler, make_rounds
    )
