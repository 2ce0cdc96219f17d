"""Plans for NVIDIA GPUs by JAX's CUDA plugin: the step and the sampler, compiled for cards that are not here."""

import dataclasses
import json
import math
import shlex
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_kernels
from rpo_jax import models, plan
from rpo_jax.config import BatchConfig, Config, LoraConfig, MeshConfig, PolicyConfig
from rpo_jax.hosts import sharding
from rpo_jax.models.attention.registry import ATTENTIONS
from rpo_jax.sampling import engine, kv_cache
from rpo_jax.tools.planning import hlo
from rpo_jax.tools.planning.chips import CHIPS
from rpo_jax.tools.planning.compiled import compile_step
from rpo_jax.tools.planning.estimate import counted
from rpo_jax.tools.planning.targets import target_of
from rpo_jax.tools.planning.workload import BatchShape, Lengths
from tests.models.test_splash import CUDNN
from tests.test_docs import PAGES, ROOT, shell_lines, words_of
from tests.worlds import small_model

pytest.importorskip("jax_plugins.xla_cuda13", reason="only JAX's CUDA plugin compiles for GPUs: scripts/test.sh cuda")

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 4, 512, 1024, 8, 4, 6144
LAYER = WIDTH * WIDTH * (2 * HEADS + 2 * KV_HEADS) // HEADS + 3 * WIDTH * INNER
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_layers": LAYERS, "num_heads": HEADS}
SIZES |= {"num_kv_heads": KV_HEADS, "vocab_size": VOCABULARY}
TOKENS = 1024
KINDS = ("all-gather", "reduce-scatter")
ALL_WEIGHTS = LoraConfig()
PAIR = [TOKENS // 2, TOKENS // 4, TOKENS // 4]  # one row


def compiled(topology, mesh, *, micro_rows=None, rows_each=2, attention="auto", lora=ALL_WEIGHTS):
    """The plan of a packed step of a small model."""
    target = target_of(topology)
    rows = rows_each * mesh.data * mesh.fsdp
    of_model = {"path": "a-model"} if lora.rank else {}  # which adapters ask for, and nothing reads
    config = Config(
        model=PolicyConfig(**of_model, compute_dtype="bfloat16", remat="dots", attention=attention),
        batch=BatchConfig(pairs=rows, micro_rows=micro_rows),
        mesh=mesh,
        lora=lora,
    )
    model = small_model(**SIZES)
    batch = BatchShape(rows, TOKENS, rows * TOKENS, rows * TOKENS // 2, rows * TOKENS**2 / 3, "")
    done = compile_step(config, model, target, batch)
    return counted(config, model, target, Lengths([PAIR], ""), batch, done)


@pytest.mark.parametrize(("reduce_dtype", "wide"), [("compute", 1), pytest.param("float32", 2, marks=pytest.mark.slow)])
def test_eight_gpus_gather_a_layer_at_a_time_and_scatter_its_gradient_in_every_micro_batch(reduce_dtype, wide):
    mesh = MeshConfig(data=1, fsdp=8, reduce_dtype=reduce_dtype)
    found = compiled("h100:8", mesh, micro_rows=16, rows_each=4)
    assert found.surprises == ()
    assert found.fits
    assert found.peak_bytes < found.memory_limit == 80e9
    assert [row for row in found.exchanges if row.kind == "all-reduce" and row.largest > 4 * WIDTH] == []
    sent = {kind: sum(row.sent for row in found.exchanges if row.kind == kind) for kind in KINDS}
    # A micro-batch runs forward twice and backward once; all in bfloat16, but the tables' gradients. Each device lacks
    # seven eighths. Tables are gathered once a pass, or once a step.
    micro_batches, layers, table = 2, 2 * LAYERS * LAYER * 7 / 8, 2 * WIDTH * VOCABULARY * 7 / 8
    gathered = sent["all-gather"] - 3 * micro_batches * layers
    assert 2 * table < 1.01 * gathered < 1.03 * 2 * micro_batches * 2 * table
    assert sent["reduce-scatter"] == pytest.approx(micro_batches * (wide * layers + 2 * table), rel=0.01)


@pytest.mark.slow
def test_a_mesh_of_two_by_two_by_two():
    found = compiled("h100:8", MeshConfig(data=2, fsdp=2, tensor=2))
    assert not [line for line in found.surprises if "all-gather" in line or "logits" in line]
    (scattered,) = (row for row in found.exchanges if row.kind == "reduce-scatter" and row.place == "loops")
    assert scattered.sent == pytest.approx(2 * LAYERS * LAYER / 2 * 1 / 2, rel=0.01)  # a half of each half


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(name, marks=[] if name == "fused" else [pytest.mark.slow])
        for name, kind in ATTENTIONS.items()
        if kind.platforms != ("tpu",)
    ],
)
def test_one_gpu_trains_adapters_with_every_attention(attention, monkeypatch):
    """In micro-batches of two rows, beside a base of bfloat16, of which no gradient is made.

    Of cuDNN's, whose library is not here, the compiler plans no work space.
    """
    monkeypatch.setattr(CUDNN, lambda: 91000)
    lora = LoraConfig(rank=8, base_dtype="bfloat16")
    found = compiled("h100:1", MeshConfig(data=1), micro_rows=2, rows_each=4, attention=attention, lora=lora)
    assert found.surprises == ()
    assert found.exchanges == ()
    assert found.memory["frozen"] == pytest.approx(2 * models.count_params(small_model(**SIZES)), rel=0.01)
    assert found.memory["params"] < 0.1 * found.memory["frozen"]


