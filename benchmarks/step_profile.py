"""Where a training step's time goes on this machine, part by part, beside the least that each part could take:

python -m benchmarks.step_profile --workload H --pairs 8

The step of benchmarks/cells/ours.py runs under JAX's profiler. Every operation of the compiled program belongs to a
part by the scope that it was traced in and by whether it multiplies matrices. A part's own limit is the greater of two
times: its multiplications at the rate of the machine's best products, and its arrays, read and written once, at the
bandwidth of the machine's best sum of two large arrays; both rates are measured first. An operation's time is that of
the thread it runs on, so that the parts add up to the step where operations follow each other; products that run beside
others are counted with those.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import suite
from benchmarks.cells.ceiling import PRODUCTS, SHAPES, best_rate
from benchmarks.cells.ours import Run, make_config
from benchmarks.spec import CellSpec
from rpo_jax.hosts import sharding
from rpo_jax.hosts.memory import trim_after_compiling
from rpo_jax.tools.planning.hlo import Instruction, Program, parse, shapes_in
from rpo_jax.training.step import put_batch

AROUND = ("while", "call", "conditional")  # their time is that of what they run
SCOPES = ("attention", "mlp", "head", "optimizer")  # that the model and the step are traced in
SUMMED = 2**26  # elements of each of two arrays


@dataclass
class Part:
    """Of one step: the threads' seconds, operations of matrix products, and bytes of arrays read and written."""

    seconds: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0


def part_of(name: str, multiplies: bool) -> str:
    """A part by an operation's name, which holds the scopes that it was traced in."""
    words = name.replace("(", "/").replace(")", "/").split("/")
    scope = next((word for word in reversed(words) if word in SCOPES), None)
    if scope is None:
        return "between layers" if "/while/body" in name else "before, between and after"
    if scope == "optimizer":
        return scope
    backward = "transpose" in words and "rematted_computation" not in words
    return f"{scope} {'products' if multiplies else 'elementwise'}, {'backward' if backward else 'forward'}"


def _products(
    program: Program, computation: Mapping[str, Instruction], one: Instruction
) -> Iterator[tuple[str, float]]:
    """Name and operations of the matrix products that an instruction is or is fused of."""
    if one.opcode == "dot":
        (result,), left = shapes_in(one.result), shapes_in(computation[one.operands[0]].result)[0]
        inner = one.text.partition("lhs_contracting_dims={")[2].partition("}")[0].split(",")
        yield one.op_name, 2.0 * math.prod(result.dims) * math.prod(left.dims[int(axis)] for axis in inner if axis)
    for called in one.called:
        inside = program.computations[called]
        for other in inside.values():
            yield from _products(program, inside, other)


def _touched(program: Program, computation: Mapping[str, Instruction], one: Instruction) -> int:
    """Bytes of what an instruction reads and writes; where it reads or writes a slice of a stack, the slice's."""
    given = [
        sum(shape.bytes for shape in shapes_in(computation[name].result))
        for name in one.operands
        if name in computation
    ]
    result = sum(shape.bytes for shape in shapes_in(one.result))
    inside = program.computations[one.called[0]] if one.opcode == "fusion" else {"": one}
    for each in inside.values():
        if each.opcode not in ("dynamic-slice", "dynamic-update-slice"):
            continue
        source = computation if one is each else inside
        whole = sum(shape.bytes for shape in shapes_in(source[each.operands[0]].result))
        part = source[each.operands[1]].result if each.opcode == "dynamic-update-slice" else each.result
        size = sum(shape.bytes for shape in shapes_in(part))
        given = [size if bytes == whole else bytes for bytes in given]
        result = size if result == whole else result
    return result + sum(given)


def parts(text: str, ran: Mapping[str, tuple[int, float]]) -> dict[str, Part]:
    """Parts of a step by name.

    Args:
        text: of the compiled program.
        ran: how often each of its instructions ran, and for how many seconds in all.
    """
    program, found = parse(text), defaultdict[str, Part](Part)
    for computation in program.computations.values():
        for name, one in computation.items():
            if name not in ran or one.opcode in AROUND:
                continue
            times, seconds = ran[name]
            products = list(_products(program, computation, one))
            part = found[
                part_of(max(products, key=lambda product: product[1])[0] if products else one.op_name, bool(products))
            ]
            part.seconds += seconds
            part.operations += times * sum(operations for _, operations in products)
            part.bytes += times * _touched(program, computation, one)
    return dict(found)


