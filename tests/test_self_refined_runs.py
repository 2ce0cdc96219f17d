"""Sr-DPO and Sr-IPO in the trainer: pairs scored twice, on any mesh, in micro-batches, with a cached reference."""

import jax
import numpy as np
import pytest
from safetensors import safe_open

import rpo_jax
from rpo_jax import models, train
from rpo_jax.config import BatchConfig, Config, ContrastConfig, DataConfig, MeshConfig, ObjectiveConfig
from rpo_jax.core.records import KINDS, REFINED, PreferenceData
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.hosts import sharding
from rpo_jax.objectives.losses import OBJECTIVES
from rpo_jax.tools.planning.workload import assumed_lengths, planned_batch
from rpo_jax.training.reference import FOLDER, compute_log_probs
from rpo_jax.training.step import build_log_probs, build_steps, put_batch
from tests.data.ragged import changed, embedded, embeddings_of, ids_of, table_of
from tests.runs import configured, metric_lines, settings, write_rows
from tests.worlds import VOCAB, random_data, small_model

PAIRS, BETA, LAMBDA = 8, 0.3, 0.7
MODEL = small_model()


def refined_data():
    data, rng = random_data(), np.random.default_rng(3)
    examples = [
        changed(
            example,
            refined_prompt=np.concatenate([rng.integers(3, VOCAB, 4).astype(np.int32), example.prompt_ids]),
            refined_chosen=ids_of(example, "chosen"),
            refined_rejected=ids_of(example, "rejected"),
        )
        for example in data.examples
    ]
    reference = (-30 + 9 * rng.normal(size=(len(examples), len(KINDS)))).astype(np.float32)
    return embedded(examples, embeddings_of(data, "chosen"), reference=reference)


def scored_plainly(params, mesh, examples):
    """Log-probs of chosen and rejected responses under their own prompts."""
    data = PreferenceData(examples)
    sweep = ReferencePass(data, ("chosen", "rejected"), batch_pairs=PAIRS)
    with jax.set_mesh(mesh):
        log_probs, _ = build_log_probs(Config(), MODEL, mesh)
        found = compute_log_probs(sweep, lambda batch: log_probs(params, put_batch(mesh, batch)), lambda *_: None)
    return table_of(data, found, ("chosen", "rejected"))


def step_of(name, mesh, micro_rows=None, pairing="paired"):
    config = Config(
        data=DataConfig(pairing=pairing),
        objective=ObjectiveConfig(name=name, beta=BETA, sr_lambda=LAMBDA),
        contrast=ContrastConfig(weights="uniform" if pairing == "unpaired" else None),
        batch=BatchConfig(pairs=PAIRS, micro_rows=micro_rows),
    )
    batches = PreferenceBatches(
        refined_data(),
        pairs=PAIRS,
        pairing=pairing,
        responses=OBJECTIVES[name].responses,
        seed=0,
        row_tokens=64,
        rows_multiple=8,
    )
    batch = batches.batch_at(0)
    with jax.set_mesh(mesh):
        built = build_steps(config, MODEL, mesh, total_steps=1)
        params = jax.jit(models.init_params, static_argnums=0)(MODEL, jax.random.key(0))
        placed = jax.tree.map(jax.device_put, params, built.model_shardings)
        found = jax.jit(lambda p, b: built.gradient(p, b, None)[:3])(placed, put_batch(mesh, batch))
    return batches, batch, params, jax.tree.map(np.asarray, found)


