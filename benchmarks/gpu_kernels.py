"""What NVIDIA's compiler makes of our kernels (attention, products by experts), for GPUs that are not here.

PYTHONPATH=.venv-cuda python -m benchmarks.gpu_kernels [--targets h100,b200] [--head-dims 64,128] [--dtypes bfloat16]

Compiled by JAX's CUDA plugin (rpo_jax.plan says how to install it), run on nothing. The second table is a bound by
arithmetic: what the blocks of a row that the plan lists cost at the makers' peak rates. It was not measured.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpo_jax.models import grouped
from rpo_jax.models.attention import fused, visits
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.masking import TokenIds
from rpo_jax.models.attention.registry import Asked
from rpo_jax.tools.planning.chips import CHIPS
from rpo_jax.tools.planning.targets import target_of

KERNELS = {"_forward_kernel": "forward", "_queries_kernel": "queries", "_keys_kernel": "keys"}
# Two products of a block of queries and one of keys forward; what the two of the backward pass do in theirs.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}
GROUPED = {
    "grouped_product": "product by groups",
    "grouped_product_transposed": "its gradient by rows",
    "grouped_gradient": "its gradient by matrices",
}
EXPERTS, ROWS, WIDTH = 8, 4096, 1024  # groups, rows of all, inputs and outputs; tiles are those of larger ones
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
HEADER = (
    "GPU",
    "PTX for",
    "head dimension",
    "dtype",
    "kernel",
    "block kept x passing",
    "warps",
    "registers",
    "spilled, B",
    "shared memory, KiB",
    "programs a core",
    "tensor-core instructions",
)
ROOFS = ("a100-80gb", "h100", "b200")
ROOF_HEADER = (
    "tokens of a row",
    "blocks visited",
    "of all before",
    "TFLOP forward, backward",
    "FLOP a byte read, forward",
    *(f"ms on {name}: forward, backward" for name in ROOFS),
)
HEADS, GROUPS = 32, 8
WARP, REGISTERS, RESERVED = (
    32,
    65536,
    1024,
)  # threads; of a core; bytes of shared memory that CUDA takes of each program


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel; bytes, and programs that fit on a core of the GPU at a time."""

    target: str
    arch: str
    head_dim: int | None
    dtype: str
    kernel: str
    kept: int
    passing: int
    warps: int
    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: dict[str, int]

    def cells(self) -> list[str]:
        return [
            self.target,
            self.arch,
            str(self.head_dim or ""),
            self.dtype,
            self.kernel,
            f"{self.kept} x {self.passing}",
            str(self.warps),
            str(self.registers),
            str(self.spilled),
            f"{self.shared / 1024:.0f}",
            str(self.programs),
            ", ".join(f"{count} {name}" for name, count in self.instructions.items()) or "none",
        ]


def ptxas() -> str:
    """NVIDIA's assembler: beside JAX's CUDA plugin, or the PATH's."""
    for folder in sys.path:
        for found in Path(folder).glob("nvidia/cu*/bin/ptxas"):
            return str(found)
    found = shutil.which("ptxas")
    if found is None:
        raise SystemExit("error: ptxas is not here; rpo_jax.plan --topology h100:1 says how to install it")
    return found


def compile_kernels(
    target: str, head_dim: int, dtype: str, *, windowed: bool = True, softcap: float | None = None, tokens: int = 2048
) -> list[Kernel]:
    """Forward and backward for one GPU of a kind."""
    place = jax.sharding.SingleDeviceSharding(target_of(f"{target}:1").devices[0])

    def of(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, tokens, heads, head_dim), dtype, sharding=place)

    ids: Any = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=place)
    windows = (None, 512) if windowed else (None,)

    def total(query: Any, key: Any, value: Any, ids: TokenIds) -> Any:
        out = fused.make(ids, windows, Split(), softcap)(query, key, value, jnp.array(0))
        return jnp.sum(out.astype(jnp.float32))

    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(
        of(HEADS), of(GROUPS), of(GROUPS), TokenIds(ids, ids, ids)
    )
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile({"xla_dump_to": folder})
        return read_kernels(Path(folder), target, head_dim, dtype)


def compile_grouped(target: str, dtype: str) -> list[Kernel]:
    """Products by groups, and their gradients, for one GPU of a kind."""
    place = jax.sharding.SingleDeviceSharding(target_of(f"{target}:1").devices[0])
    shapes = ((ROWS, WIDTH), (EXPERTS, WIDTH, WIDTH))
    x, matrices = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes)
    rows_of = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=place)

    def total(x: Any, matrices: Any, rows_of: Any) -> Any:
        return jnp.sum(jnp.square(grouped.grouped_product(x, matrices, rows_of).astype(jnp.float32)))

    lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, matrices, rows_of)
    rows, (most, inner) = grouped.rows_of_tile(ROWS, EXPERTS, dtype), grouped.sizes(dtype)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile({"xla_dump_to": folder})
        for name, kernel in GROUPED.items():
            kept = most if name == "grouped_gradient" else rows
            tiles = fused.Tiles(kept, inner, grouped.WARPS, grouped.STAGES)
            found.append(read_kernel(Path(folder), name, kernel, tiles, target, None, dtype))
    return found


def read_kernels(folder: Path, target: str, head_dim: int, dtype: str) -> list[Kernel]:
    """Those of attention that a compiler's dump in a folder has."""
    return [
        read_kernel(folder, name, kernel, fused.tiles(kernel, head_dim, dtype), target, head_dim, dtype)
        for name, kernel in KERNELS.items()
    ]


