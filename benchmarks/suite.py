"""Run the benchmark: every cell in a process of its own, one after another, systems taking turns.

bash benchmarks/run.sh [options]; --help lists them. One JSON line per cell goes to benchmarks/results/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.spec import MODELS, CellSpec
from benchmarks.table import read_records, render
from benchmarks.workloads import MODEL_OF, WORKLOADS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")

SYSTEMS = {  # system -> the environment that it needs, and the module that measures it
    "ours-cached": ("ours", "benchmarks.cells.ours"),
    "ours-live": ("ours", "benchmarks.cells.ours"),
    "torch-rpo": ("peers", "benchmarks.cells.torch_rpo"),
    "trl": ("peers", "benchmarks.cells.trl_dpo"),
    "trl-best": ("peers", "benchmarks.cells.trl_dpo"),
    "ceiling-jax": ("ours", "benchmarks.cells.ceiling"),
    "ceiling-torch": ("peers", "benchmarks.cells.ceiling"),
}
CEILINGS = tuple(name for name in SYSTEMS if name.startswith("ceiling-"))
MEASURED = tuple(name for name in SYSTEMS if name not in CEILINGS)

VECTORS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
SMALL_BATCH = 16  # pairs up to which a step is short enough to afford a whole one as warm-up, and three timed
INTERPRETERS = ("--dev-python", "--peers-python")
POLL_SECONDS = 0.1
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a cell may use before it is stopped."""

    memory_bytes: int
    seconds: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash benchmarks/run.sh", description=__doc__)

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--name", default="results", help="results go to benchmarks/results/NAME.jsonl")
    parser.add_argument("--append", action="store_true", help="add to the file instead of starting it again")
    parser.add_argument("--workloads", type=names, default=["A", "B", "H"], help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--pairs", type=numbers, help="pairs a step, comma-separated; 8,64 where not given")
    parser.add_argument("--systems", type=names, default=list(MEASURED), help=f"of {','.join(MEASURED)}")
    parser.add_argument("--steps", type=int, help=f"timed steps; 3 up to {SMALL_BATCH} pairs, else 1")
    parser.add_argument("--warmup", type=int, help=f"whole steps before; 1 up to {SMALL_BATCH} pairs, else 0")
    parser.add_argument("--micro", type=int, default=8, help="pairs in a forward pass of the peers")
    parser.add_argument("--repeats", type=int, default=2, help="rounds over everything")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value of rpo_jax")
    parser.add_argument("--model", choices=sorted(MODELS), help="smollm2-135m for S, else small, where not given")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters of this rank, in every system; 0: none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short texts, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-gib", type=float, help="stop a cell above this; 85%% of the machine where not given")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a cell may take")
    parser.add_argument("--dev-python", default=os.environ.get("DEV_PYTHON", sys.executable), help="runs rpo_jax")
    parser.add_argument("--peers-python", default=os.environ.get("PEERS_PYTHON"), help="runs TRL and PyTorch")
    options = parser.parse_args(arguments)
    for given, known in ((options.systems, MEASURED), (options.workloads, tuple(WORKLOADS))):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {','.join(unknown)}; there are {','.join(known)}")
    options.pairs = options.pairs or ([4, 8] if options.tiny else [8, 64])
    for pairs in options.pairs:
        if pairs % min(options.micro, pairs):
            parser.error(f"--micro {options.micro} does not divide {pairs} pairs")
    return options


def make_cells(options: argparse.Namespace) -> list[CellSpec]:
    """In the order that they run: each round measures the ceiling anew before the systems take their turns."""
    cells = []
    order = [(r, w, p) for r in range(options.repeats) for w in options.workloads for p in options.pairs]
    for repeat, workload, pairs in order:
        brief = pairs <= SMALL_BATCH
        common = CellSpec(
            system="",
            workload=workload,
            pairs=pairs,
            micro=min(options.micro, pairs),
            warmup=int(brief) if options.warmup is None else options.warmup,
            steps=options.steps or (3 if brief else 1),
            repeat=repeat,
            model="tiny" if options.tiny else options.model or MODEL_OF.get(workload, "small"),
            lora_rank=options.lora_rank,
            dtype=options.dtype,
            device=options.device,
            shrink=8 if options.tiny else 1,
            seed=options.seed,
        )
        for system in (*CEILINGS, *options.systems):
            settings = tuple(options.settings) if system.startswith("ours") else ()
            cells.append(replace(common, system=system, settings=settings))
    return cells


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 once it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def watch(process: subprocess.Popen, limits: Limits) -> str:
    """Wait for a cell; `ok`, or why it gave nothing. A cell that would take the machine down is killed first."""
    until = time.monotonic() + limits.seconds
    while process.poll() is None:
        reason = None
        if resident_bytes(process.pid) > limits.memory_bytes:
            reason = "out of memory"
        elif time.monotonic() > until:
            reason = f"stopped after {limits.seconds:.0f} s"
        if reason is not None:
            process.kill()
            process.wait()
            return reason
        time.sleep(POLL_SECONDS)
    # -9 that is not ours is the kernel's.
    return {0: "ok", -9: "out of memory"}.get(process.returncode, f"failed ({process.returncode})")


