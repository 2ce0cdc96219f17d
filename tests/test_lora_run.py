"""LoRA in the step and in whole runs: any mesh, any reference, stopped and resumed, and what is refused."""

import dataclasses
import hashlib
import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

import rpo_jax
from rpo_jax import export, models, train
from rpo_jax.config import BatchConfig, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig, PolicyConfig
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import lora, quantization, recompute
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.tracking import MetricsLog
from rpo_jax.training.step import build_steps, put_batch
from tests.runs import configured, metric_lines, settings, without_timings, write_rows
from tests.worlds import quantized, random_data, small_model

PAIRS, STEPS = 16, 3
MODEL = small_model()
EXPERTS = small_model(family="mixtral", hidden_size=64, intermediate_size=128)  # which blocks of 64 divide
LORA = LoraConfig(rank=4, alpha=16.0)


def step_config(
    pairing="paired",
    micro_rows=None,
    remat="none",
    base_dtype="float32",
    mode="cached",
    attention="auto",
    row_tokens=64,
    targets=LORA.targets,
) -> Config:
    return Config(
        data=DataConfig(pairing=pairing),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows, row_tokens=row_tokens),
        model=PolicyConfig(path="not read here", remat=remat, attention=attention),
        lora=dataclasses.replace(LORA, base_dtype=base_dtype, targets=targets),
        reference=dataclasses.replace(Config().reference, mode=mode),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=0),
    )


def place(tree, axes, shapes, mesh):
    return jax.tree.map(jax.device_put, tree, sharding.parameter_shardings(mesh, axes, shapes))


def train_steps(config: Config, shape=(1, 1, 1), model=MODEL):
    """Metrics of a few steps from the same base and adapters; the base must come out as it went in."""
    mesh = sharding.make_mesh(
        MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True))), jax.devices()[: np.prod(shape)]
    )
    # The same rows on every mesh.
    batches = PreferenceBatches(
        random_data(),
        pairs=PAIRS,
        pairing=config.data.pairing,
        responses=("chosen", "rejected"),
        seed=0,
        row_tokens=config.batch.row_tokens,
        rows_multiple=8,
    )
    params = jax.tree.map(np.asarray, models.init_params(model, jax.random.key(0)))
    dtype = config.lora.base_dtype
    rounded = dtype in quantization.ROUNDED
    host = quantized(model, params, dtype) if rounded else jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with jax.set_mesh(mesh):
        base = place(host, lora.base_axes(model, dtype), lora.abstract_base(model, dtype), mesh)
        steps = build_steps(config, model, mesh, total_steps=STEPS).on(base)
        init = jax.jit(lora.init_adapters, static_argnums=(0, 1), out_shardings=steps.state_shardings.params)
        state, reports = steps.init(init(model, config.lora, jax.random.key(1))), []
        for step in range(STEPS):
            state, report = steps.train(state, put_batch(mesh, batches.batch_at(step)), None)
            reports.append({name: float(value) for name, value in report.items()})
    jax.tree.map(lambda before, after: np.testing.assert_array_equal(before, np.asarray(after)), host, base)
    return reports, state


CASES = {
    "paired": {},
    "micro-batches": {"micro_rows": 8, "remat": "full"},
    "unpaired int8": {"pairing": "unpaired", "base_dtype": "int8", "remat": "attention"},
    "nf4 experts": {"base_dtype": "nf4", "remat": "full", "targets": ("q_proj", "o_proj")},
    "bfloat16, adapters off as reference": {"base_dtype": "bfloat16", "mode": "adapter", "micro_rows": 8},
    "by blocks": {"attention": "blockwise", "row_tokens": 192, "remat": "dots"},
}


LONGER = ("unpaired int8", "nf4 experts", "by blocks", "bfloat16, adapters off as reference")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONGER)) for case in CASES])
def test_any_mesh_gives_the_losses_of_one_device(case, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 16)
    config = step_config(**CASES[case])
    model = EXPERTS if "experts" in case else MODEL
    (one, _), (eight, state) = (train_steps(config, shape, model) for shape in ((1, 1, 1), (2, 2, 2)))
    for name in ("loss", "grad_norm", "rewards/margins"):
        got, expected = ([report[name] for report in found] for found in (eight, one))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({report["loss"] for report in one}) == STEPS, "training must change the loss"
    a = state.params["layers"]["attention"]["query"]["lora_a"]
    b = state.params["layers"]["attention"]["query"]["lora_b"]
    assert tuple(a.sharding.spec) == (None, "fsdp", None)
    assert tuple(b.sharding.spec) == (None, None, "tensor", None)


def test_micro_batches_are_exact():
    whole, split = (train_steps(step_config(**CASES[case]))[0] for case in ("paired", "micro-batches"))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in split], [r[name] for r in whole], rtol=1e-5)


