"""What only a GPU can answer, in at most eight minutes on one: its parts in order of worth, each printed as it ends.

python -m benchmarks.gpu [--tiny] [--parts losses,attention,step,torch,sampling,resume] [options of benchmarks.suite]

  losses      the step runs, and its losses are the CPU's: within 1e-2 in bfloat16, 1e-4 in float32 (a small model)
  attention   every kind, forward and backward, on rows of 512 to 16,384 tokens; how far each is from dense's
  step        a 1B Llama, 64 pairs of Anthropic-HH's lengths: seconds, tokens/s, share of the measured matmul rate, and
              the peak of memory beside the plan's
  torch       the same step in PyTorch, with its own scaled dot product attention
  sampling    answers of that Llama, tokens/s
  resume      a run that is stopped and resumed is the run that was not, with deterministic operations

Each part is a process with a time limit: one that fails or hangs does not take the others with it. One environment with
rpo_jax[cuda] is needed, for `torch` PyTorch with CUDA and peft too. With --tiny all of it runs on the CPU, on
tiny models, to prove that it runs: its figures mean nothing. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.spec import MODELS, CellSpec

ROOT = Path(__file__).parents[1]
MODEL = "llama-1b"
COMMON = (
    *("--name", "gpu", "--dtype", "bfloat16", "--workloads", "H", "--pairs", "64"),
    *("--steps", "5", "--warmup", "2", "--repeats", "1"),
)
# A 1B model's activations for all rows at once are more than the fastest step needs to keep.
FULL_SIZE = ("--device", "gpu", "--model", MODEL, "--set", "model.remat=dots")
BOUNDS = {"bfloat16": 1e-2, "float32": 1e-4}  # of losses, relative
KINDS = ("dense", "fused", "cudnn", "blockwise")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def compared_losses(settings: Sequence[str], dtype: str) -> list[float]:
    """Losses of four steps of a small model, by the process's own platform."""
    import jax

    from benchmarks.cells import ours
    from rpo_jax.hosts import sharding

    spec = CellSpec(
        system="ours-cached",
        workload="H",
        pairs=8,
        micro=8,
        warmup=0,
        steps=4,
        model="tiny",
        shrink=4,
        dtype="float32" if dtype == "float32" else "bfloat16",
        settings=("optim.learning_rate=1e-3", *settings),
    )
    config = ours.make_config(spec)
    precision = "float32" if dtype == "float32" else None
    with jax.set_mesh(sharding.make_mesh(config.mesh)), jax.default_matmul_precision(precision):
        run = ours.Run(spec, config)
        run.compute_reference(range(spec.steps))
        run.begin()
        return [float(run.step(run.batches.batch_at(number))["loss"]) for number in range(spec.steps)]


def losses(tiny: bool, rest: Sequence[str]) -> None:
    import jax

    code = "import json; from benchmarks.gpu import compared_losses; print(json.dumps(compared_losses([], 'float32')))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(f"the CPU's losses failed: {told.stderr.strip().splitlines()[-1]}")
    wanted = json.loads(told.stdout.splitlines()[-1])
    platform, wrong = jax.default_backend(), []
    kinds = ("auto", "fused") if platform == "gpu" else ("auto",)
    for dtype, bound in BOUNDS.items():
        for kind in kinds:
            found = compared_losses([f"model.attention={kind}"], dtype)
            error = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
            print(f"  {dtype}, attention {kind}: losses {error:.1e} from the CPU's, bound {bound:.0e}", flush=True)
            wrong += [f"{dtype} {kind}"] * (not error <= bound)
    if wrong:
        raise SystemExit(f"losses differ: {', '.join(wrong)}")


def attention_of(kind: str, platform: str, ids: Any) -> Callable[..., Any]:
    """An attention of these rows; the GPU's own kernels interpreted where there is no GPU."""
    from rpo_jax import models
    from rpo_jax.models.attention import fused

    if kind == "fused" and platform != "gpu":
        return fused.make(ids, (None,), models.Split(), interpret=True)
    return models.attention_kind(kind, platform).make(ids, (None,), models.Split(), None)


