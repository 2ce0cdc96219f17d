"""Accelerators by their makers' published figures, per device, from tables.json. Nothing here was measured by us."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

TABLES = json.loads(files("rpo_jax.tools.planning").joinpath("tables.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one device.

    Attributes:
        name: key of CHIPS.
        flops: dense bfloat16 operations a second, a multiplication and an addition counted as two.
        float32_flops: the same in float32: outside the tensor cores of a GPU, in six passes of bfloat16 on a TPU.
        memory: bytes.
        memory_rate: bytes a second between memory and chip.
        link_rate: bytes a second that it can send to its neighbours, all links together, one way.
        network_rate: bytes a second that it can send to other hosts; None where its links reach them.
        source: the maker's page that says so.
        gpu: what the CUDA compiler has to know of a GPU, by the names in templates/gpu_target.txtpb; empty for a TPU.
    """

    name: str
    flops: float
    float32_flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float | None = None
    source: str
    gpu: dict[str, Any]

    def rate(self, compute_dtype: str) -> float:
        """Operations a second of a step that computes in this dtype."""
        return self.float32_flops if compute_dtype == "float32" else self.flops


def _float32_flops(row: dict[str, Any]) -> float:
    if "gpu" not in row:
        return row["teraflops"] * 1e12 / 6
    gpu = row["gpu"]
    return 2 * gpu["cores"] * gpu["fpus_per_core"] * gpu["clock_ghz"] * 1e9


CHIPS = {
    name: Chip(
        name=name,
        flops=row["teraflops"] * 1e12,
        float32_flops=_float32_flops(row),
        memory=row["memory_bytes"],
        memory_rate=row["memory_gigabytes_per_second"] * 1e9,
        link_rate=row["link_gigabytes_per_second"] * 1e9,  # the makers add both directions of NVLink up: half of that
        network_rate=row["network_gigabytes_per_second"] * 1e9 if "gpu" in row else None,
        source=row["source"],
        gpu=row.get("gpu", {}),
    )
    for name, row in TABLES["chips"].items()
}
TPUS = tuple(chip.name for chip in CHIPS.values() if not chip.gpu)
GPUS = tuple(chip.name for chip in CHIPS.values() if chip.gpu)
