"""Plans for TPU slices, by libtpu: packed attention included, for eight chips that are not here."""

import json
import re
from functools import partial

import jax
import pytest

from rpo_jax import plan
from rpo_jax.config import BatchConfig, Config, MeshConfig, OptimConfig, PolicyConfig
from rpo_jax.hosts import sharding
from rpo_jax.objectives.logprobs import CHUNK_TOKENS, REST_SHARE
from rpo_jax.tools.planning import hlo
from rpo_jax.tools.planning.arithmetic import StepSizes, step_bytes
from rpo_jax.tools.planning.compiled import abstract_batch
from rpo_jax.tools.planning.targets import tpu_target
from rpo_jax.tools.planning.workload import BatchShape
from rpo_jax.training.step import build_steps
from tests.worlds import small_model

pytest.importorskip("libtpu", reason="only libtpu compiles for TPUs: pip install libtpu")

SLICE = ["--topology", "v5e:2x4", "--mesh.data", "1", "--mesh.fsdp", "8", "--model.compute_dtype", "bfloat16"]
SMALL = ["--model.hidden_size", "512", "--model.intermediate_size", "1024", "--model.vocab_size", "4096"]
SMALL += ["--model.num_layers", "6", "--model.num_kv_heads", "2", "--batch.pairs", "64"]


def test_a_small_model_is_planned_with_the_fused_attention_and_nothing_whole_but_its_table(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.main([*SLICE, *SMALL, "--json", str(file)]) == 0
    assert "Compiled for v5e:2x4 by libtpu" in capsys.readouterr().out
    (only,) = json.loads(file.read_text())["plans"]
    found = only["estimate"]
    assert found["fits"]
    assert found["peak_bytes"] < 16 * 2**30
    assert not [line for line in found["surprises"] if "all-gather" in line or "logits" in line]
    layers = [row for row in found["exchanges"] if row["place"] == "loops"]
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024
    assert 0 < max(row["largest"] for row in layers) <= 2 * layer  # bfloat16
    # Each of six layers is gathered for the forward and the backward pass, and its gradient is scattered.
    sent, weights = sum(row["sent"] for row in layers), 6 * 2 * layer * 7 / 8
    assert 0.99 * 3 * weights < sent < 1.4 * 3 * weights  # rings send up to 9 shards where 7 would do


def test_what_does_not_fit_is_told_in_one_line(capsys):
    large = ["--model", "llama2-7b", "--rows", "64", "--row-tokens", "1024", "--no-largest"]
    assert plan.main([*SLICE, *large]) == 1
    error = capsys.readouterr().err
    assert "Ran out of memory" in error
    assert error.count("\n") == 1


def test_a_layout_that_no_slice_has_is_told_with_those_that_there_are(capsys):
    assert plan.main(["--topology", "v5e:3x3", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "4x4, 4x8" in error
    assert error.count("\n") == 1


ON_CHIP = re.compile(r"S\(\d+\)")  # a layout's memory space: not the chip's main memory
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "optimization-barrier")


def main_memory_bytes(text: str) -> int:
    """What a program without loops reads from and writes to the chip's main memory.

    XLA's own count has what lies on the chip too: copies there ahead of time, and what then reads them.
    """
    lines = text[text.index("\nENTRY ") :].splitlines()[2:]
    written, total = {}, 0
    for line in lines:
        match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$", line)
        if match is None:
            continue
        rest = match.group(2).partition(", metadata=")[0].partition("backend_config=")[0]
        # What is in braces may hold parentheses: layouts go before the opcode is looked for.
        opcode = re.search(r" ([a-z][\w-]*)\(", re.sub(r"\{[^{}]*\}", "", f" {rest}")).group(1)
        result, _, after = rest.partition(f"{opcode}(")
        arrays = [
            (hlo.Shape(kind, tuple(int(n) for n in dims.split(",") if n)).bytes, bool(ON_CHIP.search(layout)))
            for kind, dims, layout in ARRAY.findall(result)
        ]
        written[match.group(1)] = main = sum(size for size, on_chip in arrays if not on_chip)
        if opcode in FREE or opcode.endswith("-done"):
            continue
        if opcode in ("copy-start", "slice-start"):  # from one memory to the other, or within the main one
            total += min(size for size, _ in arrays if size > 4)
            continue
        total += main + sum(written.get(name, 0) for name in re.findall(r"%([\w.-]+)", after.split(")")[0]))
    return total


@pytest.mark.slow  # two minutes of compiling: a small model would stay on the chip
def test_bytes_moved_are_those_of_the_compiled_program(monkeypatch):
    """One layer of LLaMA2-7B on one chip, without loops but the head's: what XLA counts there it counts once."""
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    target = tpu_target("v5e:2x2")
    rows, tokens = 16, 1024
    model = small_model(
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=1,
        num_heads=32,
        num_kv_heads=32,
        vocab_size=32000,
        max_position_embeddings=2 * tokens,
    )
    config = Config(
        model=PolicyConfig(compute_dtype="bfloat16", remat="dots"),
        batch=BatchConfig(pairs=8),
        optim=OptimConfig(name="rmsprop"),
        mesh=MeshConfig(data=4),
    )
    mesh = sharding.make_mesh(config.mesh, target.devices)
    batch = BatchShape(rows, tokens, 0, 0, 0, "")
    with jax.set_mesh(mesh):
        steps = build_steps(config, model, mesh, 1)
        packed = abstract_batch(config, steps, mesh, batch)
        compiled = steps.train.lower(steps.abstract_state, packed, None).compile()
    step = StepSizes(
        rows=rows,
        row_tokens=tokens,
        scored_tokens=4 * (CHUNK_TOKENS + CHUNK_TOKENS // REST_SHARE),  # one chunk of each size, on each chip
        seen_pairs=rows * tokens**2,
        micro_batches=1,
        remat="dots",
        fused_attention=True,
    )
    ours = step_bytes(model, step, fsdp=1, tensor=1, row_shards=4, optimizer_slots=1, head_chunk=CHUNK_TOKENS)
    counted = main_memory_bytes(compiled.as_text())
    print(f"{ours / counted:.2f} of the program's {counted / 1e9:.1f} GB")
    assert ours == pytest.approx(counted, rel=0.25)
