"""Sampling beside transformers' `generate`, in one process on the same weights and prompts.

    python -m benchmarks.generate [--batch 32] [--prompt-tokens 128] [--new-tokens 256] [--rounds 3]
    python -m benchmarks.generate --prompts 128 --prompt-tokens 32-256 --new-tokens 16-256   # of many lengths
    python -m benchmarks.generate --parts    # what a token of rpo_jax is made of, and what memory alone would allow

Both sample greedily and no answer ends early; the systems take turns, so that noise meets both alike. Prompts and
answers of many lengths are given to transformers sorted by prompt and padded on the left, and a batch ends with its
longest answer. Compilation is not in the seconds: the first round of each is not counted. Besides seconds there is
the processor's time, which other programs on the machine change less; for it PyTorch takes one thread, or its waiting
threads would count. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.spec import MAX_POSITIONS, MODELS
from benchmarks.workloads import BOS, EOS, FIRST_WORD, PAD
from rpo_jax import models
from rpo_jax.config import MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models.attention.kind import ONE_DEVICE
from rpo_jax.models.decoder import rotations
from rpo_jax.sampling import kv_cache
from rpo_jax.sampling.engine import Engine, Sampling, choose
from rpo_jax.sampling.kv_cache import to_decode_layout

RESULTS = Path(__file__).with_name("results") / "generate.jsonl"
Tokens = list[list[int]]
System = Callable[[Sequence[int]], Tokens]  # most tokens of every answer, to the answers


def make_model(size: str) -> tuple[models.ModelConfig, Any]:
    sizes = MODELS[size]
    model_config = models.new_config(
        family="llama",
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        tie_embeddings=sizes.tie_embeddings,
        rope_theta=sizes.rope_theta,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return model_config, jax.jit(models.init_params, static_argnums=0)(model_config, jax.random.key(0))


def ours(
    model_config: models.ModelConfig, params: Any, prompts: Sequence[np.ndarray], sampling: Sampling, rows: int
) -> System:
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        placed = jax.jit(to_decode_layout, static_argnums=(1, 2))(params, "float32", mesh.devices.flat[0].platform)
    engine = Engine(model_config, mesh, sampling=sampling, end_ids=())

    def run(limits: Sequence[int]) -> Tokens:
        with jax.set_mesh(mesh):
            ended = engine.answers(placed, prompts, range(len(prompts)), limits, rows)
            return [ids for _, ids in sorted(pair for some in ended for pair in some)]

    return run


def theirs(
    model_config: models.ModelConfig,
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    rows: int,
    folder: Path,
) -> System:
    import torch
    from transformers import AutoModelForCausalLM

    models.save_pretrained(folder, model_config, params)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]

    def run(limits: Sequence[int]) -> Tokens:
        answers: Tokens = [[] for _ in prompts]
        for batch in batches:
            longest, most = max(len(prompts[i]) for i in batch), max(limits[i] for i in batch)
            ids, seen = np.full((len(batch), longest), PAD), np.zeros((len(batch), longest), int)
            for row, i in enumerate(batch):
                ids[row, longest - len(prompts[i]) :] = prompts[i]
                seen[row, longest - len(prompts[i]) :] = 1
            with torch.inference_mode():
                found = model.generate(
                    torch.tensor(ids),
                    attention_mask=torch.tensor(seen),
                    max_new_tokens=most,
                    min_new_tokens=most,
                    pad_token_id=PAD,
                    **chosen,
                )
            for row, i in enumerate(batch):
                answers[i] = found[row, longest : longest + limits[i]].tolist()
        return answers

    return run


def measure(systems: dict[str, System], limits: Sequence[int], rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of every round but the first, which compiles; and of a last one processor time, PyTorch on one thread."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in systems}
    firsts: dict[str, list[float]] = {name: [] for name in systems}
    torch.set_num_threads(threads)
    for number in range(rounds + 1):
        for name, run in systems.items():
            if not number and name != "rpo_jax":
                continue  # nothing to compile
            began = time.perf_counter()
            run(limits)
            after = time.perf_counter()
            run([1] * len(limits))
            if number:
                seconds[name].append(after - began)
                firsts[name].append(time.perf_counter() - after)
    torch.set_num_threads(1)
    found, processor = {}, {}
    for name, run in systems.items():
        began = time.process_time()
        found[name] = run(limits)
        processor[name] = time.process_time() - began
    same = [sum(a == b for a, b in zip(*rows, strict=True)) for rows in zip(*found.values(), strict=True)]
    return {
        "seconds": seconds,
        "first_token_seconds": firsts,
        "processor_seconds": processor,
        "same_tokens": sum(same) / sum(limits),
    }


def without_attention(model_config: models.ModelConfig, params: Any, rows: int, steps: int = 32) -> Callable[[], Any]:
    """So many tokens in which no cache is looked at: products, norms, rotations and the choice of the next token."""
    graph, _ = kv_cache._graphs(model_config)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array | None) -> jax.Array:
        return query + jnp.mean(key) + jnp.mean(value)  # or XLA would leave their products out

    def step(_: int, last: jax.Array) -> jax.Array:
        x = kv_cache._embedded(model_config, params, last[:, None], jnp.float32, lambda x, axes: x)
        cos_sin = rotations(model_config, jnp.full((rows, 1), 100))
        for layer, rope in zip(params["layers"], model_config.rope_of_layer, strict=True):
            angles = tuple(angles[rope] for angles in cos_sin)
            x, _ = nnx.merge(graph, layer)(x, angles, attend, lambda x, axes: x, ONE_DEVICE)
        logits = kv_cache.next_token_logits(model_config, params, kv_cache._normed(model_config, params, x))
        return choose(logits, jnp.zeros(rows, jnp.uint32), jnp.zeros(rows, jnp.int32), Sampling())

    run = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, jnp.zeros(rows, jnp.int32)))
    return lambda: jax.block_until_ready(run())


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of a call, after one that compiles."""
    run()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def print_parts(model_config: models.ModelConfig, params: Any, run: System, limits: Sequence[int], prompt: int) -> None:
    """Milliseconds of a token, prompts spread over all of them, and of reading its cache once at memory's speed."""
    rows, steps, new = len(limits), 32, max(limits)
    placed = jax.jit(to_decode_layout, static_argnums=(1, 2))(params, "float32", "cpu")
    whole = median_seconds(lambda: run(limits), 3) / new
    prompts = median_seconds(lambda: run([1] * rows), 3) / new
    products = median_seconds(without_attention(model_config, placed, rows, steps), 5) / steps
    numbers = jnp.ones(2**26)
    total = jax.jit(jnp.sum)
    bandwidth = numbers.nbytes / median_seconds(lambda: jax.block_until_ready(total(numbers)), 5)
    slots = prompt + new / 2
    cache = 2 * 4 * model_config.num_layers * rows * slots * model_config.num_kv_heads * model_config.head_dim
    for what, seconds in (
        ("all", whole),
        ("prompts", prompts),
        ("a token but for attention", products),
        ("attention", whole - prompts - products),
        (f"its cache, {cache / 1e6:.3g} MB at {bandwidth / 1e9:.0f} GB/s", cache / bandwidth),
    ):
        print(f"{1e3 * seconds:8.2f} ms  {what}")


