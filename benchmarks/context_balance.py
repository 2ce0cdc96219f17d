"""How evenly devices that share rows share their work: python -m benchmarks.context_balance

A row's work is counted in blocks of keys that its blocks of queries see, and in scored tokens, which the head runs on.
Told is what the device with most of it has, over the mean, for four ways to deal a row's tokens to devices: one part
each; one part from the front and one from the back (zig-zag); stripes in turn, of core.shards' length or four times it.
Counted in NumPy; nothing runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rpo_jax.core.shards import STRIPE

KEYS = 64  # of a block that is seen or not
DEVICES = (2, 8)
WAYS = ("one part each", "zig-zag", f"stripes of {STRIPE}", f"stripes of {4 * STRIPE}")
HEADER = ("row", "devices", *(f"{way}: blocks, scored" for way in WAYS))

Segment = tuple[int, list[int]]  # tokens of a prompt, and of each response to it


def work(tokens: int, segments: list[Segment]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Blocks of keys that each stripe of queries sees, and its scored tokens."""
    seen, scored = np.zeros((tokens // STRIPE, tokens // KEYS), bool), np.zeros(tokens // STRIPE)
    first = 0
    for prompt, responses in segments:
        start = first
        for number, length in enumerate((prompt, *responses)):
            end = start + length
            for stripe in range(start // STRIPE, -(-end // STRIPE)):
                begin, last = max(start, stripe * STRIPE), min(end, (stripe + 1) * STRIPE) - 1
                seen[stripe, start // KEYS : last // KEYS + 1] = True
                if number:
                    seen[stripe, first // KEYS : (first + prompt - 1) // KEYS + 1] = True
                    scored[stripe] += last + 1 - begin
            start = end
        first = start
    return seen.sum(1).astype(float), scored


def unevenness(work: Float[np.ndarray, "n"], devices: int) -> list[float]:
    """The most that a device has over the mean, by WAYS."""
    halves = work.reshape(2 * devices, -1).sum(1)
    shares = [work.reshape(devices, -1).sum(1), halves[:devices] + halves[::-1][:devices]]
    shares += [work.reshape(-1, devices, stripes).sum((0, 2)) for stripes in (1, 4)]
    return [float(share.max() / share.mean()) for share in shares]


def short_pairs(tokens: int, seed: int = 0) -> list[Segment]:
    """Pairs of Anthropic-HH's lengths, as many as a row holds."""
    lengths = json.loads((Path(__file__).parent / "hh_lengths.json").read_text(encoding="utf-8"))["lengths"]
    rng, found = np.random.default_rng(seed), []
    while True:
        prompt, *responses = lengths[rng.integers(len(lengths))]
        if sum(p + sum(r) for p, r in found) + prompt + sum(responses) > tokens:
            return found
        found.append((prompt, responses))


ROWS: dict[str, tuple[int, list[Segment]]] = {
    "2k, answers of 15k and 15k": (32_768, [(2_048, [15_360, 15_360])]),
    "16k, answers of 8k and 8k": (32_768, [(16_384, [8_192, 8_192])]),
    "1k, answers of 20k and 5k, padding": (32_768, [(1_024, [20_480, 5_120])]),
    "1k, five answers of 6k": (32_768, [(1_024, [6_144] * 5)]),
    "short pairs, 32k in all": (32_768, short_pairs(32_768)),
}


def table() -> list[str]:
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    for name, row in ROWS.items():
        for devices in DEVICES:
            found = zip(*(unevenness(one, devices) for one in work(*row)), strict=True)
            lines.append(" | ".join((name, str(devices), *(f"{blocks:.2f}, {scored:.2f}" for blocks, scored in found))))
    return [f"| {line} |" for line in lines]


if __name__ == "__main__":
    print(*table(), sep="\n")
