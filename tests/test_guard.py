"""Numbers that go wrong, put there for real: what a step skips, what a run says, and where it ends."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import rpo_jax
from rpo_jax import export, models, train
from rpo_jax.config import BatchConfig, Config, GuardConfig, LoraConfig, MeshConfig, OptimConfig, PolicyConfig
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.folder import CHECKPOINTS
from rpo_jax.training import step
from rpo_jax.training.diagnosis import Diagnosis
from rpo_jax.training.hooks.guard import FEWEST_NORMS, FILE, NORMS, Guard
from rpo_jax.training.reference import FOLDER, write_cache
from rpo_jax.training.step import build_steps, put_batch
from tests.runs import configured, metric_lines, settings, without_timings, write_rows
from tests.worlds import random_data, small_model

PAIRS, MODEL = 8, small_model()
BAD_ROW = 11  # its second batch holds it
CASES = {
    "one device": ((1, 1, 1), None, 0),
    "eight devices": ((2, 2, 2), None, 0),
    "eight devices, micro-batches": ((2, 2, 2), 8, 0),
    "eight devices, LoRA": ((4, 1, 2), None, 4),
}


class Small:
    """A few steps of a small model, batch by batch in the order of the data; row 11 of it can be spoilt."""

    def __init__(self, shape=(1, 1, 1), micro_rows=None, rank=0, optim="adamw", **changes):
        self.config = Config(
            batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows),
            model=PolicyConfig(path="not read here" if rank else None),
            lora=LoraConfig(rank=rank),
            optim=OptimConfig(name=optim, learning_rate=1e-3, warmup_steps=3, schedule="cosine", **changes),
        )
        self.mesh = sharding.make_mesh(
            MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True))), jax.devices()[: math.prod(shape)]
        )
        self.base = self.host = jax.tree.map(np.asarray, models.init_params(MODEL, jax.random.key(0)))
        with jax.set_mesh(self.mesh):
            self.plain = build_steps(self.config, MODEL, self.mesh, total_steps=8)
            if rank:
                places = sharding.parameter_shardings(self.mesh, models.param_axes(MODEL), self.host)
                self.base = jax.tree.map(jax.device_put, self.host, places)
                self.host = jax.tree.map(np.asarray, lora.init_adapters(MODEL, self.config.lora, jax.random.key(1)))
        self.rank = rank
        self.steps = self.plain.on(self.base) if rank else self.plain

    def batches(self, spoil=False):
        data = random_data(32)
        if spoil:
            log_probs = data.reference_log_probs.copy()
            log_probs[data.of_kind("chosen")[BAD_ROW]] = np.inf
            data = dataclasses.replace(data, reference_log_probs=log_probs)
        return PreferenceBatches(
            data,
            pairs=PAIRS,
            pairing="paired",
            responses=("chosen", "rejected"),
            seed=0,
            order="sequential",
            row_tokens=64,
            rows_multiple=8,
        )

    def state(self, params=None):
        placed = jax.tree.map(jax.device_put, params or self.host, self.steps.state_shardings.params)
        return self.steps.init(placed)

    def run(self, state, batches, numbers, **limit):
        reports = []
        with jax.set_mesh(self.mesh):
            for number in numbers:
                batch = put_batch(self.mesh, batches.batch_at(number))
                state, report = self.steps.train(state, batch, None, **limit)
                reports.append(jax.device_get(report))
        return state, reports

    def explain(self, params, batches, number):
        with jax.set_mesh(self.mesh):
            diagnosis = Diagnosis(self.config, MODEL, self.mesh, self.plain, self.base if self.rank else {})
            params = jax.tree.map(jax.device_put, params, self.steps.state_shardings.params)
            batch = put_batch(self.mesh, batches.batch_at(number))
            return diagnosis.explain(params, None, batch, batches.data), diagnosis.parameters(params)


@pytest.fixture(
    scope="module", params=[pytest.param(x, marks=[pytest.mark.slow] * (x == "eight devices")) for x in CASES]
)
def small(request):
    return Small(*CASES[request.param])


def assert_equal(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, expected)


def moments(state):
    """Two of Adam, with their count."""
    return state.opt_state[1]


def test_a_step_with_an_infinite_reference_log_prob_changes_nothing(small):
    state, _ = small.run(small.state(), small.batches(), [0])
    before = jax.tree.map(np.asarray, state)
    state, (bad, good) = small.run(state, small.batches(spoil=True), [1, 2])
    assert bad["skipped"] == 1
    assert not np.isfinite(bad["loss"])
    assert good["skipped"] == 0
    assert math.isfinite(good["loss"])
    # The same as if the step had only been counted: the next one starts from what there was before it.
    counted = before._replace(step=before.step + 1, opt_state=_with_later_rate(before.opt_state))
    expected, (alone,) = small.run(_placed(small, counted), small.batches(), [2])
    assert_equal(state, expected)
    assert_equal(good, alone)
    assert alone["learning_rate"] == pytest.approx(1e-3 * 3 / 4)


def test_a_skipped_step_leaves_parameters_and_moments(small):
    state, _ = small.run(small.state(), small.batches(), [0])
    before = jax.tree.map(np.asarray, state)
    state, _ = small.run(state, small.batches(spoil=True), [1])
    assert_equal(state.params, before.params)
    assert_equal(moments(state), moments(before))
    assert state.step == before.step + 1


def _with_later_rate(opt_state):
    return (*opt_state[:-1], opt_state[-1]._replace(count=opt_state[-1].count + 1))


def _placed(small, state):
    return jax.tree.map(jax.device_put, state, small.steps.state_shardings)


@pytest.mark.parametrize("optim", [pytest.param("rmsprop", marks=pytest.mark.slow), "adamw"])
def test_where_nothing_is_wrong_the_guard_changes_no_bit(optim, monkeypatch):
    guarded = Small((2, 2, 2), optim=optim)
    with_guard = guarded.run(guarded.state(), guarded.batches(), range(4))
    monkeypatch.setattr(step, "accept_if", lambda _good, new, _old: new)
    bare = Small((2, 2, 2), optim=optim)
    assert_equal(with_guard, bare.run(bare.state(), bare.batches(), range(4)))


def test_a_gradient_over_the_limit_is_skipped():
    small = Small()
    first, (report,) = small.run(small.state(), small.batches(), [0])
    norm = report["grad_norm"]
    for limit, skipped in ((norm, 0), (np.nextafter(norm, np.float32(0)), 1), (np.float32(np.inf), 0)):
        state, (report,) = small.run(small.state(), small.batches(), [0], limit=limit)
        assert report["skipped"] == skipped
        assert_equal(state.params, small.host if skipped else first.params)


def with_nan(params, *path, layer=None):
    """A copy with one number of one array, or of a layer's part of it, NaN."""
    params = jax.tree.map(np.array, params)
    *parents, name = path
    inner = params
    for parent in parents:
        inner = inner[parent]
    (inner[name] if layer is None else inner[name][layer]).flat[-1] = np.nan
    return params