def profiled(run: Run, number: int) -> tuple[dict[str, tuple[int, float]], float, float]:
    """Instructions of one step, by name how often each ran and for how long; wall and processor seconds of the step."""
    batch = run.batches.batch_at(number)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began, worked = time.perf_counter(), time.process_time()
            run.step(batch)
            seconds, processor = time.perf_counter() - began, time.process_time() - worked
        (file,) = Path(folder).rglob("*.xplane.pb")
        ran: dict[str, tuple[int, float]] = {}
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if any(key == "hlo_op" for key, _ in event.stats):
                    times, so_far = ran.get(event.name, (0, 0.0))
                    ran[event.name] = times + 1, so_far + event.duration_ns / 1e9
    return ran, seconds, processor


def program_text(run: Run, number: int) -> str:
    """Of the compiled step on this batch."""
    placed, train = put_batch(run.mesh, run.batches.batch_at(number)), run.steps.train
    arguments: Any = getattr(train, "keywords", {})
    return getattr(train, "func", train).lower(run.state, placed, run.reference, **arguments).compile().as_text()


def rates(spec: CellSpec) -> tuple[float, float]:
    """Operations a second of the machine's best product, bytes a second of its best sum of two large arrays."""
    products = (best_rate(PRODUCTS["ceiling-jax"](spec, *shape), 2.0 * math.prod(shape)) for shape in SHAPES)
    one, total = jnp.ones(SUMMED), jnp.ones(SUMMED)
    # In place: memory that the system has yet to give takes longer to write than memory that is there.
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)

    def summed() -> None:
        nonlocal total
        total = add(total, one).block_until_ready()

    return max(products), best_rate(summed, 3.0 * one.nbytes)


def table(found: Mapping[str, Part], seconds: float, operations_rate: float, bandwidth: float) -> list[list[str]]:
    """A line for each part, the longest first."""
    rows = [["part", "s", "of the step", "GFLOP", "GFLOP/s", "GB", "GB/s", "its limit, s"]]
    for name, part in sorted(found.items(), key=lambda item: -item[1].seconds):
        limit = max(part.operations / operations_rate, part.bytes / bandwidth)
        gflop, gigabytes = part.operations / 1e9, part.bytes / 1e9
        row = [name, f"{part.seconds:.3f}", f"{part.seconds / seconds:.0%}", f"{gflop:,.0f}"]
        row += [f"{gflop / part.seconds:.0f}", f"{gigabytes:.2f}", f"{gigabytes / part.seconds:.1f}", f"{limit:.3f}"]
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workload", default="H", help="of A, B, H, S; benchmarks/README.md describes them")
    parser.add_argument("--pairs", default="8", help="of a step")
    parser.add_argument("--lora-rank", default="0")
    parser.add_argument("--dtype", default="float32", help="of products: float32 or bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of rpo_jax")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short texts, to see that it runs")
    given = parser.parse_args(arguments)
    words = [
        "--workloads",
        given.workload,
        "--pairs",
        given.pairs,
        "--systems",
        "ours-cached",
        "--steps",
        "2",
        "--warmup",
        "1",
    ]
    words += [
        "--repeats",
        "1",
        "--lora-rank",
        given.lora_rank,
        "--dtype",
        given.dtype,
        *(f"--set={one}" for one in given.set),
    ]
    cells = suite.make_cells(suite.parse_arguments([*words, *["--tiny"] * given.tiny]))
    spec = next(cell for cell in cells if cell.system == "ours-cached")
    trim_after_compiling()  # as rpo_jax.train does
    precision = "float32" if spec.dtype == "float32" else None
    config = make_config(spec)
    with jax.set_mesh(sharding.make_mesh(config.mesh)), jax.default_matmul_precision(precision):
        operations_rate, bandwidth = rates(spec)
        run = Run(spec, config)
        run.compute_reference(range(3))
        run.begin()
        for number in (0, 1):
            run.step(run.batches.batch_at(number))
        ran, seconds, processor = profiled(run, 1)
        found = parts(program_text(run, 1), ran)
    machine, cores = suite.describe_machine(), os.cpu_count() or 1
    where = f"{machine['processor']}, {cores} cores, {machine['commit']}, {machine['date']}"
    print(f"{where}: products {operations_rate / 1e9:.0f} GFLOP/s, sums {bandwidth / 1e9:.1f} GB/s")
    rows = table(found, seconds, operations_rate, bandwidth)
    print("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))
    told = sum(part.seconds for part in found.values())
    print(f"step {seconds:.2f} s; operations {told:.2f} s; processors idle {1 - processor / seconds / cores:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
