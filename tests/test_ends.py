"""Ends that a user can act on: memory, devices, folders, the hub and Weights & Biases, each in one line."""

import http.server
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rpo_jax
from rpo_jax import train
from rpo_jax.config import Config, MeshConfig
from rpo_jax.core.command import run_command
from rpo_jax.core.memory import explaining_memory, shortage
from rpo_jax.data import hub
from rpo_jax.hosts import devices
from rpo_jax.hosts.sharding import make_mesh
from rpo_jax.training.needs import less_memory
from tests.processes import REPOSITORY
from tests.runs import configured, settings, write_rows

HUGE = 1 << 60


def too_large_for_numpy():
    np.zeros(HUGE >> 6)


def too_large_for_jax():
    jnp.zeros((HUGE // 4,), jnp.uint8).block_until_ready()


def too_large_to_run():
    jax.jit(lambda x: jnp.sum(x[:, None] * x[None, :] @ x[:, None]))(jnp.ones(1 << 24)).block_until_ready()


@pytest.mark.parametrize("work", [too_large_for_numpy, too_large_for_jax, too_large_to_run])
def test_memory_that_is_not_enough_is_told_in_one_paragraph(work, capsys):
    def advised():
        with explaining_memory(lambda: "try less"):
            work()

    assert run_command(advised) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ")
    assert said.endswith("; try less\n")
    assert said.count("\n") == 1
    assert "iB" in said, "how much was asked for"


def test_the_end_of_memory_is_told_from_other_ends():
    for error in (MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("CUDA out of memory. Tried 2")):
        assert shortage(error)
    for error in (ValueError("out of memory"), RuntimeError("shape mismatch"), OSError(28, "No space left on device")):
        assert shortage(error) is None
    assert shortage(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.\n at 0x1")) == (
        "Out of memory allocating 3.0 GiB"
    )


def test_a_step_that_is_too_large_says_what_it_needs_and_what_to_try(tmp_path, capsys):
    """One row of a million tokens and the weights of all pairs of them: terabytes."""
    changes = {"batch.row_tokens": 1 << 20, "model.attention": "dense", "objective.name": "sft"}
    data = write_rows(tmp_path / "pairs.jsonl")
    arguments = settings(data, tmp_path / "run", tmp_path / "cache", {**changes, "train.steps": 1, "data.eval_rows": 0})
    assert train.main([f"--{setting}" for setting in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for told in (
        "error: out of memory: ",
        "TiB",
        "of 1048576 tokens",
        "a device holds ",
        "of parameters",
        "of the optimizer",
        "batch.micro_rows (all rows at once now, 8 at least)",
        "model.remat=full (dots now)",
        "mesh.fsdp=8 (1 now)",
        "rpo_jax.plan",
    ):
        assert told in said, (told, said)


def test_devices_that_share_experts_are_no_more_of_fsdp():
    """What is no expert's is split over both axes, so fsdp may have the devices that the experts leave."""
    for sizes, told in ((MeshConfig(data=2, expert=4), "mesh.fsdp=2 (1 now)"), (MeshConfig(fsdp=2, expert=4), "more")):
        assert told in less_memory(Config(), make_mesh(sizes))


# Devices.


@pytest.mark.slow
def test_devices_that_are_not_here_are_told_in_one_line(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl")
    trained = [f"--{setting}" for setting in settings(data, tmp_path / "run", tmp_path / "cache", {})]
    generated = ["--model", str(tmp_path), "--prompts", str(data), "--out", str(tmp_path / "out.jsonl")]
    code = f"""
from rpo_jax import doctor, generate, train
print(train.main({trained}), generate.main({generated}), doctor.main({trained}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 2 2"
    assert done.stderr.count("error: JAX_PLATFORMS=cuda asks jax for what it cannot start: ") == 2
    assert done.stderr.count("\n") == 2
    assert re.search("FAILED +devices +JAX_PLATFORMS=cuda", done.stdout)


@pytest.fixture
def no_platform_asked():
    asked = jax.config.jax_platforms
    yield lambda: jax.config.update("jax_platforms", None)
    jax.config.update("jax_platforms", asked)


def test_a_card_that_jax_does_not_use_is_told(tmp_path, monkeypatch, no_platform_asked):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "NVIDIA", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.unused_card() is None, "JAX_PLATFORMS=cpu asks for it"
    no_platform_asked()
    assert "NVIDIA card" in str(devices.unused_card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.unused_card() is None, "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia0").unlink()
    assert devices.unused_card() is None


# Before anything is computed.


def refused_before_embedding(tmp_path, capsys, changes, run_dir=None):
    config = configured(write_rows(tmp_path / "pairs.jsonl"), run_dir or tmp_path / "run", tmp_path / "cache", changes)
    with pytest.raises((ValueError, OSError)) as refused:
        rpo_jax.run(config)
    out = capsys.readouterr().out
    assert "tokenise" not in out
    assert "embed" not in out
    return str(refused.value)


def test_a_disk_without_room_for_a_checkpoint_is_told_first(tmp_path, capsys):
    said = refused_before_embedding(tmp_path, capsys, {"model.intermediate_size": 1 << 42})
    assert f"run.dir={tmp_path / 'run'}: a checkpoint takes " in said
    assert "TiB, and its disk has " in said


def test_room_is_what_is_free_on_the_disk_of_the_run(disk_of, tmp_path, capsys):
    disk, changes = disk_of("2m"), {"model.intermediate_size": 4096}
    said = refused_before_embedding(tmp_path, capsys, changes, disk / "run")
    assert f"run.dir={disk / 'run'}: a checkpoint takes " in said


def test_a_run_folder_on_a_read_only_disk_is_told_first(disk_of, tmp_path, capsys):
    disk = disk_of("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = refused_before_embedding(tmp_path, capsys, {}, disk / "runs" / "run")
    assert f"{disk} cannot be written: Read-only file system" in said


def test_a_run_folder_that_is_a_disk_of_its_own_is_told_first(disk_of, tmp_path, capsys):
    disk = disk_of("6m")
    assert f"run.dir={disk} is where a disk is mounted" in refused_before_embedding(tmp_path, capsys, {}, disk)


def test_a_reference_that_is_not_there_is_told_first(tmp_path, capsys):
    said = refused_before_embedding(tmp_path, capsys, {"reference.path": tmp_path / "absent"})
    assert f"There is no model folder {tmp_path / 'absent'}" in said


class Hanging(http.server.BaseHTTPRequestHandler):
    """Closes every connection without an answer."""

    asked = 0

    def do_HEAD(self):
        type(self).asked += 1
        self.close_connection = True

    do_GET = do_HEAD


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), Hanging)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    code = (
        "from rpo_jax.data.sources import read_rows\n"
        "try:\n    next(iter(read_rows('nobody/such-data')))\nexcept ValueError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    server.shutdown()
    server.server_close()
    assert "'nobody/such-data' is no local file or folder" in done.stdout, done.stderr
    assert Hanging.asked == 1
    assert hub.PROBE_SECONDS <= 5