def lengths_of(text: str, count: int, rng: np.random.Generator) -> list[int]:
    """`count` times a number, or as many drawn between two, as in 32-256."""
    low, _, high = text.partition("-")
    return rng.integers(int(low), int(high or low) + 1, count).tolist()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, help="how many; one batch where not given")
    parser.add_argument("--prompt-tokens", default="128", help="a number, or two with a hyphen between them")
    parser.add_argument("--new-tokens", default="256", help="a number, or two with a hyphen between them")
    parser.add_argument("--rounds", type=int, default=3, help="0 measures processor time only")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; JAX takes all processors")
    parser.add_argument("--parts", action="store_true", help="print what a token is made of, without transformers")
    parser.add_argument("--top-p", type=float, help="sample at temperature 1 from this share, instead of greedily")
    return parser


def main() -> None:
    import tempfile

    options = _parser().parse_args()
    sampling = Sampling() if options.top_p is None else Sampling(temperature=1.0, top_p=options.top_p)
    model_config, params = make_model(options.model)
    rng, count = np.random.default_rng(0), options.prompts or options.batch
    lengths = lengths_of(options.prompt_tokens, count, rng)
    limits = lengths_of(options.new_tokens, count, rng)
    prompts = [rng.integers(FIRST_WORD, model_config.vocab_size, length).astype(np.int32) for length in lengths]
    if options.parts:
        run = ours(model_config, params, prompts, sampling, options.batch)
        print_parts(model_config, params, run, limits, max(lengths))
        return
    with tempfile.TemporaryDirectory() as folder:
        given = (model_config, params, prompts, sampling, options.batch)
        systems = {"rpo_jax": ours(*given), "transformers": theirs(*given, Path(folder) / "model")}
        load = os.getloadavg()[0]
        found = measure(systems, limits, options.rounds, options.threads)
    ratios = {}
    for key, times in (("seconds", found["seconds"]), ("processor_seconds", found["processor_seconds"])):
        medians = {name: float(np.median(value)) for name, value in times.items() if np.size(value)}
        for name, value in medians.items():
            print(f"{key.replace('_', ' '):<18} {name:<13}{value:8.2f} s  {sum(limits) / value:7.0f} tokens/s")
        if medians:
            ratios[f"{key}_ratio"] = medians["transformers"] / medians["rpo_jax"]
            print(f"{key.replace('_', ' '):<18} ratio {ratios[f'{key}_ratio']:.2f}")
    print(f"{found['same_tokens']:.1%} of the tokens equal; load before {load:.1f}")
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(options) | machine | found | ratios) + "\n")


if __name__ == "__main__":
    main()
