"""A checkpoint goes to its shards slice by slice: the same values, and never the whole model on the host."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict

from rpo_jax import models
from rpo_jax.config import MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import lora, quantization
from rpo_jax.models.huggingface import loading
from rpo_jax.models.huggingface.tensors import tensors_of
from tests.models.conftest import CASES
from tests.worlds import quantized, small_model

ROOT = Path(__file__).parents[2]
MESHES = {"fsdp": (1, 8, 1), "tensor": (1, 2, 4), "all": (2, 2, 2), "copies": (8, 1, 1)}


def shardings_of(model_config, mesh, base_dtype="float32"):
    shapes, axes = (f(model_config, base_dtype) for f in (lora.abstract_base, lora.base_axes))
    return sharding.parameter_shardings(mesh, axes, shapes)


def mesh_of(name):
    data, fsdp, tensor = MESHES[name]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def assert_placed(got, expected, shardings):
    jax.tree.map(lambda array, place: assert_same(array.sharding, place), got, shardings)
    jax.tree.map(lambda array, host: np.testing.assert_array_equal(np.asarray(array), host, strict=True), got, expected)


def assert_same(got, expected):
    assert got == expected


@pytest.mark.parametrize("case", CASES)
def test_every_family_on_a_mesh_of_three_axes_is_what_the_host_has(case, hf_folder):
    model_config, host = models.load_pretrained(hf_folder(case))
    shardings = shardings_of(model_config, mesh_of("all"))
    assert_placed(models.load_sharded(hf_folder(case), shardings), host, shardings)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mesh_and_dtype(mesh, dtype, hf_folder):
    model_config, host = models.load_pretrained(hf_folder("llama biases"), dtype)
    shardings = shardings_of(model_config, mesh_of(mesh))
    assert_placed(models.load_sharded(hf_folder("llama biases"), shardings, dtype), host, shardings)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["llama biases", "qwen3"])
def test_an_int8_base_in_parts_is_the_one_that_is_quantized_whole(case, mesh, hf_folder):
    """Also where the inputs, over all of which the scale is taken, lie on several devices."""
    model_config, host = models.load_pretrained(hf_folder(case))
    shardings = shardings_of(model_config, mesh_of(mesh), "int8")
    assert_placed(models.load_sharded(hf_folder(case), shardings, "int8"), quantized(model_config, host), shardings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of random weights whose inputs blocks of 64 divide; heads of 16, so that a block goes over several."""
    made = {}
    for family in ("llama", "mixtral"):
        model_config = small_model(family=family, hidden_size=128, intermediate_size=192, num_heads=8, num_kv_heads=4)
        params = jax.tree.map(np.asarray, models.init_params(model_config, jax.random.key(0)))
        made[family] = models.save_pretrained(tmp_path_factory.mktemp("model") / family, model_config, params)
    return made


@pytest.mark.parametrize(
    ("family", "dtype", "mesh"),
    [
        *(("llama", "nf4", mesh) for mesh in MESHES),
        ("llama", "int4", "all"),
        *(("mixtral", dtype, "all") for dtype in quantization.ROUNDED),
    ],
)
def test_a_base_in_blocks_or_with_experts_in_parts_is_the_one_that_is_rounded_whole(folders, family, dtype, mesh):
    model_config, host = models.load_pretrained(folders[family])
    shardings = shardings_of(model_config, mesh_of(mesh), dtype)
    got = models.load_sharded(folders[family], shardings, dtype)
    assert_placed(got, quantized(model_config, host, dtype), shardings)
    if dtype == "nf4" and mesh == "all":
        values = flatten_dict(got)[("layers", "attention", "output", "kernel")].values
        assert values.sharding.shard_shape(values.shape) == (2, 1, 32, 64), "blocks of heads, outputs: both are split"


def test_blocks_of_any_size_give_the_same(hf_folder, monkeypatch):
    model_config, host = models.load_pretrained(hf_folder("llama3"))
    monkeypatch.setattr(loading, "READ_BYTES", 3000)
    shardings = shardings_of(model_config, mesh_of("all"))
    assert_placed(models.load_sharded(hf_folder("llama3"), shardings), host, shardings)
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(hf_folder("llama3"))[1], host)