def attention(tiny: bool, rest: Sequence[str]) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.gpu_kernels import row_of_a_pair
    from rpo_jax.models.attention.masking import TokenIds

    platform = jax.default_backend()
    heads, groups, head_dim, most = (4, 2, 16, 256) if tiny else (32, 8, 128, 16384)
    lengths = (128, 256) if tiny else (512, 1024, 2048, 4096, 8192, 16384)
    for tokens in lengths:
        rows = most // tokens
        ids = TokenIds(*(jnp.broadcast_to(x, (rows, tokens)) for x in row_of_a_pair(tokens)))
        key = jax.random.key(0)
        qkv = [
            jax.random.normal(jax.random.fold_in(key, number), (rows, tokens, count, head_dim), jnp.bfloat16)
            for number, count in enumerate((heads, groups, groups))
        ]
        right = None
        for kind in KINDS:

            def total(*arrays: Any, kind: str = kind, ids: TokenIds = ids) -> Any:
                out = attention_of(kind, platform, ids)(*arrays, jnp.array(0))
                return jnp.sum(jnp.square(out.astype(jnp.float32))), out

            try:
                forward = jax.jit(lambda *x, run=total: run(*x)[1])
                backward = jax.jit(jax.grad(lambda *x, run=total: run(*x)[0], argnums=(0, 1, 2)))
                found = [np.asarray(x, np.float32) for x in (forward(*qkv), *backward(*qkv))]
                times = [_milliseconds(partial(run, *qkv), 2 if tiny else 10) for run in (forward, backward)]
            except Exception as error:  # a kind that cannot is told, and the next one tried
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"  {tokens:6} tokens, {kind:9}: {why[:100]}", flush=True)
                continue
            right = right or found
            away = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, right, strict=True))
            print(
                f"  {tokens:6} tokens x {rows} rows, {kind:9}: forward {times[0]:8.2f} ms, with backward "
                f"{times[1]:8.2f} ms, {away:.0e} from the first",
                flush=True,
            )


def _milliseconds(run: Callable[[], Any], times: int) -> float:
    import jax

    jax.block_until_ready(run())
    began = time.perf_counter()
    for _ in range(times):
        found = run()
    jax.block_until_ready(found)
    return (time.perf_counter() - began) / times * 1e3


def step(tiny: bool, rest: Sequence[str]) -> None:
    from benchmarks import suite
    from benchmarks.table import read_records

    # Without an interpreter for PyTorch: its ceiling belongs to the part `torch`.
    if suite.main([*COMMON, "--systems", "ours-cached,ours-live", *_size(tiny), *rest]):
        raise SystemExit("a cell failed; its log lies beside the results")
    done = [
        one for one in read_records(suite.RESULTS / "gpu.jsonl") if one.get("spec", {}).get("system") == "ours-cached"
    ]
    if done[-1]["status"] != "ok":
        raise SystemExit(f"the step gave nothing: {done[-1]['status']}")
    measured = done[-1]["measured"]
    planned = None if tiny else planned_bytes(measured["notes"]["rows"][0])
    told = "not planned" if planned is None else f"the plan's {planned / 2**30:.2f}"
    print(f"  peak of memory {measured['peak_device_bytes'] / 2**30:.2f} GiB, {told}", flush=True)


