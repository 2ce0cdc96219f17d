"""A mixture of references in a run: each one's log-probs from its own cache, mixed into one for every response."""

import numpy as np
import pytest
from safetensors import safe_open

import rpo_jax
from rpo_jax import export, train
from rpo_jax.config import resolve
from rpo_jax.config.reading import load_config
from rpo_jax.models.huggingface.folders import folder_fingerprint
from rpo_jax.objectives.methods.mrpo import adaptive_reference, mixed_reference
from rpo_jax.training.reference import FOLDER
from tests.runs import configured, metric_lines, settings, write_rows

SHORT = {"train.steps": 3, "tracking.tensorboard": False, "train.eval_every": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, and a model that was trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("references")
    data = write_rows(folder / "pairs.jsonl")
    rpo_jax.run(configured(data, folder / "sft", folder / "cache", {**SHORT, "objective.name": "sft"}))
    return folder, data, export.export(folder / "sft", folder / "other")


def cached(folder):
    """(weights, response) -> log-probs of the training data, from every file of a cache."""
    found = {}
    for path in (folder / FOLDER).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            said, values = file.metadata(), file.get_tensor("log_probs")
        if said["slot"].startswith("train"):
            found[said["weights"], said["response"]] = values
    return found


@pytest.mark.slow
def test_a_run_has_the_mixture_for_its_reference(place, capsys):
    """The policy is the first reference, and a batch is all the data: the first rewards are known from the caches."""
    folder, data, other = place
    cache = folder / "mixed cache"
    changes = {
        **SHORT,
        "batch.pairs": 24,
        "objective.name": "mrpo",
        "objective.beta": 0.5,
        "reference.others": f'["{other}"]',
        "reference.weights": "[0.3, 0.7]",
    }

    def first_line(name, more=None):
        rpo_jax.run(configured(data, folder / name, cache, {**changes, **(more or {})}))
        return next(line for line in metric_lines(folder / name) if "rewards/chosen" in line)

    line, found = first_line("mixed"), cached(cache)
    assert len(found) == 4, "two references, two responses"
    assert "computed" in capsys.readouterr().out
    theirs = folder_fingerprint(other)
    for response in ("chosen", "rejected"):
        own = next(values for (weights, kind), values in found.items() if kind == response and weights != theirs)
        mixture = mixed_reference(np.stack([own, found[theirs, response]]), np.float32([0.3, 0.7]))
        expected = 0.5 * float(np.mean(own - np.asarray(mixture)))
        assert abs(expected) > 1e-3
        assert line[f"rewards/{response}"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # Another mixture computes no log-probs again; one held at the first is that reference alone.
    alone = first_line("alone", {"reference.weights": "[0.5, 0.5]", "reference.clip": 0.0})
    assert "computed" not in capsys.readouterr().out
    assert alone["rewards/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_a_run_weighs_two_references_by_every_pair(place):
    folder, data, other = place
    changes = {**SHORT, "batch.pairs": 24, "objective.name": "mrpo", "objective.beta": 0.5, "train.steps": 1}
    changes |= {"reference.others": f'["{other}"]', "reference.adaptive": True, "train.eval_every": 1}
    rpo_jax.run(configured(data, folder / "adaptive", folder / "adaptive cache", changes))
    line = next(line for line in metric_lines(folder / "adaptive") if "rewards/chosen" in line)
    found, theirs = cached(folder / "adaptive cache"), folder_fingerprint(other)
    sides = []
    for response in ("chosen", "rejected"):
        own = next(values for (weights, kind), values in found.items() if kind == response and weights != theirs)
        sides.append((own, found[theirs, response]))
    table, count = np.concatenate(np.array(sides), axis=1), len(sides[0][0])
    first, second = np.arange(count), np.arange(count) + count
    is_chosen = np.arange(2 * count) < count
    mixture = adaptive_reference(table, np.tile(first, 2), np.tile(second, 2), is_chosen)
    expected = 0.5 * np.mean((table[0] - np.asarray(mixture))[:count])
    assert abs(expected) > 1e-3
    assert line["rewards/chosen"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_folder_that_is_none_is_refused_in_one_line(place, tmp_path, capsys):
    _, data, other = place
    changes = {**SHORT, "objective.name": "mrpo", "reference.others": f'["{tmp_path / "nowhere"}"]'}
    arguments = settings(data, tmp_path / "run", tmp_path / "cache", changes)
    assert train.main([f"--{argument}" for argument in arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert "nowhere" in told
    assert "\n" not in told
    assert resolve(load_config(None, ["objective.name=mrpo", f'reference.others=["{other}"]']))