def test_any_part_of_any_parameter_is_read(hf_folder):
    """Also parts of axes that no mesh splits today: of head_dim, of the layers."""
    weights = loading.open_weights(hf_folder("llama biases"))
    host = flatten_dict(models.load_pretrained(hf_folder("llama biases"))[1])
    rng = np.random.default_rng(0)
    for path, whole in host.items():
        for _ in range(10):
            bounds = [np.sort(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            np.testing.assert_array_equal(weights.read(path, index, "float32"), whole[index], strict=True)


class Counting:
    """safetensors.safe_open, counting the bytes of every array that is read."""

    def __init__(self, real, sizes):
        self._real, self._sizes = real, sizes

    def __enter__(self):
        self._file = self._real.__enter__()
        return self

    def __exit__(self, *error):
        return self._real.__exit__(*error)

    def keys(self):
        return self._file.keys()

    def get_tensor(self, key):
        raise AssertionError(f"{key} is read whole")

    def get_slice(self, key):
        outer, view = self, self._file.get_slice(key)

        class View:
            get_shape, get_dtype = view.get_shape, view.get_dtype

            def __getitem__(self, index):
                part = view[index]
                outer._sizes.append((key, part.nbytes))
                return part

        return View()


def test_each_byte_is_read_once_in_parts_no_larger_than_a_shard(hf_folder, monkeypatch):
    real, sizes = safetensors.safe_open, []
    monkeypatch.setattr(safetensors, "safe_open", lambda *arguments: Counting(real(*arguments), sizes))
    model_config = models.check_pretrained(hf_folder("llama2"))
    shardings = shardings_of(model_config, mesh_of("fsdp"))
    params = models.load_sharded(hf_folder("llama2"), shardings)
    assert sum(size for _, size in sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tensors = tensors_of(model_config)
    for key, size in sizes:  # an eighth of one layer's tensor, or all of a vector that is not split
        whole = 4 * int(np.prod(tensors[key].shape))
        assert size == whole // 8, key
    held = max(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    assert held == max(leaf.nbytes for leaf in jax.tree.leaves(params)) // 8


def test_copies_are_read_once(hf_folder, monkeypatch):
    real, sizes = safetensors.safe_open, []
    monkeypatch.setattr(safetensors, "safe_open", lambda *arguments: Counting(real(*arguments), sizes))
    model_config = models.check_pretrained(hf_folder("llama2"))
    params = models.load_sharded(hf_folder("llama2"), shardings_of(model_config, mesh_of("copies")))
    assert sum(size for _, size in sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_base_that_is_not_finite_cannot_be_rounded(tmp_path, dtype):
    model_config = small_model(hidden_size=64, intermediate_size=64)
    params = jax.tree.map(np.array, models.init_params(model_config, jax.random.key(0)))
    params["layers"]["mlp"]["up"]["kernel"][1, 3, 5] = np.inf
    models.save_pretrained(tmp_path / "model", model_config, params)
    shardings = shardings_of(model_config, mesh_of("fsdp"), dtype)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj of the base has weights that are not finite"):
        models.load_sharded(tmp_path / "model", shardings, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_host_holds_a_small_part_beyond_what_its_devices_hold(processes, tmp_path):
    """Measured, in processes of their own: a load of the whole model first would show as its size."""
    command = [sys.executable, "-m", "benchmarks.load_memory", "--megabytes", "160", "--processes", str(processes)]
    done = subprocess.run([*command, "--folder", tmp_path], cwd=ROOT, check=True, capture_output=True, text=True)
    report = json.loads(re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)[0])
    assert len(report["extra_megabytes"]) == processes
    for held, extra in zip(report["held_megabytes"], report["extra_megabytes"], strict=True):
        assert held == pytest.approx(report["model_megabytes"] / processes, rel=0.02)
        assert extra < 0.4 * report["model_megabytes"]