def read_kernel(
    folder: Path, name: str, kernel: str, tiles: fused.Tiles, target: str, head_dim: int | None, dtype: str
) -> Kernel:
    """Registers, memory and instructions of a kernel that a compiler's dump in a folder has under a name."""
    launched = next(folder.glob("*.thunk_sequence.txt")).read_text(encoding="utf-8")
    texts = {file: file.read_text(encoding="utf-8") for file in folder.glob("*.ptx")}
    ((file, text),) = [(file, text) for file, text in texts.items() if f".entry {name}(" in text]
    (arch,) = re.findall(r"^\.target (\w+)", text, re.MULTILINE)
    command = [ptxas(), "-v", f"-arch={arch}", str(file), "-o", str(folder / "cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", usage)[0])
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", usage))
    shared = int(re.findall(rf"{name} .*shared_memory: (\d+) bytes", launched)[0])
    programs = programs_of(target, registers, shared, tiles.warps)
    place = target, arch, head_dim, dtype, kernel, tiles.kept, tiles.passing, tiles.warps
    return Kernel(*place, registers, spilled, shared, programs, dict(Counter(TENSOR_CORE.findall(text))))


def programs_of(target: str, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on a core at a time: by its registers, given out by 8 a thread, shared memory and threads."""
    gpu = CHIPS[target].gpu
    of_program = -(-registers // 8) * 8 * WARP * warps
    by_shared = gpu["shared_memory_per_core"] // (shared + RESERVED) if shared else 32
    return min(REGISTERS // of_program, by_shared, gpu["threads_per_core"] // (WARP * warps))


def row_of_a_pair(tokens: int) -> TokenIds:
    """Ids of a row of one prompt and two answers of half its length; [1, T]."""
    prompt, answer = tokens // 2, tokens // 4
    branches = np.repeat((0, 1, 2), (prompt, answer, answer))
    positions = np.concatenate([np.arange(prompt), *[prompt + np.arange(answer)] * 2])
    ids = positions, np.ones(tokens), branches
    return TokenIds(*(jnp.array(x[None], jnp.int32) for x in ids))


@dataclass(frozen=True)
class Roof:
    """What the blocks of one row that the plan lists cost, all heads of a layer.

    Attributes:
        visited: pairs of a LARGE and a SMALL block, forward.
        causal: pairs that a kernel without a plan visits.
        flops: forward and backward.
        intensity: operations a byte that programs read, forward; from whichever memory.
        bytes: of each array once, forward and backward.
    """

    tokens: int
    visited: int
    causal: int
    flops: tuple[float, float]
    intensity: float
    bytes: tuple[float, float]

    def milliseconds(self, name: str) -> tuple[float, float]:
        """At the maker's peak rates: arithmetic, or each array read or written once, whichever takes longer."""
        chip = CHIPS[name]
        pairs = zip(self.flops, self.bytes, strict=True)
        forward, backward = (1e3 * max(flops / chip.flops, moved / chip.memory_rate) for flops, moved in pairs)
        return forward, backward


def roof(tokens: int, head_dim: int = 128, number: int = 2) -> Roof:
    """Of a row of one pair; HEADS query heads and GROUPS key-value heads, numbers of so many bytes."""
    plan = jax.jit(partial(visits.make_plan, window=None))(row_of_a_pair(tokens))
    by_queries, by_keys = (int(found.seen.sum()) for found in plan)
    blocks = tokens // visits.LARGE
    product = 2.0 * visits.LARGE * visits.SMALL * head_dim * HEADS
    row = number * tokens * head_dim
    read = HEADS * number * head_dim * (2 * tokens + 2 * visits.SMALL * by_queries)
    once = row * (2 * HEADS + 2 * GROUPS), row * (4 * HEADS + 4 * GROUPS)
    flops = PRODUCTS["forward"] * product * by_queries
    backward = product * (PRODUCTS["queries"] * by_queries + PRODUCTS["keys"] * by_keys)
    return Roof(tokens, by_queries, blocks * (blocks + 1), (flops, backward), flops / read, once)


def roof_cells(one: Roof) -> list[str]:
    times = [" , ".join(f"{value:.2f}" for value in one.milliseconds(name)) for name in ROOFS]
    return [
        f"{one.tokens:,}",
        f"{one.visited:,}",
        f"{one.visited / one.causal:.0%}",
        ", ".join(f"{flops / 1e12:.2f}" for flops in one.flops),
        f"{one.intensity:.0f}",
        *(time.replace(" ,", ",") for time in times),
    ]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for cells in (header, ["---"] * len(header)):
        print("|", " | ".join(cells), "|")
    for cells in rows:
        print("|", " | ".join(cells), "|", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--targets", type=names, default=["a100-80gb", "h100", "b200", "rtx4090"])
    parser.add_argument("--head-dims", type=names, default=["64", "128", "256"])
    parser.add_argument("--dtypes", type=names, default=["bfloat16", "float32"])
    parser.add_argument("--softcap", type=float, help="of the scores")
    parser.add_argument("--tokens", type=names, default=["2048", "8192", "32768"], help="of rows, for the second table")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: GPUs that are here are left alone
    cases = [(t, int(d), name) for t in options.targets for d in options.head_dims for name in options.dtypes]
    cases = [case for case in cases if Asked(case[2], case[1]).lacks(fused.KIND) is None]
    kernels = (kernel for case in cases for kernel in compile_kernels(*case, softcap=options.softcap))
    of_experts = (kernel for t in options.targets for name in options.dtypes for kernel in compile_grouped(t, name))
    print_table(HEADER, (kernel.cells() for kernel in itertools.chain(kernels, of_experts)))
    print(f"\nA bound by arithmetic, {HEADS} query and {GROUPS} key-value heads of 128, bfloat16; not measured:\n")
    print_table(ROOF_HEADER, (roof_cells(roof(int(tokens))) for tokens in options.tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