def run_cell(spec: CellSpec, python: str, log: Path, limits: Limits) -> dict[str, Any]:
    """The record of one cell."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        report = Path(folder) / "report.json"
        spec = replace(spec, started=time.time())
        command = [python, "-m", SYSTEMS[spec.system][1], spec.to_json(), str(report)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        status = watch(process, limits)
        measured = json.loads(report.read_text(encoding="utf-8")) if status == "ok" else {}
    if status.startswith("failed") and any(name in log.read_bytes() for name in (b"OutOfMemory", b"out of memory")):
        status = "out of memory"
    return {"spec": asdict(spec), "status": status, "measured": measured}


def describe_machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    # One name may stand for several generations: their vectors tell those apart whose products are not alike.
    vectors = [name for flag, name in VECTORS.items() if flag in flags][:1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": ", ".join([values.get("model name", platform.processor()), *vectors]),
        "cores": os.cpu_count(),
        "memory_gib": round(total_memory() / GIB, 1),
        "commit": commit.stdout.strip() + ("+" if changes.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def without_interpreters(arguments: Sequence[str]) -> list[str]:
    """The arguments that a reader elsewhere can give too."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and name not in INTERPRETERS:
            kept.append(argument)
        skip = argument in INTERPRETERS
    return kept


def prepare_files(options: argparse.Namespace) -> tuple[Path, Path]:
    """The results file and a folder for logs and compiled programs, emptied unless --append is given."""
    results, beside = RESULTS / f"{options.name}.jsonl", RESULTS / options.name
    if not options.append:
        results.unlink(missing_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True, exist_ok=True)
    return results, beside


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    pythons = {"ours": options.dev_python, "peers": options.peers_python}
    cells = [cell for cell in make_cells(options) if pythons[SYSTEMS[cell.system][0]] is not None]
    missing = sorted({name for name in options.systems if pythons[SYSTEMS[name][0]] is None})
    if missing:
        print(f"error: {','.join(missing)} need --peers-python, which benchmarks/run.sh provides", file=sys.stderr)
        return 2
    results, beside = prepare_files(options)
    records = read_records(results) if results.exists() else []
    here = describe_machine()
    if others := {one["machine"]["processor"] for one in records if "machine" in one} - {here["processor"]}:
        told = f"{results} has cells of {', '.join(sorted(others))}, and this is {here['processor']}"
        print(f"error: {told}; give another --name, as a table compares one machine's cells", file=sys.stderr)
        return 2
    limits = Limits(int(options.memory_gib * GIB if options.memory_gib else 0.85 * total_memory()), options.timeout)
    earlier = sum("machine" in record for record in records)

    def write(record: dict[str, Any]) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    given = list(sys.argv[1:] if arguments is None else arguments)
    write({"machine": here, "arguments": without_interpreters(given)})
    failed = False
    for number, cell in enumerate(cells, start=1):
        label = f"{cell.workload}-{cell.pairs}-{cell.system}"
        cell = replace(cell, cache_dir=str(beside / "compiled" / label) if cell.system.startswith("ours") else "")
        log = beside / f"{earlier}-{cell.repeat}-{label}.log"
        record = run_cell(cell, pythons[SYSTEMS[cell.system][0]], log, limits)
        write(record)
        failed = failed or record["status"].startswith("failed")
        seconds = ", ".join(f"{value:.2f}" for value in record["measured"].get("step_seconds", []))
        print(f"[{number}/{len(cells)}] {label}: {record['status']} {seconds}", flush=True)
    print(render(read_records(results)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
