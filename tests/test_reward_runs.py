"""Runs of a reward model: what they learn, and exports that transformers and our scorer read alike."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import rpo_jax
from rpo_jax import export, models, sample, train
from rpo_jax.core.records import PreferenceExample, Response
from rpo_jax.data.tokenize import TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import load_tokenizer, padding_id
from rpo_jax.sampling.policy import restored
from rpo_jax.tools.judging.local import RewardJudge
from tests.runs import configured, metric_lines, preference_rows, settings, write_rows

STEPS = 6


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        rows = [{**row, "gap": 0.25 * (i % 3)} for i, row in enumerate(preference_rows())]
        self.data = write_rows(folder / "pairs.jsonl", rows)

    def changes(self, more):
        common = {"objective.name": "reward", "train.steps": STEPS, "tracking.tensorboard": False}
        return {**common, "optim.learning_rate": 1e-2, "optim.warmup_steps": 0, **more}

    def run(self, name, more):
        run = rpo_jax.run(configured(self.data, self.folder / name, self.cache, self.changes(more)))
        assert export.main(["--run", str(run.run_dir), "--out", str(self.folder / f"{name}-hf")]) == 0
        return run, self.folder / f"{name}-hf"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world):
    return world.run("reward", {"data.margin": "gap", "data.template": "chat"})


PAIRS = [(row["prompt"], row[kind]) for row in preference_rows(4) for kind in ("chosen", "rejected")]


def scores_of_checkpoint(run, folder):
    """What the checkpoint says of the pairs, each alone in a row; and their token ids."""
    model_config = models.read_config(run.run_dir / "model")
    params = restored(run.run_dir, STEPS, models.Policy(model_config), ("reward",))
    kernel, tokenizer = params.pop("reward")["kernel"], load_tokenizer(folder)
    examples = [
        PreferenceExample(str(number), prompt, (Response("chosen", response),))
        for number, (prompt, response) in enumerate(PAIRS)
    ]
    found, scores = [], []
    for one in tokenize_examples(examples, tokenizer, TokenLimits(40, 120, "keep_end", "chat"))[0]:
        ids = np.concatenate([one.prompt_ids, one.responses[0].ids])[None]
        hidden = models.hidden_states(model_config, params, jnp.asarray(ids), segment_ids=jnp.ones_like(ids))
        last = ids.shape[1] - 1 - (ids[0, -1] == padding_id(tokenizer, model_config.vocab_size))
        scores.append(float(hidden[0, last] @ kernel))
        found.append(ids)
    return np.array(scores), found


def judged(folder):
    found = {}
    for some in RewardJudge(str(folder)).scores(PAIRS):  # several of different lengths at a time
        found |= some
    return np.array([found[pair] for pair in PAIRS])


def test_a_run_learns_to_tell_them_apart(trained):
    lines = metric_lines(trained[0].run_dir)
    assert lines[0]["eval_rewards/accuracies"] == 0
    assert lines[-1]["eval_rewards/accuracies"] >= 0.75
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert not any(name.startswith("logps/") for line in lines for name in line)


def test_transformers_and_the_scorer_give_the_scores_of_training(trained):
    import torch
    from transformers import AutoModelForSequenceClassification

    run, folder = trained
    expected, ids = scores_of_checkpoint(run, folder)
    assert np.ptp(expected) > 0.1
    model, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.num_labels == 1
    with torch.inference_mode():
        got = [float(model(torch.tensor(one)).logits[0, 0]) for one in ids]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(judged(folder), expected, atol=1e-5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card
    assert "text-generation" not in card


@pytest.fixture(scope="module")
def policy(world):
    """A policy with another vocabulary than the reward model's."""
    return world.run("sft", {"objective.name": "sft", "train.steps": 2, "model.vocab_size": 280})


@pytest.mark.slow
def test_adapters_are_merged_below_the_head(world, policy):
    base = policy[1]
    run, folder = world.run("adapters", {"model.path": base, "lora.rank": 2, "reference.mode": "none"})
    assert np.ptp(judged(folder)) > 0
    with pytest.raises(ValueError, match="whose head is no adapter; leave out --adapter"):
        export.export(run.run_dir, world.folder / "peft", adapter=True)


def test_it_scores_the_answers_of_a_model_with_another_tokenizer(world, trained, policy, tmp_path):
    run, _ = policy
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preference_rows(3)])
    arguments = ["--model", run.run_dir, "--prompts", prompts, "--out", tmp_path / "x.jsonl", "--n", 3]
    arguments += ["--score", f"reward:{trained[1]}", "--temperature", 1.5, "--max-tokens", 8, "--keep-unfinished"]
    assert sample.main([str(part) for part in [*arguments, "--cache-dir", world.cache]]) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()]
    assert rows
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "dpo", "data.margin": "gap"}, "data.margin=gap is read by objective.name=reward alone"),
        ({"data.margin": "depth"}, "column 'depth' is missing"),
        ({"objective.nll_weight": 1}, "a reward model has no likelihood"),
        ({"data.pairing": "unpaired"}, "contrasts the two responses of a pair, but data.pairing is unpaired"),
        ({"model.family": "granite"}, "transformers has no sequence-classification model of the type granite"),
    ],
)
def test_what_cannot_be_is_refused(world, capsys, changes, message):
    told = settings(world.data, world.folder / "refused", world.cache, world.changes(changes))
    assert train.main([f"--{setting}" for setting in told]) == 2
    assert message in capsys.readouterr().err
