"""The data of the benchmark: lengths of its workloads, and random token ids of these lengths. NumPy only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.spec import CellSpec, ModelSizes
from rpo_jax.tools.planning.arithmetic import necessary_flops

HH_LENGTHS = Path(__file__).with_name("hh_lengths.json")
SMOLLM2_LENGTHS = Path(__file__).with_name("hh_lengths_smollm2.json")

PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3  # ids below are special
EMBEDDING_WIDTH = 384  # all-MiniLM-L6-v2
NUM_EXAMPLES = 2048  # so that row lengths and row counts are chosen as for a real data set

Lengths = np.ndarray  # [n, 3]: tokens of prompt, chosen and rejected response


def _uniform(prompt: tuple[int, int], response: tuple[int, int]) -> Callable[[np.random.Generator, int], Lengths]:
    def draw(rng: np.random.Generator, count: int) -> Lengths:
        columns = (prompt, response, response)
        return np.stack([rng.integers(low, high + 1, count) for low, high in columns], axis=1)

    return draw


def _real(file: Path) -> Callable[[np.random.Generator, int], Lengths]:
    """Lengths of a real file, each pair's three together, in random order; again from the start if need be."""

    def draw(rng: np.random.Generator, count: int) -> Lengths:
        lengths = np.array(json.loads(file.read_text(encoding="utf-8"))["lengths"])
        return lengths[rng.permutation(len(lengths))[np.arange(count) % len(lengths)]]

    return draw


WORKLOADS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "A": _uniform((32, 256), (16, 256)),
    "B": _uniform((192, 256), (16, 64)),
    "H": _real(HH_LENGTHS),
    "S": _real(SMOLLM2_LENGTHS),
}
MODEL_OF = {"S": "smollm2-135m"}  # key of MODELS; of the others "small"


def make_lengths(workload: str, count: int, *, seed: int, shrink: int = 1) -> Lengths:
    """[count, 3] tokens of prompt, chosen and rejected response, at least 2 each."""
    rng = np.random.default_rng([seed, sorted(WORKLOADS).index(workload)])
    return np.maximum(WORKLOADS[workload](rng, count) // shrink, 2)


@dataclass(frozen=True)
class Pair:
    """Token ids of one example; both responses end with EOS, the prompt starts with BOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    embedding: np.ndarray

    @property
    def useful_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def necessary_flops(self, sizes: ModelSizes, frozen: bool = False) -> int:
        return necessary_flops(sizes, len(self.prompt), (len(self.chosen), len(self.rejected)), frozen=frozen)


def make_pairs(spec: CellSpec) -> list[Pair]:
    """The examples of a cell, the same for every system; batch k of a run is the k-th `pairs` of them."""
    count = max(NUM_EXAMPLES // spec.shrink, spec.pairs * (spec.warmup + spec.steps))
    rng = np.random.default_rng([spec.seed, 7])

    def words(tokens: int) -> list[int]:
        return rng.integers(FIRST_WORD, spec.sizes.vocab_size, tokens - 1).tolist()

    lengths = make_lengths(spec.workload, count, seed=spec.seed, shrink=spec.shrink)
    return [
        Pair(
            prompt=[BOS, *words(prompt)],
            chosen=[*words(chosen), EOS],
            rejected=[*words(rejected), EOS],
            embedding=rng.normal(size=EMBEDDING_WIDTH).astype(np.float32),
        )
        for prompt, chosen, rejected in lengths.tolist()
    ]


def batch_of(spec: CellSpec, pairs: list[Pair], step: int) -> list[Pair]:
    """The pairs of a step, counted from 0, warm-up included."""
    return pairs[step * spec.pairs : (step + 1) * spec.pairs]


def timed_work(spec: CellSpec, pairs: list[Pair]) -> tuple[list[int], list[float]]:
    """Useful tokens and necessary operations of each timed step."""
    batches = [batch_of(spec, pairs, step) for step in range(spec.warmup, spec.warmup + spec.steps)]
    tokens = [sum(pair.useful_tokens for pair in batch) for batch in batches]
    frozen = spec.lora_rank > 0
    return tokens, [float(sum(pair.necessary_flops(spec.sizes, frozen) for pair in batch)) for batch in batches]
