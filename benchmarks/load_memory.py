"""Host memory that loading a checkpoint takes beyond what the devices hold: one JSON line.

    python -m benchmarks.load_memory --megabytes 1500 [--processes 2] [--base-dtype int8] [--whole]

Makes a Llama folder of random weights, and loads it in processes of its own, whose virtual CPU devices (eight among
all processes, mesh.fsdp=8) share the host's memory. So the devices' arrays count too: what is told is the peak of the
resident memory during the load, less what was resident before, less the bytes of the arrays. --whole loads as a
program does that reads the model first and splits it then.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICES = 8
MEGABYTE = 1e6


def make_checkpoint(folder: Path, megabytes: float) -> None:
    """A Llama of about this size in float32, written tensor by tensor; its layers hold most of it."""
    import jax
    import numpy as np

    from rpo_jax import models

    layers, vocabulary = 12, 8192
    hidden = 64 * max(1, round((megabytes * MEGABYTE / 4 / layers / 12) ** 0.5 / 64))
    model_config = models.new_config(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 64 * 64,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 64,
        tie_embeddings=False,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32) - 0.5, models.abstract_params(model_config))
    models.save_pretrained(folder, model_config, params, max_shard_bytes=500_000_000)


def resident_bytes(peak: bool = False) -> int:
    """Of this process now, or at most since the mark was last taken back."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def load(options: argparse.Namespace) -> None:
    """One process: load, and tell what it took."""
    import jax

    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    from rpo_jax import models
    from rpo_jax.config import MeshConfig
    from rpo_jax.hosts import sharding
    from rpo_jax.models import lora

    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=DEVICES))
    model_config = models.check_pretrained(options.folder)
    shapes, axes = (f(model_config, options.base_dtype) for f in (lora.abstract_base, lora.base_axes))
    shardings = sharding.parameter_shardings(mesh, axes, shapes)
    jax.block_until_ready(jax.device_put(0.0))
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak from here on
    started = time.perf_counter()
    if options.whole:
        host = models.load_pretrained(options.folder)[1]
        params = jax.block_until_ready(jax.tree.map(jax.device_put, host, shardings))
    else:
        params = jax.block_until_ready(models.load_sharded(options.folder, shardings, options.base_dtype))
    seconds, peak = time.perf_counter() - started, resident_bytes(peak=True)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(json.dumps({"held": held, "extra": peak - before - held, "seconds": seconds}))


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the processes, wait, and gather."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // options.processes}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "benchmarks.load_memory", "--folder", str(options.folder)]
    command += ["--processes", str(options.processes), "--coordinator", coordinator]
    command += ["--base-dtype", options.base_dtype] + ["--whole"] * options.whole
    started = [
        subprocess.Popen([*command, "--process", str(number)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(options.processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("error: a process failed; its message is above.")
    reports = [json.loads(output.splitlines()[-1]) for output in outputs]
    stored = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    return {
        "model_megabytes": round(stored / MEGABYTE, 1),
        "base_dtype": options.base_dtype,
        "whole": options.whole,
        "held_megabytes": [round(report["held"] / MEGABYTE, 1) for report in reports],
        "extra_megabytes": [round(report["extra"] / MEGABYTE, 1) for report in reports],
        "seconds": [round(report["seconds"], 1) for report in reports],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1500.0, help="size of the checkpoint that is made")
    parser.add_argument("--folder", type=Path, help="where it is made, or is already")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--base-dtype", choices=("float32", "bfloat16", "int8", "nf4", "int4"), default="float32")
    parser.add_argument("--whole", action="store_true", help="read the whole model first")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        load(options)
        return
    with tempfile.TemporaryDirectory() as own:
        options.folder = options.folder or Path(own)
        if not any(options.folder.glob("*.safetensors")):
            make_checkpoint(options.folder / "model", options.megabytes)
            options.folder = options.folder / "model"
        print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
