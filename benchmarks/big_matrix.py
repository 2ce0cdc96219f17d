"""The contrast loss and its gradient on matrices that do not fit: time and memory in blocks, beside the whole matrix.

`nice python -m benchmarks.big_matrix` runs every cell in a process of its own, prints a table and writes it into
benchmarks/README.md with --into benchmarks/README.md. Let the machine do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDTH = 384  # of all-MiniLM-L6-v2
MARKS = ("<!-- big matrix: begin -->", "<!-- big matrix: end -->")
WEIGHTINGS = {"temperature 0.5": {"temperature": 0.5}, "perplexity 6": {"perplexity": 6.0}}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, weighting: str, block: str, repeats: int) -> dict[str, Any]:
    """Seconds of value, gradient and metrics of one matrix, and the memory that they took beyond the embeddings'."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rpo_jax.config import BatchConfig, Config, ContrastConfig, MeshConfig, resolve
    from rpo_jax.core.records import Batch, Side
    from rpo_jax.hosts.sharding import make_mesh
    from rpo_jax.training.micro_batches import ROW_FIELDS, LogProbs
    from rpo_jax.training.scoring import make_scores

    rng = np.random.default_rng(0)
    # Clusters, so that the nearest prompts are near and the rest is not.
    centres = rng.normal(size=(max(8, size // 64), WIDTH)).astype(np.float32)
    embedding = centres[rng.integers(0, len(centres), size)] + rng.normal(size=(size, WIDTH)).astype(np.float32)
    one = jnp.ones((size,), bool)
    number = jnp.arange(size)

    def side(text: int) -> Side:
        return Side(one, jnp.zeros(size), jnp.asarray(embedding), number, 2 * number + text, number)

    rows: Any = dict.fromkeys(ROW_FIELDS, jnp.zeros((1, 1), jnp.int32))
    batch = Batch(**rows, sides={"chosen": side(0), "rejected": side(1)})
    log_prob = jnp.asarray(rng.normal(0, 10, 2 * size), jnp.float32)
    settings: dict[str, Any] = {"block": int(block) if block.isdigit() else block, **WEIGHTINGS[weighting]}
    config = Config(contrast=ContrastConfig(weights="embedding", **settings), batch=BatchConfig(pairs=size))
    method, mesh = resolve(config), make_mesh(MeshConfig(data=1))
    scores_of = make_scores(method, config.contrast.alpha, config.contrast.block, mesh)

    def loss(log_prob, batch):
        scores, means = scores_of(LogProbs(log_prob, jnp.ones(2 * size, jnp.int32)), batch, True, None)
        return method.objective.loss(scores), means

    function = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(log_prob, batch).compile()
    jax.block_until_ready(batch)
    before, seconds, busy = peak_bytes(), [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        (value, _), gradient = jax.block_until_ready(function(log_prob, batch))
        seconds.append(time.perf_counter() - started[0])
        busy.append(time.process_time() - started[1])
    return {
        "size": size,
        "weighting": weighting,
        "block": block,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(busy),
        "peak_mib": (peak_bytes() - before) / 2**20,
        "loss": float(value),
        "gradient": float(jnp.linalg.norm(gradient)),
    }


def run_cell(size: int, weighting: str, block: str, repeats: int) -> dict[str, Any]:
    arguments = [str(size), weighting, block, str(repeats)]
    command = [sys.executable, "-m", "benchmarks.big_matrix", "--cell", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "XLA_FLAGS": ""})
    cell = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(cell), flush=True)
    return cell


def table(cells: list[dict], command: str) -> str:
    lines = [
        f"`{command}`, {os.cpu_count()} cores:",
        "",
        "| M = N | weights | matrix | seconds | CPU seconds | CPU seconds / whole | memory, MiB | M N 4 bytes, MiB "
        "| loss differs by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole = {(cell["size"], cell["weighting"]): cell for cell in cells if cell["block"] == "dense"}
    for cell in cells:
        beside = whole.get((cell["size"], cell["weighting"]))
        ratio, difference = "", ""
        if beside and beside is not cell:
            ratio = f"{cell['cpu_seconds'] / beside['cpu_seconds']:.2f}"
            difference = f"{abs(cell['loss'] / beside['loss'] - 1):.0e}"
        kind = "whole" if cell["block"] == "dense" else f"blocks of {cell['block']}"
        lines.append(
            f"| {cell['size']:,} | {cell['weighting']} | {kind} | {cell['seconds']:.3g} | "
            f"{cell['cpu_seconds']:.3g} | {ratio} | {cell['peak_mib']:,.0f} | "
            f"{cell['size'] ** 2 * 4 / 2**20:,.0f} | {difference} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=int, default=4096, help="size at which blocks run beside the whole matrix")
    parser.add_argument("--size", type=int, default=65_536, help="size in blocks alone")
    parser.add_argument("--blocks", default="1024", help="edges of blocks, separated by commas")
    parser.add_argument("--weightings", default=",".join(WEIGHTINGS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of a cell; of the large size one is made")
    parser.add_argument("--into", type=Path, help="Markdown file to write the table into, between its marks")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell:
        size, weighting, block, repeats = options.cell
        print(json.dumps(measure(int(size), weighting, block, int(repeats))))
        return
    blocks, weightings = options.blocks.split(","), options.weightings.split(",")
    cells = [
        run_cell(options.beside, weighting, block, options.repeats)
        for weighting in weightings
        for block in ("dense", *blocks)
    ]
    if options.size:
        cells += [run_cell(options.size, weighting, blocks[-1], 1) for weighting in weightings]
    text = table(cells, " ".join(["python -m benchmarks.big_matrix", *argv]))
    print(text)
    if options.into:
        content = options.into.read_text(encoding="utf-8")
        begin, end = (content.index(mark) for mark in MARKS)
        options.into.write_text(content[: begin + len(MARKS[0])] + f"\n\n{text}\n\n" + content[end:], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