def make_mesh(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@pytest.mark.parametrize("name", ["sr_dpo", pytest.param("sr_ipo", marks=pytest.mark.slow)])
def test_the_loss_of_a_batch_is_that_of_its_pairs_scored_one_by_one(name):
    batches, batch, params, (loss, _, _) = step_of(name, make_mesh())
    examples, losses = batches.data.examples, []
    reference = table_of(batches.data, batches.data.reference_log_probs)
    refined = [changed(example, prompt=example.prompts[1]) for example in examples]
    policy = [scored_plainly(params, make_mesh(), of) for of in (examples, refined)]
    assert np.abs(policy[0] - policy[1]).min() > 1e-4
    for index in batch.sides["chosen"].example_index:
        plain, again = (
            policy[which][index] - reference[index, [list(KINDS).index(kind) for kind in kinds]]
            for which, kinds in enumerate((("chosen", "rejected"), REFINED))
        )
        delta, margin = BETA * (again[0] - again[1]), plain[0] - plain[1]
        if name == "sr_dpo":
            losses.append(np.logaddexp(0, -(BETA * margin - LAMBDA * delta)))
        else:
            losses.append((margin - LAMBDA * delta - 1 / (2 * BETA)) ** 2)
    assert len(losses) == PAIRS
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("pairing", ["paired", pytest.param("unpaired", marks=pytest.mark.slow)])
def test_any_mesh_and_micro_batches_give_the_gradient_of_one_device(pairing):
    expected = step_of("sr_dpo", make_mesh(), pairing=pairing)[-1]
    got = step_of("sr_dpo", make_mesh(2, 2, 2), micro_rows=8, pairing=pairing)[-1]
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for one, other in zip(jax.tree.leaves(got[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
def test_a_run_caches_what_the_reference_says_under_refined_prompts(tmp_path, capsys):
    data, changes = (
        write_rows(tmp_path / "pairs.jsonl"),
        {
            "objective.name": "sr_dpo",
            "objective.sr_prompt": "good please:",
            "train.steps": 4,
            "tracking.tensorboard": False,
        },
    )
    rpo_jax.run(configured(data, tmp_path / "run", tmp_path / "cache", changes))
    lines = [line for line in metric_lines(tmp_path / "run") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-4), "the policy is its reference under any prompt"
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = {}
    for path in (tmp_path / "cache" / FOLDER).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            if file.metadata()["slot"].startswith("train"):
                found[file.metadata()["response"]] = file.get_tensor("log_probs")
    assert found.keys() == set(OBJECTIVES["sr_dpo"].responses)
    assert np.abs(found["refined_chosen"] - found["chosen"]).max() > 1e-3
    capsys.readouterr()
    # Another text before the prompts: what does not follow it is not computed again.
    rpo_jax.run(configured(data, tmp_path / "other", tmp_path / "cache", {**changes, "objective.sr_prompt": "bad:"}))
    told = capsys.readouterr().out
    assert "train computed" in told
    assert len(list((tmp_path / "cache" / FOLDER).glob("*.safetensors"))) == 2 * (4 + 2), "train and held_out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.sr_prompt": " "}, "objective.sr_prompt=  must not be empty"),
        ({"objective.sr_prompt": "word " * 200}, "objective.sr_prompt and the prompt take"),
        ({"objective.sr_lambda": -1}, "objective.sr_lambda=-1.0 must be at least 0"),
        ({"objective.name": "dpo", "objective.sr_lambda": 0.5}, "means nothing to objective.name=dpo"),
    ],
)
def test_settings_that_cannot_be_used_are_told_in_one_line(changes, message, tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl")
    arguments = settings(data, tmp_path / "run", tmp_path / "cache", {"objective.name": "sr_dpo", **changes})
    assert train.main([f"--{argument}" for argument in arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


def test_a_plan_counts_every_pair_twice():
    def planned(name):
        config = Config(objective=ObjectiveConfig(name=name), data=DataConfig(max_tokens=512))
        lengths = assumed_lengths(config, 100, 50, None)
        return planned_batch(config, lengths, OBJECTIVES[name].responses, 1, "cpu")

    once, twice = planned("dpo"), planned("sr_dpo")
    assert twice.scored_tokens == 2 * once.scored_tokens
    assert 2 * once.filled_tokens < twice.filled_tokens < 3 * once.filled_tokens