def test_the_gradient_and_the_optimizer_hold_adapters_only():
    """No more state than adapters, and none of the work of the base's gradient, a third of a step's."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = step_config()
    wide = small_model(hidden_size=64, intermediate_size=256, num_layers=1)
    with jax.set_mesh(mesh):
        steps = build_steps(config, wide, mesh, total_steps=1)
        whole = build_steps(dataclasses.replace(config, lora=LoraConfig()), wide, mesh, total_steps=1)
        batches = PreferenceBatches(random_data(), pairs=PAIRS, responses=("chosen", "rejected"), seed=0, row_tokens=64)
        batch = put_batch(mesh, batches.batch_at(0))

        def flops(train, state, *rest):
            return train.lower(state, batch, None, *rest).compile().cost_analysis()["flops"]

        ours = flops(steps.train, steps.abstract_state, models.abstract_params(wide))
        assert ours < 0.8 * flops(whole.train, whole.abstract_state)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(lora.abstract_adapters(wide, LORA)))
    assert sum(leaf.size for leaf in jax.tree.leaves(steps.abstract_state)) == 2 * adapters + 2  # rmsprop, two counters


def test_the_head_s_gradient_is_not_computed():
    """It would be the largest product of a LoRA step, and nobody asks for it."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    wide = small_model(vocab_size=1024)
    batches = PreferenceBatches(random_data(), pairs=PAIRS, responses=("chosen", "rejected"), seed=0, row_tokens=64)

    def products(config, *base) -> int:
        with jax.set_mesh(mesh):
            steps = build_steps(config, wide, mesh, total_steps=1)
            lowered = steps.train.lower(steps.abstract_state, put_batch(mesh, batches.batch_at(0)), None, *base)
        return len(re.findall(r"f32\[32,1024\]\S* dot\(", lowered.compile().as_text()))

    assert products(dataclasses.replace(step_config(), lora=LoraConfig())) > 0
    assert products(step_config(), models.abstract_params(wide)) == 0