def planned_bytes(shape: Sequence[int]) -> int | None:
    """What `plan` says of the step on this GPU; None for a GPU that it does not know."""
    import jax

    from rpo_jax.tools.planning.chips import CHIPS

    kind = jax.devices()[0].device_kind
    name = next((chip.name for chip in CHIPS.values() if chip.gpu and chip.gpu["name"] == kind), None)
    if name is None:
        return None
    sizes = MODELS[MODEL]
    settings = {
        **{f"model.{key}": getattr(sizes, key) for key in ("hidden_size", "intermediate_size", "num_layers")},
        **{f"model.{key}": getattr(sizes, key) for key in ("num_heads", "num_kv_heads", "vocab_size")},
        "model.tie_embeddings": "true",
        "model.compute_dtype": "bfloat16",
        "model.remat": "dots",
        "batch.pairs": 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        rows = ["--rows", str(shape[0]), "--row-tokens", str(shape[1]), "--no-largest", "--json", str(file)]
        command = [sys.executable, "-m", "rpo_jax.plan", "--topology", f"{name}:1", *words, *rows]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if not file.exists():
            return None
        return json.loads(file.read_text(encoding="utf-8"))["plans"][0]["estimate"]["peak_bytes"]


def torch(tiny: bool, rest: Sequence[str]) -> None:
    from benchmarks import suite

    pythons = ("--append", "--peers-python", sys.executable)
    if suite.main([*COMMON, *pythons, "--systems", "torch-rpo", *_size(tiny), *rest]):
        raise SystemExit("a cell failed; its log lies beside the results")


def _size(tiny: bool) -> Sequence[str]:
    return ("--tiny", "--pairs", "4", "--steps", "1", "--warmup", "0") if tiny else FULL_SIZE


def sampling(tiny: bool, rest: Sequence[str]) -> None:
    import jax
    import numpy as np

    from benchmarks.generate import make_model
    from benchmarks.workloads import FIRST_WORD
    from rpo_jax.config import MeshConfig
    from rpo_jax.hosts import sharding
    from rpo_jax.sampling.engine import Engine, Sampling
    from rpo_jax.sampling.kv_cache import to_decode_layout

    count, tokens, new = (2, 16, 40) if tiny else (64, 128, 256)
    model, params = make_model("tiny" if tiny else MODEL)
    mesh, rng = sharding.make_mesh(MeshConfig()), np.random.default_rng(0)
    shards = sharding.row_shards(mesh)
    count = -(-count // shards) * shards  # as many on every device
    prompts = [rng.integers(FIRST_WORD, model.vocab_size, tokens).astype(np.int32) for _ in range(count)]
    engine = Engine(model, mesh, sampling=Sampling(), end_ids=(), compute_dtype="bfloat16")
    with jax.set_mesh(mesh):
        placed = jax.jit(to_decode_layout, static_argnums=(1, 2))(params, "bfloat16", jax.default_backend())
        for first in (True, False):
            began = time.perf_counter()
            ended = list(engine.answers(placed, prompts, range(count), [new] * count, count))
            seconds = time.perf_counter() - began
            if not first:
                made = sum(len(ids) for some in ended for _, ids in some)
                print(f"  {count} answers of {new} tokens: {seconds:.2f} s, {made / seconds:.0f} tokens/s", flush=True)


def resume(tiny: bool, rest: Sequence[str]) -> None:
    import rpo_jax

    class StopAfterTwo(rpo_jax.Hook):
        def after_step(self, run: Any, finished: Any) -> None:
            if finished.step == 2:
                run.stop("asked to")

    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, how: str, *hooks: rpo_jax.Hook) -> list[dict[str, float]]:
            sizes = ("model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1") if tiny else ()
            more = ("data.eval_path=null", "tracking.tensorboard=false", f"run.cache_dir={folder}/cache")
            steps = ("train.steps=6", "train.log_every=1", f"run.dir={folder}/{name}", f"run.resume={how}")
            rpo_jax.run(rpo_jax.load_config("quickstart_sft", [*steps, *more, *sizes]), hooks)
            lines = (Path(folder) / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            told = (
                {key: one[key] for key in one if key in ("step", "loss", "grad_norm")} for one in map(json.loads, lines)
            )
            return [one for one in told if "loss" in one]

        straight = run("straight", "never")
        run("stopped", "never", StopAfterTwo())
        resumed = run("stopped", "auto")
    if len(straight) != 6 or straight != resumed:
        raise SystemExit(f"not the same: {straight[-1]} and {resumed[-1]}")
    print(
        f"  stopped and resumed: losses and gradient norms of {len(straight)} steps are bit for bit the same",
        flush=True,
    )


# What each may take, in seconds; together at most eight minutes.
PARTS: dict[str, tuple[Callable[[bool, Sequence[str]], None], float]] = {
    "losses": (losses, 70),
    "attention": (attention, 100),
    "step": (step, 120),
    "torch": (torch, 80),
    "sampling": (sampling, 60),
    "resume": (resume, 50),
}


def run_part(name: str, given: Sequence[str], tiny: bool, limit: float) -> str:
    """`ok`, or why not; what the part prints goes to the terminal as it comes."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    elif name == "resume":
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    command = [sys.executable, "-m", "benchmarks.gpu", "--run-part", name, *given]
    # A group of its own: what a part has started, and would hold the GPU's memory, ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"stopped after {limit:.0f} s"
        raise
    return "ok" if status == 0 else f"failed, status {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(given)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"unknown: {','.join(unknown)}; there are {','.join(PARTS)}")
    if options.run_part:
        PARTS[options.run_part][0](options.tiny, rest)
        return 0
    failed = []
    for name in options.parts:
        print(f"{name}:", flush=True)
        began = time.monotonic()
        status = run_part(name, given, options.tiny, PARTS[name][1] * (3 if options.tiny else 1))
        print(f"{name}: {status} ({time.monotonic() - began:.0f} s)", flush=True)
        failed += [name] * (status != "ok")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
