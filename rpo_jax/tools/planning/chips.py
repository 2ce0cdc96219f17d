"""Accelerators by their makers' published figures, per device. Nothing here was measured by us."""

from __future__ import annotations

from dataclasses import dataclass

GIGA = 1e9
TERA = 1e12
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one device.

    Attributes:
        name: key of CHIPS.
        flops: dense bfloat16 operations a second, a multiplication and an addition counted as two.
        memory: bytes.
        memory_rate: bytes a second between memory and chip.
        link_rate: bytes a second that it can send to its neighbours, all links together, one way.
        source: the maker's page that says so.
        device_kind: what JAX calls it; None where no plan compiles for it.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    source: str
    device_kind: str | None = None


def _tpu(name: str, kind: str, teraflops: float, gib: float, memory_rate: float, link_gigabits: float) -> Chip:
    return Chip(
        name=name,
        flops=teraflops * TERA,
        memory=gib * GIB,
        memory_rate=memory_rate * GIGA,
        link_rate=link_gigabits / 8 * GIGA,
        source=f"https://cloud.google.com/tpu/docs/{name}",
        device_kind=kind,
    )


def _gpu(name: str, teraflops: float, gigabytes: float, memory_rate: float, both_ways: float, source: str) -> Chip:
    return Chip(
        name=name,
        flops=teraflops * TERA,
        memory=gigabytes * GIGA,
        memory_rate=memory_rate * GIGA,
        link_rate=both_ways / 2 * GIGA,  # the makers add both directions of NVLink up
        source=source,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 275, 32, 1200, 2400),
        _tpu("v5e", "TPU v5 lite", 197, 16, 819, 1600),
        _tpu("v5p", "TPU v5", 459, 95, 2765, 4800),
        _tpu("v6e", "TPU v6 lite", 918, 32, 1640, 3200),
        _gpu("a100-40gb", 312, 40, 1555, 600, "https://www.nvidia.com/en-us/data-center/a100"),
        _gpu("a100-80gb", 312, 80, 2039, 600, "https://www.nvidia.com/en-us/data-center/a100"),
        _gpu("h100", 989, 80, 3350, 900, "https://www.nvidia.com/en-us/data-center/h100"),
        _gpu("h200", 989, 141, 4800, 900, "https://www.nvidia.com/en-us/data-center/h200"),
        _gpu("l40s", 362, 48, 864, 64, "https://www.nvidia.com/en-us/data-center/l40s"),
    )
}
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.device_kind)
GPUS = tuple(chip.name for chip in CHIPS.values() if not chip.device_kind)
