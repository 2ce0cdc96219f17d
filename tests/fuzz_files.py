"""Damages a model folder in thousands of ways and loads it: `python -m tests.fuzz_files --mutations 10000 --seed 0`.

Each mutation is of one file and follows from its number and the seed alone. A worker loads one after another and
tells how it went; its parent notices when it dies or hangs. Every load must succeed or raise ValueError, within
HANG_SECONDS, and take at most twice the memory that the honest folder has bytes.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import json
import random
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HANG_SECONDS = 10.0
START_SECONDS = 300.0  # a worker imports jax and transformers first
SPARE_BYTES = 4 << 30  # of address space: what would take more fails in the worker, not on the whole machine

NASTY = (
    *(
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**30,
        -(2**63),
        1e308,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\0",
        "\ud800",
    ),
    *("../../../../etc/passwd", "/etc/passwd", "x" * 5000, [], {}, [[]], [1, 2], ["a"], {"a": 1}, [None] * 1000),
    *("os.system", "{{ 1/0 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
)
CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", "evil.Tok"]}


def make_folder(folder: Path) -> None:
    """An honest model of 8 MB in two files with an index, and a tokenizer."""
    import jax
    import numpy as np

    from rpo_jax import models
    from rpo_jax.data.tokenizer import train_tokenizer

    text = [f"the {word} of number {number}" for number, word in enumerate(["quick", "brown", "fox"] * 50)]
    train_tokenizer(text, 384, folder / "tokenizer")
    config = models.new_config(
        family="qwen2",
        vocab_size=384,
        hidden_size=128,
        intermediate_size=512,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=False,
        rope_theta=10_000.0,
        max_position_embeddings=256,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), models.abstract_params(config))
    models.save_pretrained(folder / "model", config, params, tokenizer=folder / "tokenizer", max_shard_bytes=5_000_000)


# --- mutations: each takes the file's bytes and a source of chance -------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    reach = min(len(damaged), rng.choice((16, 400, len(damaged))))
    for _ in range(rng.choice((1, 1, 3, 30))):
        damaged[rng.randrange(reach)] = rng.randrange(256)
    return bytes(damaged)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(content)), len(content) - 1))]


def grow(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice((b"\0", b"{}", b"\xff" * 100, content[:1000]))


def nest(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[" * 200_000, b'{"a":' * 100_000, b"[]", b"null", b'"text"', b"\xef\xbb\xbf" + content))


def _nasty(rng: random.Random, *more: object) -> object:
    """A copy: a later edit of the same tree may change it, and must not put it into itself."""
    return copy.deepcopy(rng.choice((*more, *NASTY)))


def edit_tree(value: object, rng: random.Random) -> object:
    """One node of a JSON tree replaced, removed, repeated or renamed."""
    places: list[tuple[dict | list, object]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else list(range(min(len(node), 20)))
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
    if not places:
        return _nasty(rng)
    node, key = rng.choice(places)
    kind = rng.choice(("set", "set", "set", "remove", "swap", "add"))
    if kind == "set":
        node[key] = _nasty(rng)
    elif kind == "remove":
        del node[key]
    elif kind == "swap":
        other, its = rng.choice(places)
        with_other = other[its] if not isinstance(other, list) or its < len(other) else None
        node[key] = json.loads(json.dumps(with_other))
    elif isinstance(node, dict):
        node[rng.choice(("auto_map", "vocab_file", "init_inputs", "gguf_file", "chat_template", str(key) + "x"))] = (
            _nasty(rng, CODE)
        )
    else:
        node.append(_nasty(rng))
    return value


def edit_json(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = edit_tree(value, rng)
    return json.dumps(value).encode()


def edit_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors header that is JSON still, and says something else."""
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    kind = rng.choice(("dtype", "shape", "offsets", "tree", "twice", "length"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "I8", "BOOL", "BF16", "F16", "F8_E5M2", "X", 3, None))
    elif kind == "shape":
        entry["shape"] = rng.choice(([2**62, 4], [-1], [0], [2**64], entry["shape"][::-1], [*entry["shape"], 1], "a"))
    elif kind == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([end, start], [0, end - start], [start, 2**63], [start - 4, end - 4], [start, end + 4], [0, 0], [-4, end])
        )
    elif kind == "tree":
        header = edit_tree(header, rng)
    described = json.dumps(header).encode()
    if kind == "twice":
        described = described[:-1] + b"," + described[1:]
    size = len(described)
    if kind == "length":
        size = rng.choice((0, 1, size - 1, size + 1, len(content), 2**40, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + described + values


ANY = (flip, cut, grow, nest)
TARGETS = {
    "model-00001-of-00002.safetensors": (*ANY, edit_header, edit_header, edit_header, edit_header),
    "model.safetensors.index.json": (*ANY, edit_json, edit_json, edit_json, edit_json),
    "config.json": (*ANY, edit_json, edit_json, edit_json, edit_json),
    "tokenizer.json": (*ANY, edit_json, edit_json, edit_json, edit_json),
    "tokenizer_config.json": (*ANY, edit_json, edit_json, edit_json, edit_json),
    "chat_template.jinja": (flip, cut, grow),
}


def mutate(folder: Path, seed: int, number: int) -> tuple[Path, bytes, str]:
    """The file of a mutation, its new content, and the mutation's name."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(TARGETS))
    kind = rng.choice(TARGETS[name])
    return folder / name, kind((folder / name).read_bytes(), rng), f"{name} {kind.__name__}"


# --- the worker ----------------------------------------------------------------------------------------------------


def load(folder: Path, name: str = "config.json") -> None:
    """Load what reads this file: the weights, the tokenizer, or both."""
    from rpo_jax import models
    from rpo_jax.data.tokenizer import load_tokenizer

    if name.startswith(("model", "config")):
        models.load_pretrained(folder)
    if not name.startswith("model"):
        load_tokenizer(folder)


def work(folder: Path, seed: int, numbers: range) -> None:
    """Load the folder under each mutation; one JSON line for each."""
    import resource

    from benchmarks.load_memory import resident_bytes

    load(folder)
    load(folder)  # the second leaves nothing new behind
    reserved = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + SPARE_BYTES,) * 2)
    for number in [-1, *numbers]:  # first the honest folder, for comparison
        honest, name = None, "config.json"
        if number >= 0:
            file, content, name = mutate(folder, seed, number)
            honest = file.read_bytes()
            file.write_bytes(content)
        gc.collect()
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak from here on
        started = time.perf_counter()
        try:
            load(folder, name)
            outcome = "loaded"
        except ValueError as error:
            outcome = "refused" if str(error) else "refused without a reason"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:500]
        seconds, taken = time.perf_counter() - started, resident_bytes(peak=True) - before
        if honest is not None:
            file.write_bytes(honest)
        told = {"number": number, "name": name, "outcome": outcome, "seconds": seconds, "taken": taken}
        print(json.dumps(told), flush=True)


# --- the parent ----------------------------------------------------------------------------------------------------


def run(mutations: int, seed: int, first: int = 0) -> dict:
    """Try mutations; returns counts by outcome, the largest time and memory, and every failure."""
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place))
        folder = Path(place) / "model"
        honest = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        limit = 2 * sum(map(len, honest.values()))
        told: list[dict] = []
        number, last = first, first + mutations
        while number < last:
            for name, content in honest.items():
                (folder / name).write_bytes(content)
            reports, ending = watch(folder, seed, number, last)
            told += reports
            number = max((report["number"] for report in reports), default=number - 1) + 1
            if number < last:
                told.append({"number": number, "name": "?", "outcome": ending, "seconds": 0.0, "taken": 0})
                number += 1
    tried = [report for report in told if report["number"] >= 0]
    failures = [
        report
        for report in tried
        if report["outcome"] not in ("loaded", "refused") or report["seconds"] > HANG_SECONDS or report["taken"] > limit
    ]
    return {
        "tried": len(tried),
        "outcomes": dict(collections.Counter(report["outcome"][:60] for report in tried)),
        "honest_bytes": limit // 2,
        "honest_taken": max((report["taken"] for report in told if report["number"] < 0), default=0),
        "most_taken": max(report["taken"] for report in tried),
        "most_seconds": round(max(report["seconds"] for report in tried), 2),
        "failures": failures,
    }


def watch(folder: Path, seed: int, number: int, last: int) -> tuple[list[dict], str]:
    """What one worker tells until it is done, dies or hangs, and how it ended."""
    command = [sys.executable, "-m", "tests.fuzz_files", "--work", str(folder), "--seed", str(seed)]
    command += ["--first", str(number), "--mutations", str(last - number)]
    reports: list[dict] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as worker:
        assert worker.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            # Generous to a machine that is busy elsewhere: each load's own time is what is held against it.
            while selector.select(START_SECONDS):
                line = worker.stdout.readline()
                if not line:
                    return reports, f"the worker died with status {worker.wait()}"
                if line.startswith(b'{"number"'):  # libraries print as well
                    reports.append(json.loads(line))
        worker.kill()
    return reports, f"no answer for {START_SECONDS:g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.seed, range(options.first, options.first + options.mutations))
    else:
        print(json.dumps(run(options.mutations, options.seed, options.first), indent=1))


if __name__ == "__main__":
    main()
