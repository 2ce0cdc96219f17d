"""Plans without a compiler of the target's own: what is counted, what is found in a program, what a user is told."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rpo_jax import models, plan
from rpo_jax.config import BatchConfig, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig, PolicyConfig
from rpo_jax.hosts import sharding
from rpo_jax.tools.planning import hlo, planner, search, targets, workload
from rpo_jax.tools.planning.arithmetic import StepSizes, step_flops
from rpo_jax.tools.planning.chips import CHIPS
from rpo_jax.tools.planning.compiled import abstract_batch
from rpo_jax.tools.planning.workload import BatchShape, Lengths, assumed_lengths, necessary, planned_batch, step_sizes
from rpo_jax.training import forward
from rpo_jax.training.step import build_steps
from tests.worlds import small_model

SMALL = ["--model.hidden_size", "64", "--model.vocab_size", "512", "--batch.pairs", "16"]
SMALL += [
    "--model.num_layers",
    "1",
    "--model.intermediate_size",
    "128",
    "--data.max_prompt_tokens",
    "16",
    "--data.max_tokens",
    "32",
]
SIZES: dict = {"family": "mixtral", "hidden_size": 64, "num_layers": 1, "intermediate_size": 128}
GPUS = ["--devices", "8", *SMALL, "--mesh.fsdp", "8", "--mesh.data", "1"]


def test_exchanges_are_counted_as_often_as_their_loops_turn():
    """Five layers of [64, 64] in float32, each gathered from eight devices in a loop."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    layers, size = 5, 64
    weights = jax.ShapeDtypeStruct((layers, size, size), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((8, size), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def run(weights, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    text = jax.jit(run, out_shardings=rows.sharding).lower(weights, rows).compile().as_text()
    gathers = [one for one in hlo.collectives(text, most_trips=1) if one.kind == "all-gather"]
    assert [(one.times, one.bytes, one.bounded) for one in gathers] == [(layers, 4 * size**2, False)]
    assert gathers[0].group == tuple(range(8))
    assert gathers[0].in_loop
    assert gathers[0].sent == pytest.approx(4 * size**2 * 7 / 8)


def test_a_loop_whose_end_the_data_decides_takes_the_most_turns_that_it_can():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def run(x, turns):
        total = jax.lax.fori_loop(0, turns, lambda _, y: y + jnp.sum(x * y), jnp.ones(()))
        return jnp.broadcast_to(total, (1,))

    whole = sharding.replicated(mesh)
    turns = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    text = jax.jit(run, out_shardings=whole).lower(x, turns).compile().as_text()
    inside = [one for one in hlo.collectives(text, most_trips=7) if one.bounded]
    assert [(one.kind, one.times) for one in inside] == [("all-reduce", 7)]


# What a loop of a TPU's program looks like: no trip count, a counter that is copied, a body that was doubled.
DOUBLED = """HloModule m
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(256)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %permute = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3
  %done = f32[8]{0:T(256)} collective-permute-done(%permute)
  %last = s32[]{:T(128)} add(%next, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%last, %done)
}
%cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %end = s32[]{:T(128)} constant(12)
  %at = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %end), direction=LT
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(256)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%begin, %a)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%start), condition=%cond, body=%body
  ROOT %b = f32[8]{0:T(256)} get-tuple-element(%loop), index=1
}
"""


def test_turns_are_read_off_a_loop_that_does_not_say_them():
    found = hlo.collectives(DOUBLED, most_trips=100)
    assert [(one.kind, one.times, one.bytes, one.bounded) for one in found] == [("collective-permute", 5, 32, False)]


SCATTERED = """HloModule m
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}
%fused (p: f32[32,8], at: s32[]) -> f32[4,8] {
  %p = f32[32,8]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %whole = f32[32,8]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %own = f32[4,8]{1,0:T(8,128)} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={4,8}
}
ENTRY %main (a: f32[32,8], i: s32[]) -> (f32[4,8], f32[32,8]) {
  %a = f32[32,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %all-reduce-scatter = f32[4,8]{1,0:T(8,128)} fusion(%a, %i), kind=kCustom, calls=%fused
  %kept = f32[32,8]{1,0:T(8,128)} all-reduce(%a), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %out = (f32[4,8]{1,0:T(8,128)}, f32[32,8]{1,0:T(8,128)}) tuple(%all-reduce-scatter, %kept)
}
"""


def test_a_sum_of_which_a_slice_is_kept_is_told_from_one_that_is_kept_whole():
    found = {one.kind: one for one in hlo.collectives(SCATTERED, most_trips=1)}
    size = 4 * 32 * 8
    assert {kind: (one.bytes, one.sent) for kind, one in found.items()} == {
        "reduce-scatter": (size, size * 7 / 8),
        "all-reduce": (size, size * 7 / 4),
    }


@pytest.mark.parametrize(("remat", "micro_rows"), [("none", None), ("attention", None), ("full", None), ("none", 2)])
def test_operations_are_those_that_xla_counts_in_an_unrolled_model(monkeypatch, remat, micro_rows):
    """XLA takes every loop's body once, so layers and micro-batches are unrolled here; the head's chunks cannot be."""
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(forward, "keeps_logits", lambda *_: False)  # as on the accelerators that plans are for
    rows, tokens, pairs = 4, 128, 4
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    model = small_model(**sizes, vocab_size=640)
    config = Config(
        model=PolicyConfig(remat=remat, attention="dense"), batch=BatchConfig(pairs=pairs, micro_rows=micro_rows)
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    batch = BatchShape(rows, tokens, 0, 0, 0, "")
    with jax.set_mesh(mesh):
        steps = build_steps(config, model, mesh, 1)
        packed = abstract_batch(config, steps, mesh, batch)
        counted = steps.train.lower(steps.abstract_state, packed, None).compile().cost_analysis()["flops"]
    micro = rows // (micro_rows or rows)
    chunk = rows * tokens // micro  # XLA sees one full chunk and one of the rest's, an eighth, of each micro-batch
    step = StepSizes(
        rows=rows,
        row_tokens=tokens,
        scored_tokens=micro * (chunk + -(-chunk // 8)),
        seen_pairs=rows * tokens**2,
        micro_batches=micro,
        remat=remat,
        fused_attention=False,
        compute_bytes=4,
    )
    assert step_flops(model, step) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize(
    ("attention", "platform", "times"),
    [
        ("dense", "cpu", 2.0),
        ("blockwise", "cpu", 2.5),  # the scores again
        ("cudnn", "gpu", 2.5),
        ("fused", "gpu", 3.5),  # in two kernels, and do v^T again too
        ("splash", "tpu", 3.5),
        ("auto", "gpu", 3.5),  # of rows this long
    ],
)
def test_attention_is_counted_as_often_as_its_backward_pass_multiplies(attention, platform, times):
    model = small_model(hidden_size=64)
    config = Config(model=PolicyConfig(attention=attention, compute_dtype="bfloat16", remat="none"))
    step = step_sizes(config, model, BatchShape(2, 2048, 4096, 1000, 1e6, ""), platform)
    of_attention = step_flops(model, step) - step_flops(model, replace(step, seen_pairs=0))
    forward = 4 * model.num_layers * model.num_heads * model.head_dim * step.seen_pairs
    assert of_attention == pytest.approx((1 + times) * forward)


@pytest.mark.parametrize("rank", [0, 16])
def test_no_more_is_necessary_than_is_done(rank):
    """Of rows without padding: adapters need no gradients of the matrices below them."""
    model, path = small_model(hidden_size=256, intermediate_size=512), "base" if rank else None
    config = Config(
        model=PolicyConfig(path=path, remat="none"),
        lora=LoraConfig(rank=rank),
        data=DataConfig(max_prompt_tokens=16, max_tokens=72),
        batch=BatchConfig(pairs=8),
    )
    lengths = assumed_lengths(config, None, None, None)
    batch = planned_batch(config, lengths, ("chosen", "rejected"), 1, "cpu")
    assert batch.filled_tokens == batch.rows * batch.row_tokens
    share = necessary(model, config, lengths, ("chosen", "rejected")) / step_flops(
        model, step_sizes(config, model, batch, "cpu")
    )
    assert 0.75 < share < 1  # logits are computed twice


def test_lengths_of_a_file_are_cut_as_training_cuts(tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text("[[900, 500, 500], [20, 30, 4], [400, 200, 8]]")
    lengths = assumed_lengths(Config(data=DataConfig(max_prompt_tokens=256, max_tokens=512)), None, None, file)
    assert lengths.tokens == [[256, 256, 256], [20, 30, 4], [256, 200, 8]]
    assert "3 pairs of" in lengths.source
    assert "2 of them cut to data.max_tokens=512" in lengths.source


def test_the_batch_has_the_shape_that_the_loader_gives_it():
    config = Config(data=DataConfig(max_prompt_tokens=16, max_tokens=32), batch=BatchConfig(pairs=16))
    lengths = assumed_lengths(config, None, None, None)
    assert list(lengths.tokens[0]) == [16, 16, 16]
    batch = planned_batch(config, lengths, ("chosen", "rejected"), 8, "tpu")
    assert (batch.rows, batch.row_tokens) == (8, 128)  # two examples of 48 tokens to a row
    assert batch.filled_tokens == 16 * 48
    assert batch.scored_tokens == 16 * 32
    of_file = Lengths([[4, 2, 3], [2, 1, 5]], "")
    few = planned_batch(replace(config, batch=BatchConfig(pairs=2)), of_file, ("chosen", "rejected"), 1, "tpu")
    assert (few.filled_tokens, few.scored_tokens) == (17, 11)


def test_known_models_have_their_published_sizes():
    counted = {name: models.count_params(workload.known_model(name)) for name in workload.KNOWN_MODELS}
    assert counted["llama2-7b"] == 6_738_415_616
    assert counted["llama2-13b"] == 13_015_864_320
    assert counted["llama2-70b"] == 68_976_648_192
    assert counted["mistral-7b"] == 7_241_732_096
    assert counted["llama3-8b"] == 8_030_261_248
    assert counted["llama3-70b"] == 70_553_706_496
    assert counted["gemma-3-27b"] == 27_009_346_304  # its text
    assert counted["qwen3-30b-a3b"] == 30_532_122_624
    assert counted["mixtral-8x7b"] == 46_702_792_704
    assert counted["gpt-oss-20b"] == 20_914_757_184


@pytest.fixture
def devices_here(monkeypatch):
    """Plans are compiled for the tests' own devices: what is asked of them needs no compiler of another kind."""

    def target(topology, memory=None):
        devices = jax.devices()[: int(topology.partition(":")[2])]
        return targets.Target(topology, CHIPS["h100"], tuple(devices), memory or 80e9, "cpu")

    monkeypatch.setattr(planner, "target_of", target)


@pytest.mark.usefixtures("devices_here")
def test_what_does_not_fit_is_planned_in_micro_batches(tmp_path, capsys):
    file = tmp_path / "plan.json"
    rows = ["--rows", "64", "--row-tokens", "256", "--model.attention", "dense"]
    whole = replace_memory(tmp_path, rows)
    assert plan.main([*GPUS, *rows, "--device-memory", f"{whole - 1}MB", "--json", str(file)]) == 0
    assert "as configured it does not fit" not in capsys.readouterr().err
    written = json.loads(file.read_text())
    assert not written["plans"][0]["estimate"]["fits"]
    fitting = [one for one in written["plans"] if one["estimate"]["fits"]]
    assert fitting[0]["micro_rows"] in (8, 16, 32)
    assert written["largest_micro_batch"].startswith(f"{fitting[0]['micro_rows']} rows")


def replace_memory(tmp_path, rows) -> int:
    """Megabytes that the whole batch takes."""
    file = tmp_path / "whole.json"
    assert plan.main([*GPUS, *rows, "--no-largest", "--json", str(file)]) == 0
    return json.loads(file.read_text())["plans"][0]["estimate"]["peak_bytes"] // 10**6


@pytest.mark.usefixtures("devices_here")
def test_experts_that_devices_share_are_planned(tmp_path, capsys):
    """Each of four devices holds two of eight experts; what they gather is tokens and a layer's own experts."""
    mixture = [*SMALL, "--model.family", "mixtral", "--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.expert", "4"]
    arguments = ["--devices", "8", *mixture, "--no-largest", "--json", str(tmp_path / "plan.json")]
    assert plan.main([*arguments, "--model.router_aux_loss_coef", "0.01"]) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    (found,) = (one["estimate"] for one in plans)
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert plans[0]["mesh"] == [1, 2, 4, 1]
    assert found["surprises"] == []
    model = models.configured(PolicyConfig(**SIZES), 512, 32)
    # Experts over both axes, and all that is no vector over both as if they were one.
    assert found["memory"]["params"] < 1.1 * 4 * models.count_params(model) / 8
    capsys.readouterr()
    assert plan.main(["--devices", "6", *mixture[:-1], "3", "--batch.pairs", "12"]) == 2
    assert (
        "mesh.expert=3 does not divide the 8 experts of the mixtral model; use one of 1, 2, 4, 8."
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("devices_here")
def test_rows_that_devices_share_are_planned(tmp_path, capsys):
    """Every device has a part of each row, and of all parameters; keys are gathered, and nothing larger."""
    arguments = ["--devices", "8", *SMALL, "--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.context", "4"]
    rows = ["--rows", "2", "--row-tokens"]
    assert plan.main([*arguments, *rows, "1024", "--no-largest", "--json", str(tmp_path / "plan.json")]) == 0
    (found,) = (one["estimate"] for one in json.loads((tmp_path / "plan.json").read_text())["plans"])
    assert found["mesh"] == {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
    assert found["surprises"] == []
    model = models.configured(PolicyConfig(**SIZES), 512, 32)
    assert found["memory"]["params"] < 1.1 * 4 * models.count_params(model) / 8
    capsys.readouterr()
    assert plan.main([*arguments, *rows, "1000"]) == 2
    assert "--row-tokens 1000 must be a multiple of 512" in capsys.readouterr().err


def test_a_kernel_whose_library_is_not_here_is_planned_as_one_that_is_as_sparing(monkeypatch):
    target = targets.Target("h100:1", CHIPS["h100"], tuple(jax.devices()[:1]), 80e9, "gpu")
    monkeypatch.setattr(planner, "target_of", lambda topology, memory: target)
    config = Config(model=PolicyConfig(attention="cudnn", compute_dtype="bfloat16"))
    made = planner.make_planner(config, planner.PlanOptions(topology="h100:1"))
    assert made.config.model.attention == "blockwise"
    assert made.attention.startswith("blockwise, in place of cudnn")


def test_meshes_divide_what_they_split():
    config = Config(batch=BatchConfig(pairs=16))
    found = search.meshes(config, small_model(num_heads=4, num_kv_heads=2), 8)
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 8 for mesh in found)
    assert {mesh.tensor for mesh in found} == {1, 2, 4}
    assert found[0] == MeshConfig(data=1, fsdp=8, tensor=1)
    shared = replace(config, mesh=MeshConfig(expert=4))
    assert {mesh.data * mesh.fsdp * mesh.tensor for mesh in search.meshes(shared, small_model(), 8)} == {2}
    with pytest.raises(ValueError, match=r"give mesh\.expert a number of its own"):
        search.meshes(replace(config, mesh=MeshConfig(data=1, expert=-1)), small_model(), 8)
    long = replace(config, mesh=MeshConfig(context=4))
    assert {mesh.data * mesh.fsdp * mesh.tensor for mesh in search.meshes(long, small_model(), 8)} == {2}
    assert search.micro_sizes(64, 8) == [32, 16, 8]
    assert search.micro_sizes(24, 8) == [16, 8]


def test_a_micro_batch_that_is_known_to_fit_is_among_those_tried():
    def compile_one(config):
        rows = config.batch.micro_rows or 24
        return SimpleNamespace(fits=rows <= 8, peak_bytes=rows, memory_limit=8)

    known = search.with_micro_rows(Config(), 8)
    largest, tried = search.largest_micro_batch(compile_one, search.judged(known, compile_one(known)), 24, 1)
    assert largest.config.batch.micro_rows == 8
    assert [trial.config.batch.micro_rows for trial in tried] == [None, 12, 8]


def test_state_is_the_optimizer_s_own():
    """Adafactor has rows and columns where RMSprop has another copy of the weights."""
    model, mesh = small_model(hidden_size=512, intermediate_size=512), MeshConfig(data=1, fsdp=2, tensor=1)
    rmsprop, adafactor, adamw = (
        search.least_bytes(Config(optim=OptimConfig(name=name)), model, mesh) / (2 * models.count_params(model))
        for name in ("rmsprop", "adafactor", "adamw")
    )
    assert (rmsprop, adamw) == pytest.approx((3, 4), abs=0.01)
    assert 2 < adafactor < 2.2


def test_float32_has_a_peak_of_its_own():
    """As the makers' pages have it for GPUs: 67 and 19.5 TFLOP/s of H100 and A100."""
    for name, teraflops in (("h100", 67), ("a100-80gb", 19.5), ("l40s", 91.6), ("v5p", 459 / 6)):
        assert CHIPS[name].rate("float32") == pytest.approx(teraflops * 1e12, rel=0.01)
    assert CHIPS["h100"].rate("bfloat16") == 989e12


@pytest.mark.slow
@pytest.mark.usefixtures("devices_here")
def test_a_search_ranks_what_fits_before_what_does_not(tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--devices", "2", *SMALL, "--search", "--json", str(file)]
    assert plan.main(arguments) == 0
    plans = json.loads(file.read_text())["plans"]
    assert {tuple(one["mesh"]) for one in plans} == {(1, 2, 1), (2, 1, 1), (1, 1, 2)}
    assert {one["remat"] for one in plans} == {"none", "dots"}
    fitting = [one["estimate"] for one in plans if one["estimate"]["fits"]]
    places = [(float(f"{one['seconds_serial']:.3g}"), one["peak_bytes"]) for one in fitting]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        (["--topology", "v9:2x2"], "v5e: 1x1, 2x2, 2x4"),
        (["--topology", "v5e"], "give a generation and its layout"),
        (["--topology", "h10:8"], "--topology h10:8 is not known, the nearest is h100"),
        (["--topology", "H100:8"], "the nearest is h100"),
        (["--topology", "h100"], "give a GPU and how many, as h100:8"),
        (["--topology", "h100:2x2x2"], "give a GPU and how many, as h100:8"),
        (["--topology", "h100:0"], "give a GPU and how many, as h100:8"),
        (["--topology", "h100:12"], "12 GPUs are no hosts of 8"),
        (["--topology", "h100:8", "--chip", "h200"], "--chip goes with --devices"),
        (["--topology", "v5e:2x4", "--device-memory", "80GiB"], "--device-memory goes with GPUs"),
        (["--devices", "8", "--chip", "a10"], "--topology a10:8 is not known, the nearest is a100"),
        (["--devices", "-1"], "give a GPU and how many, as h100:8"),
        (["--devices", "8", "--device-memory", "80"], "is no size"),
        (["--devices", "8", "--device-memory", "0GiB"], "is no size"),
        ([], "one of --topology (h100:8, v5p:4x4x4) and --devices (a number of GPUs)"),
    ],
)
def test_devices_that_there_are_not_are_told_in_one_line(devices, told, capsys):
    assert plan.main([*devices, *SMALL]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh.fsdp", "3"], "do not multiply to the 8 devices"),
        (["--batch.pairs", "12"], "batch.pairs=12 is not divisible by the 8 shards"),
        (["--model", "llama9"], "--model llama9 is not known"),
        (["--model.path", "nowhere"], "is no folder with a config.json"),
        (["--lengths", "nowhere.json"], "--lengths nowhere.json"),
        (["--rows", "8"], "belong together"),
        (["--rows", "9", "--row-tokens", "64"], "must be a multiple of 8"),
        (["--prompt-tokens", "40"], "at most data.max_tokens=32"),
    ],
)
@pytest.mark.usefixtures("devices_here")
def test_what_cannot_be_planned_is_told_in_one_line(arguments, told, capsys):
    assert plan.main([*GPUS, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({}, "--topology h100:8 needs JAX's CUDA plugin, which compiles for GPUs without one: pip install"),
        ({"jax-cuda13-plugin": "0.0.1"}, "needs JAX's CUDA plugin"),
        (
            {"jax-cuda13-plugin": "0.0.1", "jax-cuda13-pjrt": "0.0.1"},
            f"jax-cuda13-plugin 0.0.1 and jax-cuda13-pjrt 0.0.1 cannot be used by jaxlib {jaxlib.__version__}",
        ),
    ],
)
def test_a_compiler_that_is_missing_or_belongs_to_another_jax_is_told_before_anything_compiles(
    installed, told, monkeypatch, capsys
):
    version = targets.metadata.version

    def of(name):
        if not name.startswith("jax-cuda"):
            return version(name)
        if name not in installed:
            raise targets.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(targets.metadata, "version", of)
    assert plan.main(["--topology", "h100:8", *SMALL]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert f"jax-cuda13-plugin=={jaxlib.__version__}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "layout"),
    [("h100:1", (1, 1)), ("h100:8", (1, 8)), ("h100:64", (8, 8)), ("a100:4x8", (4, 8)), ("rtx4090:2x1", (2, 1))],
)
def test_gpus_beyond_a_host_s_eight_are_hosts_of_eight(topology, layout):
    assert targets.gpu_layout(topology) == layout


def test_what_crosses_hosts_goes_at_the_rate_of_their_network_cards():
    """Two hosts of eight: NVLink within; a ring through both is as fast as its members' cards in each."""
    target = targets.Target("h100:2x8", CHIPS["h100"], tuple(range(16)), 80e9, "gpu", hosts=2)
    link, card = CHIPS["h100"].link_rate, CHIPS["h100"].network_rate
    assert card == 50e9
    assert target.link_rate(tuple(range(8, 16))) == link
    assert target.link_rate((3, 11)) == card
    assert target.link_rate((2, 3, 10, 11)) == 2 * card
    assert target.link_rate(()) == target.link_rate(tuple(range(16))) == min(link, 8 * card)
    tpus = targets.Target("v5p:2x2x2", CHIPS["v5p"], tuple(range(8)), 95e9, "tpu")
    assert tpus.link_rate((0, 7)) == CHIPS["v5p"].link_rate
