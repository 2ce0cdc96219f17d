"""rpo_jax's own training step: packed rows, shared prompts, reference cached or live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rpo_jax
from benchmarks.spec import MAX_POSITIONS, CellSpec, Measurement, command_line, report, seconds_since_start
from benchmarks.workloads import BOS, EOS, PAD, Pair, make_pairs, timed_work
from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.core.records import Batch, PreferenceData, TokenizedExample, TokenizedResponse
from rpo_jax.hosts import sharding
from rpo_jax.hosts.memory import trim_after_compiling
from rpo_jax.training.prepare import batches_of
from rpo_jax.training.step import build_log_probs, build_steps, put_batch

RESPONSES_USED = ("chosen", "rejected")


def make_config(spec: CellSpec) -> Config:
    """The product's configuration, its defaults included, for what all systems have in common."""
    sizes = spec.sizes
    common = {
        "model.vocab_size": sizes.vocab_size,
        "model.hidden_size": sizes.hidden_size,
        "model.intermediate_size": sizes.intermediate_size,
        "model.num_layers": sizes.num_layers,
        "model.num_heads": sizes.num_heads,
        "model.num_kv_heads": sizes.num_kv_heads,
        "model.tie_embeddings": str(sizes.tie_embeddings).lower(),
        "model.rope_theta": sizes.rope_theta,
        "model.compute_dtype": spec.dtype,
        "objective.name": "rpo",
        "contrast.weights": "embedding",
        "contrast.temperature": 0.5,
        "reference.mode": spec.system.removeprefix("ours-"),
        "batch.pairs": spec.pairs,
        "batch.order": "sequential",
        "optim.name": "rmsprop",
        "optim.learning_rate": 5e-7,
        "optim.max_grad_norm": 10.0,
    }
    if spec.lora_rank:
        # A configuration adapts a model that exists; here it is one of random weights, and its path is not read.
        common |= {"lora.rank": spec.lora_rank, "model.path": "random"}
    return rpo_jax.load_config(None, [f"{key}={value}" for key, value in common.items()] + list(spec.settings))