@pytest.mark.slow
def test_the_sampler_gathers_no_more_than_a_layer():
    target = target_of("h100:8")
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), target.devices)
    model = small_model(**SIZES)
    shapes = models.Policy(model).weights
    placed = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes.shapes,
        sharding.parameter_shardings(mesh, *shapes),
    )
    sampler = engine.Engine(model, mesh, sampling=engine.Sampling(), end_ids=(2,), compute_dtype="bfloat16")
    with jax.set_mesh(mesh):
        readable = jax.jit(partial(kv_cache.to_decode_layout, compute_dtype="bfloat16", platform="gpu")).lower(placed)
        params = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            readable.out_info,
            readable.compile().output_shardings,
        )
        state = jax.eval_shape(lambda: sampler.empty(16, 2))
        text = sampler.go_on.lower(params, state, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    gathers = [one for one in hlo.collectives(text, most_trips=1) if one.kind == "all-gather"]
    assert gathers
    assert all(one.shape.bytes <= 2 * WIDTH * VOCABULARY for one in gathers)


@pytest.mark.slow
def test_a_plan_says_what_it_was_compiled_for(tmp_path, capsys):
    file = tmp_path / "plan.json"
    sizes = [word for name, size in SIZES.items() for word in (f"--model.{name}", str(size))]
    arguments = ["--topology", "a100:2x4", *sizes, "--mesh.fsdp", "8", "--mesh.data", "1", "--batch.pairs", "16"]
    assert plan.main([*arguments, "--device-memory", "40GiB", "--json", str(file)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Compiled for a100:2x4 by JAX's CUDA plugin" in told
    assert "Between the 2 hosts each GPU sends 25.0 GB/s" in told
    (only,) = json.loads(file.read_text())["plans"]
    found = only["estimate"]
    count = models.count_params(small_model(**SIZES))
    assert found["memory"]["params"] == pytest.approx(4 * count / 8, rel=0.01)
    assert found["memory"]["optimizer"] == pytest.approx(found["memory"]["params"], rel=0.01)  # rmsprop's one slot
    assert found["peak_bytes"] < found["memory_limit"] == 40 * 2**30
    assert found["link_seconds"] == pytest.approx(found["sent_bytes"] / (4 * 25e9), rel=0.01)


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_it_takes(capsys):
    large = [*("--topology", "rtx4090:1", "--model", "llama2-7b", "--rows", "1", "--row-tokens", "128")]
    assert plan.main([*large, "--batch.pairs", "1", "--no-largest"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 4])
def test_long_rows_get_the_fused_kernels_and_no_scores_of_all_tokens_by_all(context):
    """Three kernels, forward and backward: what the forward pass gave is kept, not computed again.

    Of rows that four devices share each has a quarter of the queries; they gather keys and values, no hidden states.
    """
    tokens = 4096
    target = target_of("h100:8")
    config = Config(
        model=PolicyConfig(compute_dtype="bfloat16", remat="dots"),
        batch=BatchConfig(pairs=8),
        mesh=MeshConfig(data=1, fsdp=4 // context, context=context, tensor=2),
    )
    model = dataclasses.replace(small_model(**SIZES | {"num_layers": 2}), sliding_windows=(None, 1024))
    batch = BatchShape(8, tokens, 8 * tokens, 4 * tokens, 8 * tokens**2 / 3, "")
    text = compile_step(config, model, target, batch).text
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    program = hlo.parse(text)
    inside = {name for name in program.computations if f"calls=%{name}" in text or f"calls={name}" in text}
    shapes = [
        shape
        for name, computation in program.computations.items()
        if name not in inside
        for instruction in computation.values()
        for shape in hlo.shapes_in(instruction.result)
    ]
    rows, own = 8 * context // 4, tokens // context
    assert (rows, own, 512) in {shape.dims for shape in shapes}, "residual streams are"
    assert not [shape for shape in shapes if shape.dims[-2:] == (own, tokens)]
    gathered = [one.shape for one in hlo.collectives(text, most_trips=1) if one.kind == "all-gather"]
    keys = rows * tokens * (KV_HEADS // 2) * WIDTH // HEADS
    of_tokens = [shape for shape in gathered if shape.bytes // 2 in (keys, rows * tokens * WIDTH)]
    assert {shape.bytes // 2 for shape in of_tokens} == ({keys} if context > 1 else set())


@pytest.mark.slow
def test_experts_multiply_their_own_rows_alone():
    """No array of all rows for each expert, which ragged_dot comes to there; three products in either pass."""
    target = target_of("h100:2")
    config = Config(
        model=PolicyConfig(compute_dtype="bfloat16", remat="none"),
        batch=BatchConfig(pairs=2),
        mesh=MeshConfig(data=1, fsdp=1, expert=2),
    )
    model = small_model(**SIZES | {"family": "qwen3_moe", "num_layers": 2})
    experts = model.parts.experts
    batch = BatchShape(2, TOKENS, 2 * TOKENS, TOKENS, 2 * TOKENS**2 / 3, "")
    text = compile_step(config, model, target, batch).text
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3 * 3  # a product and its two gradients, of three
    of_all_experts = 2 * TOKENS * experts.per_token * experts.count // 2 * min(WIDTH, experts.intermediate_size)
    assert not [
        shape for shape in hlo.shapes_in(text) if shape.dtype == "bf16" and math.prod(shape.dims) >= of_all_experts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("target", "unit"), [("a100-80gb", "mma.sync"), ("h100", "wgmma.mma_async"), ("b200", "tcgen05.mma")]
)
def test_the_attention_s_kernels_spill_nothing_and_multiply_on_tensor_cores(target, head_dim, unit):
    """The backward pass of the widest heads takes Ampere's instructions everywhere: larger blocks would spill."""
    for kernel in gpu_kernels.compile_grouped(target, "bfloat16") if head_dim == 128 else []:
        assert kernel.spilled == 0
        assert kernel.instructions[unit] > 0
        assert 0 < kernel.shared <= CHIPS[target].gpu["shared_memory_per_block"]
    for kernel in gpu_kernels.compile_kernels(target, head_dim, "bfloat16"):
        assert kernel.spilled == 0
        older = head_dim > 128 and kernel.kernel != "forward"
        assert kernel.instructions["mma.sync" if older else unit] > 0
        assert 0 < kernel.shared <= CHIPS[target].gpu["shared_memory_per_block"]


COMMANDS = [words_of(line) for page in PAGES for line in shell_lines(page)]
PLANS = [words[words.index(name) + 1 :] for words in COMMANDS for name in ("plan", "rpo_jax.plan") if name in words]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", PLANS, ids=shlex.join)
def test_the_plans_that_the_documentation_shows_are_made(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert plan.main(["quickstart_sft" if word == "FILE" else word for word in arguments]) == 0
    assert "Compiled for h100:8" in " ".join(capsys.readouterr().out.split())