SPOILT = {
    "the token embeddings": ("embed",),
    "layer 0, its attention": ("layers", "attention", "value", "kernel", 0),
    "layer 1, its attention": ("layers", "attention_norm", "scale", 1),
    "layer 0, its MLP": ("layers", "mlp", "gate", "kernel", 0),
    "layer 1, its MLP": ("layers", "mlp", "down", "kernel", 1),
    "the final norm": ("final_norm", "scale"),
    "the output head": ("head",),
}


@pytest.mark.parametrize("place", SPOILT)
def test_the_first_place_that_is_not_finite_is_named(place, plain_small):
    small = plain_small
    *path, last = SPOILT[place]
    layer = last if isinstance(last, int) else None
    path = path if layer is not None else [*path, last]
    params = with_nan(small.host, *path, layer=layer)
    if place == "the token embeddings":  # of a token that the batch has
        params["embed"][...] = np.nan
    told, names = small.explain(params, small.batches(), 0)
    name = ".".join(path[1:]) if path[0] == "layers" else ".".join(path)
    assert names == [name if layer is None else f"layer {layer} {name}"]
    assert told == [
        f"parameters that are not finite: {names[0]}",
        f"first not finite in the forward pass: {place}, of all {PAIRS} rows of the batch",
    ]


@pytest.fixture(scope="module")
def plain_small():
    return Small((2, 2, 2))


def test_numbers_that_overflow_are_found_where_they_do(plain_small):
    """Finite parameters: layer 1 adds what float32 cannot hold."""
    params = jax.tree.map(np.array, plain_small.host)
    for name in ("up", "down"):
        params["layers"]["mlp"][name]["kernel"][1] = 1e30
    told, names = plain_small.explain(params, plain_small.batches(), 0)
    assert not names
    assert told == [f"first not finite in the forward pass: layer 1, its MLP, of all {PAIRS} rows of the batch"]