def make_model(config: Config) -> models.ModelConfig:
    size = config.model
    return models.new_config(
        family=size.family,
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        tie_embeddings=size.tie_embeddings,
        rope_theta=size.rope_theta,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def make_data(pairs: list[Pair]) -> PreferenceData:
    examples = [
        TokenizedExample(
            row_id=f"benchmark:{number}",
            prompt_id=number,
            prompts=(np.array(pair.prompt, np.int32),),
            responses=(
                TokenizedResponse("chosen", np.array(pair.chosen, np.int32), 2 * number),
                TokenizedResponse("rejected", np.array(pair.rejected, np.int32), 2 * number + 1),
            ),
        )
        for number, pair in enumerate(pairs)
    ]
    embeddings = np.stack([pair.embedding for pair in pairs])
    rows = np.repeat(np.arange(len(pairs)), 2)
    return PreferenceData(examples, embeddings, rows, np.zeros(2 * len(pairs), np.float32))


class CompilationCount:
    """Counts the programs that XLA builds or loads from the cache from now on."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == self.EVENT


def shapes_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """What decides whether a batch needs a compilation of its own."""
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))


@dataclass
class Run:
    """A model in training, its batches ready by step number."""

    spec: CellSpec
    config: Config

    def __post_init__(self) -> None:
        spec, config = self.spec, self.config
        self.mesh = sharding.make_mesh(config.mesh)
        self.model_config = make_model(config)
        self.pairs = make_pairs(spec)
        self.data = make_data(self.pairs)
        self.batches = batches_of(config, self.data, RESPONSES_USED, sharding.row_shards(self.mesh))
        self.steps = build_steps(config, self.model_config, self.mesh, spec.warmup + spec.steps + 1)
        shardings = sharding.parameter_shardings(self.mesh, *models.Policy(self.model_config).weights)
        init = jax.jit(models.init_params, static_argnums=0, out_shardings=shardings)
        self.params = init(self.model_config, jax.random.key(spec.seed))

    def compute_reference(self, numbers: Sequence[int]) -> float:
        """Fill in the reference's log-probs of these steps' pairs; returns the seconds taken, compilation included."""
        started = time.perf_counter()
        log_probs, _ = build_log_probs(self.config, self.model_config, self.mesh)
        values = self.data.reference_log_probs
        assert values is not None
        for number in numbers:
            batch = self.batches.batch_at(number)
            found = np.asarray(log_probs(self.params, put_batch(self.mesh, batch)).log_prob)
            for number, (kind, slots) in enumerate(batch.slots().items()):  # each example has one of each
                values[2 * batch.sides[kind].example_index + number] = found[slots]
        return time.perf_counter() - started

    def begin(self) -> None:
        """Make the training state and, where the reference is live, its own copy of weights that are trained."""
        policy, live = models.Policy(self.model_config, self.config.lora), self.config.reference.mode == "live"
        key = jax.random.key(self.spec.seed)
        trained, frozen = policy.begin(self.params, key, self.steps.model_shardings)
        self.reference = (frozen or jax.tree.map(jnp.copy, self.params)) if live else None
        self.state, self.steps = self.steps.init(trained), self.steps.on(frozen)
        del self.params  # given up to the state, or frozen

    def step(self, batch: Batch) -> dict[str, Any]:
        """One step, waited for."""
        self.state, metrics = self.steps.train(self.state, put_batch(self.mesh, batch), self.reference)
        return jax.block_until_ready(metrics)


def measure(spec: CellSpec) -> Measurement:
    compilations = CompilationCount()
    config, measured = make_config(spec), Measurement()
    run = Run(spec, config)
    numbers = range(spec.warmup + spec.steps)
    if config.reference.mode == "cached":
        measured.reference_seconds = run.compute_reference(numbers)
    run.begin()

    timed = [run.batches.batch_at(number) for number in numbers[spec.warmup :]]
    warm = [run.batches.batch_at(number) for number in numbers[: spec.warmup]]
    # Every shape is compiled before the clock runs: a timed batch whose shape is new runs once more before it.
    for batch in timed:
        if shapes_of(batch) not in map(shapes_of, warm):
            warm.append(batch)
    for batch in warm:
        run.step(batch)
        measured.first_step_seconds = measured.first_step_seconds or seconds_since_start(spec)

    before = compilations.count
    with ThreadPoolExecutor(1) as packer:
        ahead = packer.submit(run.batches.batch_at, spec.warmup)
        for number in numbers[spec.warmup :]:
            started, worked = time.perf_counter(), time.process_time()
            batch = ahead.result()
            ahead = packer.submit(run.batches.batch_at, number + 1)
            loss = float(run.step(batch)["loss"])
            measured.step_seconds.append(time.perf_counter() - started)
            measured.processor_seconds.append(time.process_time() - worked)
            assert np.isfinite(loss), f"loss {loss} in step {number}"
    measured.useful_tokens, measured.necessary_flops = timed_work(spec, run.pairs)
    stats = jax.local_devices()[0].memory_stats()
    measured.peak_device_bytes = stats["peak_bytes_in_use"] if stats else 0
    measured.notes = {
        "jax": jax.__version__,
        "rows": [batch.tokens.shape for batch in timed],
        "packing_efficiency": [run.batches.plan_at(number).efficiency for number in numbers[spec.warmup :]],
        "shapes": len(set(map(shapes_of, timed))),
        "compilations_while_timed": compilations.count - before,
        "settings": spec.settings,
    }
    return measured


def main() -> None:
    spec, path = command_line()
    trim_after_compiling()  # as rpo_jax.train does
    if spec.cache_dir:
        jax.config.update("jax_compilation_cache_dir", spec.cache_dir)
    # As in rpo_jax.train: an accelerator multiplies float32 at less precision unless told otherwise.
    precision = "float32" if spec.dtype == "float32" else None
    with jax.set_mesh(sharding.make_mesh(make_config(spec).mesh)), jax.default_matmul_precision(precision):
        report(measure(spec), path)


if __name__ == "__main__":
    main()
