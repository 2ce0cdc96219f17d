"""What a cell of the table is, and what it reports: standard library only, read by every environment."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A Llama of random weights, the same in every system."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


MODELS = {
    "small": ModelSizes(
        hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=4, vocab_size=32_000
    ),
    "tiny": ModelSizes(
        hidden_size=64, intermediate_size=176, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=512
    ),
    # The sizes of SmolLM2-135M-Instruct.
    "smollm2-135m": ModelSizes(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        vocab_size=49_152,
        tie_embeddings=True,
        rope_theta=100_000.0,
    ),
    # The sizes of Llama-3.2-1B.
    "llama-1b": ModelSizes(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        tie_embeddings=True,
    ),
}

MAX_POSITIONS = 1024  # longer than any sequence of the workloads


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """One measurement.

    Args:
        system: key of benchmarks.suite.SYSTEMS.
        workload: key of benchmarks.workloads.WORKLOADS.
        pairs: pairs of a step.
        micro: pairs in a forward pass of the peers, which add gradients up over a step; ours takes
            `--set batch.micro_rows` instead.
        warmup: full steps before the timed ones.
        steps: timed steps.
        repeat: how often the suite has measured this cell before.
        model: key of MODELS.
        lora_rank: of adapters on every linear layer of a frozen model; 0 trains all weights.
        dtype: of the matrix products.
        device: cpu or gpu.
        shrink: every length of the workload is divided by this.
        seed: of the data.
        settings: `section.key=value` of rpo_jax's configuration.
        cache_dir: rpo_jax's compiled programs.
        started: time.time() when the process was started.
    """

    system: str
    workload: str
    pairs: int
    micro: int
    warmup: int
    steps: int
    repeat: int = 0
    model: str = "small"
    lora_rank: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "gpu"] = "cpu"
    shrink: int = 1
    seed: int = 0
    settings: tuple[str, ...] = ()
    cache_dir: str = ""
    started: float = 0.0

    @property
    def sizes(self) -> ModelSizes:
        return MODELS[self.model]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CellSpec:
        values = json.loads(text)
        return cls(**{**values, "settings": tuple(values["settings"])})


@dataclass
class Measurement:
    """What a cell reports; seconds of each timed step, and what there is to tell besides.

    Attributes:
        step_seconds: one per timed step.
        useful_tokens: one per timed step: each prompt once, and its responses.
        necessary_flops: one per timed step, see rpo_jax.tools.planning.arithmetic.
        processor_seconds: of all cores, one per timed step: over `step_seconds`, how many cores were at work.
        first_step_seconds: from the start of the process to the end of the first training step, of which
            `reference_seconds` went into reference log-probs computed ahead.
        peak_rss_bytes: of the whole process, compilation included.
        peak_device_bytes: of the accelerator; 0 on CPU.
        notes: what else was seen: versions, shapes, compilations.
    """

    step_seconds: list[float] = field(default_factory=list)
    useful_tokens: list[int] = field(default_factory=list)
    necessary_flops: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0
    reference_seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def peak_rss_bytes() -> int:
    """Most memory that this program has held.

    VmHWM, not getrusage: the latter starts with what the parent held when it forked.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def seconds_since_start(spec: CellSpec) -> float:
    """Wall time since the suite started this process, imports included."""
    return time.time() - spec.started


def command_line() -> tuple[CellSpec, Path]:
    """A cell's arguments: its specification as JSON, and the file to report to."""
    return CellSpec.from_json(sys.argv[1]), Path(sys.argv[2])


def report(measured: Measurement, path: Path) -> None:
    measured.peak_rss_bytes = peak_rss_bytes()
    path.write_text(json.dumps(asdict(measured)), encoding="utf-8")
