"""The same suite on a GPU: a 1B-class Llama in bfloat16, 64 pairs a step of Anthropic-HH's lengths, beside PyTorch.

python -m benchmarks.gpu [--tiny] [options of benchmarks.suite]

Needs one environment with rpo_jax[cuda] and PyTorch with CUDA and transformers, or --peers-python for the latter. The
table's share of the ceiling is the model-FLOP utilisation of necessary arithmetic against the measured bfloat16 matmul
rate, its memory the accelerator's peak. PyTorch keeps its weights in bfloat16, as the authors' release does; rpo_jax
keeps float32 masters. With --tiny it runs on the CPU, a tiny model, to prove the code path.

It has not been run on a GPU yet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import suite

COMMON = (
    *("--name", "gpu", "--dtype", "bfloat16", "--workloads", "H", "--pairs", "64"),
    *(
        "--systems",
        "ours-cached,ours-live,torch-rpo",
        "--steps",
        "5",
        "--warmup",
        "2",
        "--peers-python",
        sys.executable,
    ),
)
# A 1B model's activations for all rows at once are more than the fastest step needs to keep.
FULL_SIZE = ("--device", "gpu", "--model", "llama-1b", "--set", "model.remat=dots")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Later options win, so any of these can be given anew.
    return suite.main([*COMMON, *(() if "--tiny" in given else FULL_SIZE), *given])


if __name__ == "__main__":
    raise SystemExit(main())