def test_adapters_and_their_base_are_told_apart():
    small = Small(*CASES["eight devices, LoRA"])
    params = with_nan(small.host, "layers", "attention", "query", "lora_b", layer=1)
    told, names = small.explain(params, small.batches(), 0)
    assert names == ["layer 1 attention.query.lora_b"]
    assert "layer 1, its attention" in told[-1]
    place = ("layers", "mlp", "up", "kernel")
    axes = sharding.parameter_shardings(small.mesh, models.param_axes(MODEL), models.abstract_params(MODEL))
    small.base = jax.tree.map(jax.device_put, with_nan(jax.device_get(small.base), *place, layer=0), axes)
    told, names = small.explain(small.host, small.batches(), 0)
    assert not names
    assert told[0] == "parameters of the base that are not finite: layer 0 mlp.up.kernel"
    assert "layer 0, its MLP" in told[-1]


def test_the_row_of_a_reference_log_prob_is_named(small):
    told, names = small.explain(small.host, small.batches(spoil=True), 1)
    assert not names
    assert told[0] == f"reference log-probs that are not finite: those of made.jsonl:{BAD_ROW + 1}"
    assert told[1] == "every log-prob of the policy is finite, the loss of them is not"
    assert small.explain(small.host, small.batches(), 1)[0] == [
        "on the parameters as they are now, every number of this batch is finite"
    ]


def test_the_median_of_earlier_norms_sets_the_limit():
    guard = Guard(GuardConfig(max_grad_norm_ratio=3.0))
    norms = np.random.default_rng(0).uniform(1, 2, NORMS + 20).astype(np.float32)
    for number, norm in enumerate(norms, start=1):
        limit = guard.limit(number + 1)  # step `number` is not read when the next one is begun
        known = norms[: number - 1][-NORMS:]
        expected = 3.0 * np.median(known) if len(known) >= FEWEST_NORMS else np.inf
        np.testing.assert_allclose(limit, expected, rtol=1e-6)
        assert guard.record(number, {"skipped": 0.0, "grad_norm": norm, "loss": 1.0}, limit, list) is None
    # A resumed run has read every step, and yet asks of no more than the first part had.
    resumed = Guard(GuardConfig(max_grad_norm_ratio=3.0), memory=json.loads(json.dumps(guard.memory())))
    assert resumed.limit(len(norms) + 1) == guard.limit(len(norms) + 1)
    report = {"skipped": 1.0, "grad_norm": np.float32(9.0), "loss": np.float32(1.0)}
    assert "the norm of its gradient is 9, over the limit of 4" in str(guard.record(99, report, np.float32(4), list))


# Whole runs.

RUN = {
    "contrast.weights": "uniform",
    "tracking.tensorboard": False,
    "train.steps": 6,
    "train.save_every": 2,
    "train.keep_best": 0,
    "guard.max_bad_steps": 3,
}


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.data = write_rows(folder / "pairs.jsonl")

    def configured(self, name, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return configured(self.data, self.folder / name, self.cache, {**RUN, **changes})

    def main(self, name, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        words = settings(self.data, self.folder / name, self.cache, {**RUN, **changes})
        return train.main([f"--{word}" for word in words])

    def told(self, name):
        lines = (self.folder / name / FILE).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, name):
        checkpoints = Checkpoints(self.folder / name / CHECKPOINTS, read_only=True)
        steps = checkpoints.steps()
        checkpoints.close()
        return steps

    def spoil_reference(self, rows):
        """The cache's log-probs of chosen responses with these training rows' infinite; all its checksums hold."""
        for path in (self.cache / FOLDER).glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                header, values = dict(file.metadata()), file.get_tensor("log_probs").copy()
            if header["response"] == "chosen" and "train" in header["slot"]:
                del header["sha256"]
                values[rows] = np.inf
                write_cache(path, header, values)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_bad_row_is_skipped_told_and_counted(world, capsys):
    rpo_jax.run(world.configured("good"))
    assert {line["guard/bad_steps"] for line in metric_lines(world.folder / "good") if "loss" in line} == {0}
    assert not (world.folder / "good" / FILE).exists()
    world.spoil_reference([3])
    capsys.readouterr()
    rpo_jax.run(world.configured("bad"))
    said = capsys.readouterr().out
    lines = [line for line in metric_lines(world.folder / "bad") if "loss" in line]
    bad = [line["step"] for line in lines if not math.isfinite(line["loss"])]
    assert len(bad) == len(lines) // 3 == 2, "24 training rows in batches of 8: each is seen every third step"
    assert [line["guard/bad_steps"] for line in lines] == [sum(b <= s for b in bad) for s in range(1, len(lines) + 1)]
    told = world.told("bad")
    assert [line["step"] for line in told] == bad
    assert all(len(line["rows"]) == 8 for line in told)
    common = set(told[0]["rows"]) & set(told[1]["rows"])
    assert any(f"step {bad[0]}  skipped: its loss is" in line for line in said.splitlines())
    assert "2 steps of this run were skipped" in said
    assert common, "the spoilt row is in both"


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting(world):
    rpo_jax.run(world.configured("once"))
    world.spoil_reference([3])
    rpo_jax.run(world.configured("whole"))
    rpo_jax.run(world.configured("parts", train__steps=4))
    rpo_jax.run(world.configured("parts", run__resume="auto"))
    parts, whole = (without_timings(metric_lines(world.folder / name)) for name in ("parts", "whole"))
    # The shorter run evaluated at its end.
    parts = [line for line in parts if line["step"] != 4 or "loss" in line]
    assert json.dumps(parts) == json.dumps(whole)
    assert world.told("parts") == world.told("whole")


def test_a_run_that_only_goes_wrong_stops_with_a_report(world, capsys):
    rpo_jax.run(world.configured("once"))
    world.spoil_reference(list(range(24)))
    capsys.readouterr()
    changes = {"guard__max_bad_steps": 2, "train__steps": 12}
    assert world.main("bad", **changes) == 3
    report = capsys.readouterr().err
    assert "training stopped: 2 steps in a row were skipped, the last of them step 2" in report
    assert "the checkpoint of step" in report
    assert "reference log-probs that are not finite: those of all 8 rows of the batch" in report
    assert len(world.told("bad")[-1]["rows"]) == 8
    # Nothing was saved before: what there is was saved now, is whole, and is where the run started.
    (saved,) = world.steps("bad")
    model = export.export(world.folder / "bad", world.folder / "hf")
    first = models.init_params(models.read_config(model), jax.random.key(0))
    got = models.load_pretrained(model)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-6), got, first)
    # The bad steps are behind it: the run goes on from there, and stops as late again.
    assert world.main("bad", **changes, run__resume="auto") == 3
    assert world.told("bad")[-1]["step"] == saved + 2


