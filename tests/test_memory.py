"""What a training step holds in memory, as XLA's compiler plans it; nothing runs here. And what a run says it held."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rpo_jax.config import BatchConfig, Config, ContrastConfig, LoraConfig, MeshConfig, ObjectiveConfig, PolicyConfig
from rpo_jax.core.records import Batch, Side
from rpo_jax.hosts import memory, sharding
from rpo_jax.models import Policy, count_params
from rpo_jax.objectives.logprobs import response_log_probs
from rpo_jax.training.step import build_steps
from tests.worlds import small_model

MODEL = small_model(hidden_size=64, intermediate_size=160, num_layers=4)
ROW_TOKENS = 64  # one row a pair
ALL_WEIGHTS = LoraConfig()


def abstract_batch(pairs: int) -> Batch:
    rows = jax.ShapeDtypeStruct((pairs, ROW_TOKENS), jnp.int32)

    def side(slots: int) -> Side:
        def per_slot(dtype):
            return jax.ShapeDtypeStruct((slots,), dtype)

        embedding = jax.ShapeDtypeStruct((slots, 8), jnp.float32)
        return Side(per_slot(bool), per_slot(jnp.float32), embedding, *(per_slot(jnp.int32),) * 3)

    return Batch(rows, rows, rows, rows, rows, rows, {"chosen": side(pairs), "rejected": side(pairs)})


def step_bytes(pairs: int, micro_rows: int | None, lora: LoraConfig = ALL_WEIGHTS, **contrast) -> int:
    """Temporary memory of one training step, its arguments and results apart."""
    config = Config(
        model=PolicyConfig(path="a-model" if lora.rank else None, remat="dots"),
        objective=ObjectiveConfig(name="rpo"),
        contrast=ContrastConfig(**contrast),
        batch=BatchConfig(pairs=pairs, micro_rows=micro_rows),
        lora=lora,
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=1)
        frozen = Policy(MODEL, lora).frozen.shapes
        lowered = built.train.lower(built.abstract_state, abstract_batch(pairs), None, frozen)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_4096_pairs_train_in_the_memory_of_their_micro_batch():
    """Beyond the micro-batch's memory there is the batch's own, of a few numbers a token, and no activations."""
    micro_batch = step_bytes(16, 16, group=16)
    whole = step_bytes(4096, 16, group=16)
    tokens = 4096 * ROW_TOKENS
    # Six arrays of row data, each copied when it is cut into micro-batches and again by the loop at most.
    assert whole < micro_batch + 3 * 6 * 4 * tokens
    activations = 4 * MODEL.num_layers * MODEL.hidden_size * tokens  # of the layers' inputs alone
    assert whole < activations / 4
    assert step_bytes(64, None, group=16) - step_bytes(16, None, group=16) > 48 * activations / 4096


@pytest.mark.slow
def test_adapters_keep_no_second_product_of_every_projection():
    """What they add to a projection's outputs is computed again: kept are their inner products, of few numbers."""
    whole, adapted = (step_bytes(256, None, lora, group=16) for lora in (ALL_WEIGHTS, LoraConfig(rank=2)))
    assert adapted < 1.2 * whole  # 1.5 times as much with them


@pytest.mark.parametrize("pairs", [256, 1024])
def test_the_contrast_matrix_takes_a_few_arrays_of_its_own_size(pairs):
    grouped, whole = (step_bytes(pairs, 16, group=group) for group in (16, "global"))
    assert whole - grouped < 16 * 4 * pairs**2


@pytest.mark.parametrize("backward", [False, True])
def test_the_head_s_memory_depends_on_its_chunk_and_not_on_tokens_times_vocabulary(backward):
    width, vocabulary, chunk, responses = 8, 4000, 32, 4

    def head_bytes(tokens: int) -> int:
        def total(hidden, head, ids):
            return jnp.sum(response_log_probs(hidden, head, ids, ids, ids, responses, chunk_tokens=chunk)[0])

        function = jax.grad(total, argnums=(0, 1)) if backward else total
        shapes = ((2, tokens, width), jnp.float32), ((width, vocabulary), jnp.float32), ((2, tokens), jnp.int32)
        compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = head_bytes(128), head_bytes(1024)
    assert short < 8 * 4 * (chunk + width) * vocabulary
    assert long - short < 64 * 4 * 2 * (1024 - 128)  # a few numbers a token: of the vocabulary's 4,000, none


def test_memory_is_compared_with_more_than_the_weights():
    """The test above would prove nothing if parameters were most of what it measures."""
    assert 10 * 4 * count_params(MODEL) < 4 * MODEL.num_layers * MODEL.hidden_size * 4096 * ROW_TOKENS


def test_the_peak_is_that_of_this_process_not_of_what_started_it(monkeypatch):
    """Linux starts a process's ru_maxrss with what its parent held."""
    status = Path("/proc/self/status")
    if not status.exists() or "VmHWM" not in status.read_text(encoding="ascii"):
        pytest.skip("the system tells no peak of a process's own")
    inherited = memory.resource.struct_rusage((0.0, 0.0, 10**12, *[0] * 13))
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: inherited)
    assert 0.01 < memory.peak_memory()["memory/host_gib"] < 10**12 / 2**20 / 2