class World:
    """Preference data, a base that a short run left, and runs of LoRA on it."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.data = write_rows(folder / "pairs.jsonl")
        base = {"train.steps": 2, "objective.name": "sft", "tracking.tensorboard": False}
        base |= {"model.hidden_size": 64, "model.intermediate_size": 128}  # which blocks of 64 divide
        rpo_jax.run(configured(self.data, folder / "sft", self.cache, base))
        self.base = export.export(folder / "sft", folder / "base")

    def changes(self, **changes):
        own = {"lora.rank": 4, "contrast.weights": "uniform", "tracking.tensorboard": False, "train.steps": 4}
        return {**own, "model.path": self.base, **{key.replace("__", "."): value for key, value in changes.items()}}

    def run(self, name, **changes):
        return rpo_jax.run(configured(self.data, self.folder / name, self.cache, self.changes(**changes)))

    def refusal(self, capsys, name, **changes):
        arguments = settings(self.data, self.folder / name, self.cache, self.changes(**changes))
        assert train.main([f"--{argument}" for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    def lines(self, name):
        return without_timings(metric_lines(self.folder / name))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world):
    return world.run("finished", train__save_every=2)


def adapters_of(world, name):
    checkpoints = Checkpoints(world.folder / name / "checkpoints", read_only=True)
    model_config = models.read_config(world.base)
    adapters = checkpoints.restore_params(checkpoints.latest_step(), lora.abstract_adapters(model_config, LORA))
    checkpoints.close()
    return model_config, adapters


def test_a_run_learns_and_its_checkpoint_holds_adapters_alone(world, finished):
    before = hashlib.sha256((world.base / "model.safetensors").read_bytes()).hexdigest()
    assert finished.initial_metrics["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert finished.metrics["eval_rewards/accuracies"] > 0.9
    assert finished.metrics["eval_loss"] < finished.initial_metrics["eval_loss"]
    item = json.loads((finished.checkpoint / "state" / "_METADATA").read_text(encoding="utf-8"))
    leaves = set(item["tree_metadata"])
    assert any("lora_a" in leaf for leaf in leaves)
    assert not any("kernel" in leaf or "embed" in leaf or "head" in leaf for leaf in leaves)
    assert hashlib.sha256((world.base / "model.safetensors").read_bytes()).hexdigest() == before


class Killed(BaseException):
    """Stands for the signal that ends a run between two lines of its metrics."""


@pytest.mark.slow
def test_stopped_and_resumed_equals_never_stopped(world, finished, monkeypatch):
    write = MetricsLog.write

    def stopping(self, metrics):
        if metrics["step"] == 3:
            raise Killed
        write(self, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        with pytest.raises(Killed):
            world.run("stopped", train__save_every=2)
    # The base is known by its weights, wherever it lies.
    moved = shutil.copytree(world.base, world.folder / "moved")
    world.run("stopped", train__save_every=2, run__resume="auto", model__path=moved)
    assert world.lines("stopped") == world.lines("finished")
    got, expected = (adapters_of(world, name)[1] for name in ("stopped", "finished"))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "int8"])
def test_cached_live_and_adapter_references_agree(world, base_dtype):
    found = {}
    for mode in ("cached", "live", "adapter"):
        name = f"{mode} {base_dtype}"
        result = world.run(name, reference__mode=mode, lora__base_dtype=base_dtype, train__steps=2)
        # The reference of a rounded base is rounded alike: against the weights that it was made of it would be 1e-2.
        for metric in ("chosen", "rejected", "margins"):
            assert result.initial_metrics[f"eval_rewards/{metric}"] == pytest.approx(0.0, abs=1e-6)
        found[mode] = world.lines(name)
    assert found["cached"][-1]["eval_rewards/margins"] > 0
    for mode in ("live", "adapter"):
        for line, cached in zip(found[mode], found["cached"], strict=True):
            assert line == pytest.approx(cached, rel=1e-5, abs=1e-5)


def logits_in_torch(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


TOKENS = np.random.default_rng(0).integers(6, 256, (2, 12))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_exports_give_the_policy_s_logits(world, finished):
    model_config, adapters = adapters_of(world, "finished")
    params = lora.combine(models.load_pretrained(world.base)[1], adapters, LORA)
    expected = np.asarray(models.apply(model_config, params, TOKENS))
    run_dir = str(finished.run_dir)
    assert export.main(["--run", run_dir, "--out", str(world.folder / "merged")]) == 0
    assert export.main(["--run", run_dir, "--out", str(world.folder / "adapter"), "--adapter"]) == 0
    for name in ("merged", "adapter"):
        np.testing.assert_allclose(logits_in_torch(world.folder / name, TOKENS), expected, atol=1e-4)
        assert transformers.AutoTokenizer.from_pretrained(world.folder / name).chat_template
    assert not np.allclose(logits_in_torch(world.base, TOKENS), expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_adapters_of_a_rounded_base_are_merged_into_the_weights_that_it_was_made_of(world, dtype):
    changes = {"lora__base_dtype": dtype, "lora__targets": "[q_proj,down_proj]"}
    world.run(dtype, **changes, train__steps=1)
    if dtype == "nf4":
        world.run("nf4 whole", **changes, train__steps=2)
        world.run(dtype, **changes, train__steps=2, run__resume="auto")
        assert world.lines(dtype)[-1] == world.lines("nf4 whole")[-1]
    merged, adapter = (
        logits_in_torch(export.export(world.folder / dtype, world.folder / f"{dtype} {x}", adapter=x), TOKENS)
        for x in (False, True)
    )
    np.testing.assert_allclose(merged, adapter, atol=1e-4)


def test_an_export_needs_the_run_s_own_base(world, finished, capsys):
    def said(run_dir, *options):
        arguments = ["--run", run_dir, "--out", world.folder / "out", *options]
        assert export.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    capsys.readouterr()
    hidden = world.base.rename(world.folder / "hidden")
    try:
        assert "--base" in said(finished.run_dir)
        given = export.export(finished.run_dir, world.folder / "from hidden", base=str(hidden))
        assert (given / "model.safetensors").is_file()
        other = export.export(world.folder / "sft", world.folder / "other", dtype="bfloat16")
        assert "are not those that the adapters" in said(finished.run_dir, "--base", other)
    finally:
        hidden.rename(world.base)
    assert "no LoRA run" in said(world.folder / "sft", "--adapter")
    assert not (world.folder / "out").exists()


def test_a_resume_needs_the_run_s_own_base_and_adapters(world, finished, capsys):
    shutil.copytree(finished.run_dir, world.folder / "again")
    other = shutil.copytree(world.base, world.folder / "other base")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    resumed = {"run__resume": "auto"}
    message = world.refusal(capsys, "again", **resumed, model__path=other)
    assert str(world.base) in message
    assert str(other) in message
    for key, value, before in (("rank", 8, 4), ("alpha", 8.0, 16.0), ("base_dtype", "int8", "float32"), ("rank", 0, 4)):
        assert f"lora.{key}={before}, not {value}" in world.refusal(
            capsys, "again", **resumed, **{f"lora__{key}": value}
        )
    assert "lora.targets" in world.refusal(capsys, "again", **resumed, lora__targets="[q_proj]")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora__rank": -1}, "lora.rank=-1"),
        ({"lora__alpha": 0}, "lora.alpha=0"),
        ({"lora__targets": "[q_proj,w_proj]"}, "lora.targets"),
        ({"lora__targets": "[q_proj,q_proj]"}, "each at most once"),
        ({"lora__targets": "[]"}, "lora.targets"),
        ({"lora__base_dtype": "fp4"}, "lora.base_dtype"),
        ({"lora__rank": 0, "lora__base_dtype": "int8"}, "lora.base_dtype=int8"),
        ({"lora__rank": 0, "reference__mode": "adapter"}, "lora.rank=0"),
        ({"reference__mode": "adapter", "reference__path": "elsewhere"}, "reference.path=elsewhere"),
        ({"model__path": "null"}, "model.path"),
    ],
)
def test_a_section_that_means_nothing_is_refused(world, capsys, changes, named):
    assert named in world.refusal(capsys, "refused", **changes)
    assert not (world.folder / "refused").exists()
