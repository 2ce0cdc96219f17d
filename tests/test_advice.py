"""What a run says of its configuration and data before it trains, and doctor says too."""

import numpy as np
import pytest

import rpo_jax
from rpo_jax import doctor
from rpo_jax.config import BatchConfig, Config, DataConfig, LoraConfig, OptimConfig, PolicyConfig
from rpo_jax.config.reading import load_config
from rpo_jax.training.advice import PRESETS, advise
from rpo_jax.training.optimizer import learning_rate_schedule, learning_rates
from tests.runs import preference_rows, settings, write_rows

SCALE = 0.02


def said(steps, draws=1000, adapts=False, **optim):
    lora = LoraConfig(rank=8) if adapts else LoraConfig()
    config = Config(optim=OptimConfig(**optim), lora=lora, model=PolicyConfig(path="model"))
    return [str(advice) for advice in advise(config, draws, steps, SCALE)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rates_are_the_schedule_s(schedule):
    config = OptimConfig(learning_rate=2.0, warmup_steps=3, schedule=schedule)
    each = [float(learning_rate_schedule(config, 9)(step)) for step in range(9)]
    np.testing.assert_allclose(learning_rates(config, 9), each, rtol=1e-6)


def test_the_papers_defaults_on_little_data_are_told():
    """4 steps of 64 pairs at 5e-7 after a warm-up of 150: the rate is 3e-9 at step 1."""
    (line,) = said(4)
    for part in ("4 steps is 1.3e-08, 3% of optim.learning_rate=5e-07", "optim.warmup_steps=150", "nothing"):
        assert part in line
    assert line.endswith("as configs/small_data.yaml does, or train longer")


def test_a_warmup_longer_than_the_run_is_told():
    (line,) = said(31, name="adamw", learning_rate=1e-3)
    assert "31 steps is 0.00021, 21% of optim.learning_rate=0.001" in line
    assert line.endswith("set optim.warmup_steps=3, or train longer")
    assert "nothing" not in line
    assert not said(151, name="adamw", learning_rate=1e-3), "the last step has the whole rate"


@pytest.mark.parametrize(
    ("steps", "optim"),
    [
        (2500, {}),  # the paper: 161,000 pairs
        (470, {"name": "adamw", "learning_rate": 6e-7, "warmup_steps": 47, "schedule": "cosine"}),  # SimPO's
        (48, {"name": "adamw", "learning_rate": 5e-6, "warmup_steps": 5, "schedule": "cosine"}),
        (20, {"name": "lion", "learning_rate": 3e-6, "warmup_steps": 2}),
    ],
)
def test_of_a_run_that_learns_nothing_is_said(steps, optim):
    assert not said(steps, **optim)


def test_a_rate_for_all_weights_is_little_for_lora():
    optim = {"name": "adamw", "learning_rate": 5e-7, "warmup_steps": 10}
    assert not said(300, **optim)
    (line,) = said(300, adapts=True, **optim)
    assert "optim.learning_rate=0.0002" in line
    assert "configs/small_data_lora.yaml" in line


@pytest.mark.parametrize("adapts", [False, True])
def test_the_presets_do_as_is_said(adapts):
    path, rate = PRESETS[adapts]
    config = load_config(path)
    assert config.optim.learning_rate == rate
    assert (config.lora.rank > 0) == adapts
    pairs = 256
    steps = round(config.train.epochs * pairs / config.batch.pairs)
    assert not advise(config, pairs, steps, SCALE)


@pytest.mark.parametrize(("pairing", "what"), [("paired", "pairs"), ("unpaired", "responses of a kind")])
def test_a_batch_larger_than_the_data_is_told(pairing, what):
    optim = OptimConfig(name="adamw", learning_rate=1e-3, warmup_steps=0)
    config = Config(data=DataConfig(pairing=pairing), batch=BatchConfig(pairs=64), optim=optim)
    (line,) = (str(advice) for advice in advise(config, 10, 4, SCALE))
    assert f"batch.pairs=64 is more than the 10 {what} of the training data" in line
    assert "54 of its slots stay empty; set batch.pairs to 10 or less" in line
    assert not advise(config, 64, 4, SCALE)


def test_a_run_and_the_doctor_say_it_before_anything_is_trained(tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(12))
    changes = {
        "data.eval_rows": 2,
        "batch.pairs": 16,
        "train.steps": 3,
        "optim.warmup_steps": 9,
        "objective.name": "dpo",
    }
    given = settings(data, tmp_path / "run", tmp_path / "cache", {**changes, "tracking.tensorboard": False})
    expected = [
        "the highest learning rate of the run's 3 steps is 0.0003, 30% of optim.learning_rate=0.001",
        "batch.pairs=16 is more than the 10 pairs of the training data",
    ]
    doctor.main([f"--{setting}" for setting in given])
    told = " ".join(capsys.readouterr().out.split())
    assert "2 warnings, 0 failed" in told
    assert all(line in told for line in expected)
    rpo_jax.run(rpo_jax.load_config(None, given))
    out = capsys.readouterr().out
    before, compiling, after = out.partition("compiling the step (")
    assert compiling
    assert all(before.count(f"warning: {line}") == 1 for line in expected)
    assert "held-out accuracy tied" in before, "the policy still is its reference"
    assert after.count("compiled the step (") == 1
    assert "warning" not in after
