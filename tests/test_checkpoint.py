import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from rpo_jax import models
from rpo_jax.config import Config, MeshConfig, OptimConfig
from rpo_jax.hosts import sharding
from rpo_jax.runs.checkpoints import Checkpoints, check_architecture, to_json_dict
from rpo_jax.training.step import Steps, TrainState, build_steps
from tests.worlds import small_model

MODEL = small_model()
CONFIG = Config(optim=OptimConfig(name="adamw"))


def steps_on(data: int, fsdp: int, tensor: int, context: int = 1) -> Steps:
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context))
    return build_steps(CONFIG, MODEL, mesh, total_steps=1)


def random_state(steps: Steps, seed: int = 0) -> TrainState:
    """A state whose every number is random, also those that start as zeros, on the run's devices."""
    rng = np.random.default_rng(seed)

    def fill(leaf, target):
        values = rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else rng.integers(1, 99, leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), target)

    return jax.tree.map(fill, jax.eval_shape(steps.init, models.abstract_params(MODEL)), steps.state_shardings)


def assert_equal(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of step 3, made on the mesh (2, 2, 2), and its state."""
    folder = tmp_path_factory.mktemp("checkpoints")
    steps = steps_on(2, 2, 2)
    state = random_state(steps)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"model": to_json_dict(MODEL), "num_tokens": 7})
    checkpoints.close()
    return folder, state


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 4, 2), (1, 2, 1, 4)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, shape):
    folder, state = saved
    steps = steps_on(*shape)
    like = random_state(steps, seed=1)
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(3, like)
    checkpoints.close()
    assert_equal(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == steps.state_shardings
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_parameters_come_back_alone_on_the_host(saved):
    folder, state = saved
    checkpoints = Checkpoints(folder, read_only=True)
    params = checkpoints.restore_params(3, models.abstract_params(MODEL))
    checkpoints.close()
    assert_equal(params, state.params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_the_record_comes_back(saved):
    checkpoints = Checkpoints(saved[0], read_only=True)
    assert checkpoints.record(3) == {"model": to_json_dict(MODEL), "num_tokens": 7}
    assert checkpoints.path(3).is_dir()
    checkpoints.close()


def kept(folder, scores, **keep) -> list[int]:
    """Steps that are left after saving one checkpoint per score, at steps 1, 2, ..."""
    checkpoints = Checkpoints(folder, **keep)
    for step, score in enumerate(scores, start=1):
        checkpoints.save(step, {"x": np.full(2, step)}, {}, score)
    checkpoints.close()
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    assert checkpoints.latest_step() == len(scores)
    checkpoints.close()
    return steps


def test_the_newest_are_kept(tmp_path):
    assert kept(tmp_path / "a", [None] * 4, keep_last=2) == [3, 4]


def test_the_best_are_kept_besides_the_newest(tmp_path):
    assert kept(tmp_path / "a", [0.1, 0.9, 0.3, 0.2], keep_last=1, keep_best=1) == [2, 4]
    assert kept(tmp_path / "b", [-3.0, -9.0, -2.0, -4.0], keep_last=1, keep_best=2) == [1, 3, 4]


def test_a_step_without_evaluation_never_counts_as_best(tmp_path):
    assert kept(tmp_path / "a", [-5.0, None, None], keep_last=1, keep_best=1) == [1, 3]


def test_the_best_survive_a_resume(tmp_path):
    folder = tmp_path / "a"
    kept(folder, [0.9, 0.1], keep_last=1, keep_best=1)
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=1)
    checkpoints.save(3, {"x": np.full(2, 3)}, {}, 0.5)
    checkpoints.close()
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == [1, 3]
    checkpoints.close()


def test_looking_at_a_folder_without_checkpoints_makes_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.steps() == []
    assert checkpoints.latest_step() is None
    checkpoints.close()
    assert not (tmp_path / "none").exists()


def test_another_architecture_is_named_by_its_differences(tmp_path):
    check_architecture(to_json_dict(MODEL), to_json_dict(small_model()), tmp_path)
    other = to_json_dict(small_model(hidden_size=64, num_layers=3))
    with pytest.raises(ValueError, match=r"hidden_size is 64 there and 32 in this.* num_layers is 3 there") as caught:
        check_architecture(other, to_json_dict(MODEL), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_record_that_is_older_than_a_part_of_the_decoder_is_of_one_without_it(tmp_path):
    current = to_json_dict(small_model(family="mixtral"))
    older = json.loads(json.dumps(current))
    del older["variant"]["sinks"], older["variant"]["experts"]["biases"], older["variant"]["experts"]["clamp"]
    check_architecture(older, current, tmp_path)
    older["variant"]["experts"]["count"] = 4
    with pytest.raises(ValueError, match=r"variant is .*'count': 4"):
        check_architecture(older, current, tmp_path)


def test_an_architecture_survives_json():
    saved = json.loads(json.dumps(to_json_dict(small_model(family="mistral"))))
    check_architecture(saved, to_json_dict(small_model(family="mistral")), "here")


def test_a_damaged_checkpoint_is_named_in_one_line(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "damaged")
    metadata = folder / "3" / "state" / "_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(ValueError, match="cannot be read") as whole:
        checkpoints.restore(3, random_state(steps_on(8, 1, 1)))
    with pytest.raises(ValueError, match="cannot be read") as alone:
        checkpoints.restore_params(3, models.abstract_params(MODEL))
    checkpoints.close()
    for caught in (whole, alone):
        assert str(folder / "3") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


TINY = {"params": {"w": np.arange(3, dtype=np.float32)}}


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EBUSY])
def test_a_checkpoint_that_was_renamed_is_saved_whatever_nfs_says(tmp_path, monkeypatch, number):
    real = os.rename

    def rename(source, target, **named):
        real(source, target, **named)
        if "tmp" in str(source):
            raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "rename", rename)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, TINY, {})
        checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.close()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EBUSY])
def test_an_older_checkpoint_that_nfs_says_it_did_not_move_costs_nothing(tmp_path, monkeypatch, number):
    real = os.replace

    def replace(source, target, **named):
        real(source, target, **named)
        if "removed" in str(target):
            raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "replace", replace)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, TINY, {})
        checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.close()


def test_a_step_is_put_away_also_where_its_earlier_self_cannot_be_removed(tmp_path, monkeypatch):
    """On NFS a file that is open when it is removed keeps its folder."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for start in range(2):
        checkpoints = Checkpoints(tmp_path)
        for step in (1, 2):
            checkpoints.save(step, TINY, {})
            checkpoints.wait()
        assert checkpoints.steps() == [2]
        checkpoints.close()
        (tmp_path / "2").rename(tmp_path / f"set aside {start}")
