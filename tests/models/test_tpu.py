"""The training step compiled for eight TPU chips that are not there: libtpu, where installed, is a compiler too."""

import re

import jax
import pytest
import transformers

from rpo_jax import models
from rpo_jax.config import BatchConfig, Config, MeshConfig, PolicyConfig
from rpo_jax.core.records import Batch
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.tools.planning import hlo
from rpo_jax.tools.planning.targets import target_of
from rpo_jax.training.step import build_steps
from tests.worlds import random_data, small_model

from .conftest import CASES, OF_FAMILY, SIZES

libtpu = pytest.importorskip("libtpu", reason="only libtpu compiles for TPUs: pip install libtpu")

ROWS, TOKENS, HEADS = 8, 2048, 8


@pytest.fixture(scope="module")
def chips():
    return target_of("v5e:2x4").devices


def abstract_batch(mesh) -> Batch:
    batches = PreferenceBatches(
        random_data(),
        pairs=16,
        pairing="paired",
        responses=("chosen", "rejected"),
        seed=0,
        row_tokens=TOKENS,
        rows_multiple=ROWS,
    )
    rows, whole = sharding.by_rows(mesh), sharding.replicated(mesh)

    def abstract(leaf):
        at = rows if leaf.ndim == 2 and leaf.shape[1] == TOKENS else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    return jax.tree.map(abstract, batches.batch_at(0))


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_the_step_runs_the_kernel_without_scores_of_all_tokens_by_all(chips, shape, head_dim):
    """Three kernels, forward and backward: what the forward pass gave is kept, not computed again."""
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True))), chips)
    model = small_model(hidden_size=HEADS * head_dim, num_heads=HEADS, num_kv_heads=4)
    config = Config(batch=BatchConfig(pairs=16), model=PolicyConfig(compute_dtype="bfloat16", remat="dots"))
    steps = build_steps(config, model, mesh, total_steps=10)
    compiled = steps.train.lower(steps.abstract_state, abstract_batch(mesh), None).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    scores = 4 * ROWS * HEADS * TOKENS**2 // len(chips)
    assert compiled.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.slow
def test_the_embedding_s_and_the_head_s_gradients_are_summed_into_their_shards(chips):
    """No device gets either whole: a TPU's reduce-scatter is an all-reduce with the slice that is kept of it."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), chips)
    width, vocabulary = 512, 4096
    model = small_model(hidden_size=width, num_heads=HEADS, num_kv_heads=4, vocab_size=vocabulary)
    config = Config(batch=BatchConfig(pairs=16), model=PolicyConfig(compute_dtype="bfloat16", remat="dots"))
    steps = build_steps(config, model, mesh, total_steps=10)
    program = steps.train.lower(steps.abstract_state, abstract_batch(mesh), None).compile().as_text()
    whole = {f"f32[{width},{vocabulary}]", f"f32[{vocabulary},{width}]"}
    sums = [
        line for line in program.splitlines() if re.search(r"= \(?f32.* (all-reduce|reduce-scatter)(-start)?\(", line)
    ]
    assert sums
    for line in sums:
        name, shape = re.match(r"\s*(?:ROOT )?(%\S+) = (.*?) (?:all-reduce|reduce-scatter)", line).groups()
        if any(array in shape for array in whole):
            assert f"dynamic-slice({name}," in program, line[:200]


# What a kernel takes of head dimensions, and layers that are worth a shard.
WIDE = {"hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FAMILY.values())
def test_the_step_of_every_family_compiles_without_scores_of_all_tokens_by_all(name, chips, tmp_path):
    prefix, changes = CASES[name]
    config_class = getattr(transformers, f"{prefix}ForCausalLM").config_class
    config_class(**(SIZES | changes | WIDE | {"head_dim": 128})).save_pretrained(tmp_path)
    model = models.read_config(tmp_path)
    config = Config(batch=BatchConfig(pairs=16), model=PolicyConfig(compute_dtype="bfloat16", remat="dots"))
    expert = 2 if model.parts.experts is not None and model.parts.experts.count % 2 == 0 else 1
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4 // expert, tensor=2, expert=expert), chips)
    steps = build_steps(config, model, mesh, total_steps=10)
    program = steps.train.lower(steps.abstract_state, abstract_batch(mesh), None).compile().as_text()
    squares = {shape.dtype for shape in hlo.buffers(program) if shape.dims.count(TOKENS) > 1}
    assert squares <= {"pred", "s8", "s32"}  # the kernel's mask, and what it is made from