@pytest.mark.slow
def test_a_weight_that_is_nan_is_named(world, capsys):
    rpo_jax.run(world.configured("once"))
    folder = export.export(world.folder / "once", world.folder / "hf")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if "layers.1" in name and "up_proj" in name]
    weights[name] = weights[name].copy()
    weights[name][3, 4] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert world.main("bad", model__path=str(folder), reference__mode="none") == 3
    captured = capsys.readouterr()
    assert "parameters that are not finite: layer 1 mlp.up.kernel" in captured.err
    assert "first not finite in the forward pass: layer 1, its MLP, of all 8 rows of the batch" in captured.err
    assert "no checkpoint was saved before" in captured.err
    assert world.steps("bad") == []
    assert any("step 0  not finite: " in line and "eval_loss" in line for line in captured.out.splitlines())


@pytest.mark.slow
def test_a_learning_rate_that_overflows_leaves_the_last_good_checkpoint(world, capsys):
    rpo_jax.run(world.configured("bad", train__steps=2))
    assert world.steps("bad") == [2]
    capsys.readouterr()
    changes = {"run__resume": "auto", "optim__learning_rate": 1e38, "optim__warmup_steps": 0}
    assert world.main("bad", **changes) == 3
    report = capsys.readouterr().err
    assert "the checkpoint of step 2 is whole" in report
    assert "not finite" in report
    assert world.steps("bad") == [2]
    assert rpo_jax.run(world.configured("bad", run__resume="auto")).checkpoint.name == "6"


@pytest.mark.slow
def test_a_spike_of_the_gradient_is_skipped_and_its_limit_told(world, capsys, monkeypatch):
    monkeypatch.setattr("rpo_jax.training.hooks.guard.FEWEST_NORMS", 2)
    changes = {"guard__max_grad_norm_ratio": 1.0001, "train__steps": 12, "guard__max_bad_steps": 20}
    rpo_jax.run(world.configured("tight", **changes))
    told = world.told("tight")
    lines = {line["step"]: line for line in metric_lines(world.folder / "tight") if "loss" in line}
    assert told
    assert all("over the limit of" in line["reason"] for line in told)
    assert all(math.isfinite(lines[line["step"]]["loss"]) for line in told)
    assert lines[12]["guard/bad_steps"] == len(told)
    rpo_jax.run(world.configured("parts", **{**changes, "train__steps": 7}))
    rpo_jax.run(world.configured("parts", **changes, run__resume="auto"))
    assert world.told("parts") == told


def test_the_section_refuses_what_means_nothing():
    for wrong in ("guard.max_bad_steps=0", "guard.max_grad_norm_ratio=1.0", "guard.max_grad_norm_ratio=-2"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            rpo_jax.load_config(None, [wrong])
