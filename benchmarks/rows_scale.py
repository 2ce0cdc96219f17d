"""Time and memory of preparing many short pairs: python -m benchmarks.rows_scale [--pairs N]

Everything from the file to the first batch of a run with uniform weights, and no model: reading, tokenising (text, or
conversations with --chat), the epoch's order and the shapes of its batches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import rpo_jax
from benchmarks.spec import peak_rss_bytes
from rpo_jax.core.records import TokenizedExamples
from rpo_jax.data.tokenizer import train_tokenizer
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training.prepare import batches_of, prepare

GIB = 2**30
_STARTS, _ENDS = ("ka", "lo", "mi", "re", "su", "to"), ("lan", "mer", "nit", "pol", "ras", "tin", "vel")
WORDS = [first + last for first in _STARTS for last in _ENDS]


def write_rows(path: Path, pairs: int, chat: bool, seed: int) -> None:
    """Prompts of 5 to 12 words and responses of 4 to 15."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(low, high + 1)))

    def answer() -> Any:
        return [{"role": "assistant", "content": text(4, 15)}] if chat else text(4, 15)

    with path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            prompt: Any = f"{number}: {text(5, 12)}?"
            prompt = [{"role": "user", "content": prompt}] if chat else prompt
            file.write(json.dumps({"prompt": prompt, "chosen": answer(), "rejected": answer()}) + "\n")


@contextmanager
def timed(name: str, also: Callable[[], str] = lambda: "") -> Iterator[None]:
    started, used = time.perf_counter(), time.process_time()
    yield
    seconds, used = time.perf_counter() - started, time.process_time() - used
    print(f"{name:<28}{seconds:7.1f} s, {used:6.1f} s of this process; peak {peak_rss_bytes() / GIB:.2f} GiB{also()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--chat", action="store_true", help="conversations, through the default chat template")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.pairs, options.chat, seed=0)
        train_tokenizer([" ".join(WORDS), "0123456789: ?"] * 10, 400, folder / "tokenizer")
        config = rpo_jax.load_config(
            None,
            [
                f"data.path={folder / 'rows.jsonl'}",
                f"run.dir={folder / 'run'}",
                f"run.cache_dir={folder / 'cache'}",
                f"model.tokenizer={folder / 'tokenizer'}",
                "contrast.weights=uniform",
                f"batch.pairs={options.batch}",
                "data.eval_rows=0",
            ],
        )
        size = (folder / "rows.jsonl").stat().st_size
        print(f"{options.pairs:,} pairs, {size / GIB:.2f} GiB of JSON lines; before: {peak_rss_bytes() / GIB:.2f} GiB")
        with timed("prepare"):
            prepared = prepare(config, Reporter())
        flat = prepared.train.examples
        assert isinstance(flat, TokenizedExamples)
        each = flat.num_bytes / len(flat)
        print(f"kept: {each:.0f} bytes a pair of {flat.num_tokens / len(flat):.1f} tokens, names of rows among them")
        with timed("pools and shapes"):
            batches = batches_of(config, prepared.train, prepared.responses, 1)
            shapes = batches.shapes
        print(f"shapes: {', '.join(f'{shape.rows} x {shape.tokens}' for shape in shapes)}")
        with timed("first batch"):
            batches.batch_at(0)
        with timed("another epoch's first batch"):
            batches.batch_at(batches.steps_per_epoch)
        with timed("100 batches"):
            for step in range(1, 101):
                batches.batch_at(step)


if __name__ == "__main__":
    main()
