"""The benchmarks of GPUs, where there is none: what runs is told, and what is counted is right."""

import re
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu, gpu_kernels, suite
from rpo_jax.models.attention.fused import KIND
from rpo_jax.models.attention.masking import visible
from rpo_jax.models.attention.visits import LARGE, SMALL


@pytest.mark.slow
def test_all_parts_run_in_order_on_the_cpu(capfd):
    assert gpu.main(["--tiny"]) == 0
    told = capfd.readouterr().out
    assert re.findall(r"^(\w+): ok", told, re.MULTILINE) == list(gpu.PARTS)
    assert "256 tokens x 1 rows, fused" in told
    assert "tokens/s" in told
    assert "bit for bit the same" in told


def test_a_part_that_fails_or_hangs_takes_no_other_with_it(monkeypatch, capfd):
    """The first cannot read its options, the second has no time to begin."""
    monkeypatch.setitem(gpu.PARTS, "sampling", (gpu.sampling, 0.01))
    assert gpu.main(["--tiny", "--parts", "torch,sampling", "--pairs", "none"]) == 1
    told = capfd.readouterr()
    assert re.findall(r"^(\w+): (\w+)", told.out, re.MULTILINE) == [("torch", "failed"), ("sampling", "stopped")]
    assert "invalid numbers value: 'none'" in told.err


def test_what_a_part_has_started_ends_with_it(monkeypatch, tmp_path):
    """A cell that went on would hold the GPU's memory."""
    script, told = tmp_path / "python", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {told}\nwait\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(script))
    assert gpu.run_part("step", [], False, 2.0) == "stopped after 2 s"
    process = Path("/proc") / told.read_text(encoding="ascii").strip() / "stat"

    def runs() -> bool:
        try:
            return process.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    for _ in range(100):  # a killed process is there for a moment
        if not runs():
            return
        time.sleep(0.05)
    pytest.fail("what the part started still runs")


def test_the_step_needs_no_pytorch_and_tells_why_it_gave_nothing(monkeypatch, tmp_path):
    systems = []

    def run_cell(spec, *_):
        systems.append(spec.system)
        return {"spec": asdict(spec), "status": "out of memory", "measured": {}}

    monkeypatch.delenv("PEERS_PYTHON", raising=False)
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "run_cell", run_cell)
    with pytest.raises(SystemExit, match="the step gave nothing: out of memory"):
        gpu.step(True, [])
    assert systems == ["ceiling-jax", "ours-cached", "ours-live"]


def test_all_parts_take_at_most_eight_minutes():
    assert sum(limit for _, limit in gpu.PARTS.values()) <= 8 * 60
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "losses,everything"])


def test_the_bound_counts_the_blocks_that_see_something():
    tokens, head_dim = 1024, 64
    ids = gpu_kernels.row_of_a_pair(tokens)
    found = gpu_kernels.roof(tokens, head_dim)
    blocks = np.asarray(visible(*ids, None))[0].reshape(tokens // LARGE, LARGE, tokens // SMALL, SMALL).any((1, 3))
    assert found.visited == blocks.sum() < found.causal
    pairs = gpu_kernels.HEADS * LARGE * SMALL * blocks.sum()
    assert found.flops[0] == 2 * 2 * pairs * head_dim
    products = KIND.backward_products
    assert found.flops[1] == pytest.approx(products * 2 * pairs * head_dim, rel=0.1), "blocks of keys are cut otherwise"
    assert 30 < found.intensity < LARGE
    assert found.milliseconds("h100")[0] == pytest.approx(1e3 * found.flops[0] / 989e12, rel=0.2)


def test_programs_on_a_core_are_bound_by_what_runs_out_first():
    assert gpu_kernels.programs_of("h100", registers=128, shared=1024, warps=8) == 2
    assert gpu_kernels.programs_of("h100", registers=32, shared=64 * 1024, warps=4) == 3
    assert gpu_kernels.programs_of("rtx4090", registers=32, shared=0, warps=8) == 6
