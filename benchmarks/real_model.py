"""Hold rpo_jax on a real model and real rows against PyTorch, transformers, peft and TRL's DPOTrainer.

bash benchmarks/run.sh real-model --model FOLDER --data FILE [FILE ...]

FOLDER is a Hugging Face folder with a chat template, a FILE any preference data of conversations that rpo_jax reads.
Two processes, one per environment, each write what they found; the table says where they differ, and the exit status
is 1 where a difference is beyond its bound:

- token ids of every row beside those that DPOTrainer makes of it;
- logits beside torch's in float32, and both beside torch's in float64;
- greedy answers to the first prompts beside transformers' `generate`;
- log-probs of the first pairs, and the losses and gradient norms of some DPO steps on them, beside DPOTrainer's on the
  same ids; the first gradient's norm beside that of torch in float64;
- LoRA: log-probs of a run's policy beside those that peft computes from its exported adapters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CHILDREN = (("dev_python", "benchmarks.cells.real_ours"), ("peers_python", "benchmarks.cells.real_trl"))
BOUND = 1e-4
RELATIVE_BOUND = 1e-5  # of logits: a float32 network's own rounding is some millionths of the largest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both processes do.

    Args:
        model: Hugging Face folder.
        data: preference files by the name that the table has for them.
        folder: what each process writes into, and reads what another has written.
        pairs: of the batch of each file: its first rows that need no cut at `max_tokens`.
        max_tokens: of a prompt and a response.
        logit_rows: of each batch, whose logits are compared.
        steps: DPO steps on that batch.
        prompts: how many are answered.
        new_tokens: most of an answer.
        lora_rank: of the adapters that are trained for two steps.
    """

    model: str
    data: dict[str, str]
    folder: str
    pairs: int = 8
    max_tokens: int = 256
    logit_rows: int = 4
    steps: int = 3
    prompts: int = 32
    new_tokens: int = 64
    lora_rank: int = 8

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def write(self, name: str, values: Any) -> None:
        self.path(f"{name}.json").write_text(json.dumps(values), encoding="utf-8")

    def read(self, name: str) -> Any:
        return json.loads(self.path(f"{name}.json").read_text(encoding="utf-8"))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))


class Line(NamedTuple):
    """A line of the table; `holds` is None where nothing is asked of it."""

    what: str
    found: str
    bound: str = ""
    holds: bool | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        return self.what, self.found, self.bound, {None: "", True: "yes", False: "NO"}[self.holds]


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
Ids = list[list[int]]  # in the order of IDS


def tail_after_end(ours: Ids, theirs: Ids) -> list[int] | None:
    """What TRL's two responses have after ours, the same of both; None where anything else differs."""
    prompt, *responses = zip(ours, theirs, strict=True)
    tails = [their[len(our) :] for our, their in responses if their[: len(our)] == our]
    return tails[0] if prompt[0] == prompt[1] and len(tails) == 2 and tails[0] == tails[1] else None


def token_lines(name: str, ours: list[Ids], theirs: list[Ids], shown: int = 3) -> Iterator[Line]:
    """How many rows have equal ids, and what the others are."""
    tails = [tail_after_end(*both) for both in zip(ours, theirs, strict=True)]
    others = [number for number, tail in enumerate(tails) if tail is None]
    yield Line(f"{name}: rows", f"{len(tails):,}")
    yield Line(f"{name}: ids equal to TRL's", f"{tails.count([]):,}")
    for tail in sorted({tuple(tail) for tail in tails if tail}):
        count = tails.count(list(tail))
        yield Line(f"{name}: equal but for {list(tail)}, which TRL scores after both responses' end", f"{count:,}")
    where = f": {', '.join(map(str, others[:shown]))}" if others else ""
    yield Line(f"{name}: otherwise unequal", f"{len(others):,}{where}", "0", not others)


def largest(ours: Any, theirs: Any) -> float:
    """Greatest absolute difference of two equally nested lists of numbers."""
    if isinstance(ours, list):
        return max(largest(*both) for both in zip(ours, theirs, strict=True))
    return abs(ours - theirs)


def _within(what: str, difference: float, bound: float = BOUND) -> Line:
    return Line(what, f"{difference:.1e}", f"{bound:.0e}", difference <= bound)


def _all_equal(what: str, equal: int, count: int) -> Line:
    return Line(what, f"{equal:,} of {count:,}", f"{count:,}", equal == count)


def lines(plan: Plan) -> Iterator[Line]:
    """The table, of what both processes wrote."""
    ids, ours, theirs = plan.read("ids"), plan.read("ours"), plan.read("trl")
    for name in plan.data:
        yield from token_lines(name, ids["all"][name], theirs["ids"][name])
    logits = ours["logits"]
    yield Line("logits: positions, and the largest logit", f"{logits['positions']:,}, {logits['largest']:.1f}")
    yield Line("logits: greatest difference to torch, float32", f"{logits['ours_torch32']:.1e}")
    yield Line("logits: torch in float32 to torch in float64", f"{logits['torch32_torch64']:.1e}")
    yield Line("logits: ours to torch in float64", f"{logits['ours_torch64']:.1e}")
    yield _within("logits: ours to torch in float64, of the largest", logits["relative"], RELATIVE_BOUND)
    yield _all_equal("logits: likeliest token equal", logits["argmax_equal"], logits["positions"])
    answers = ours["greedy"]
    yield _all_equal("greedy: prompts' ids as apply_chat_template's", answers["same_prompts"], answers["count"])
    yield _all_equal("greedy: answers with equal tokens", answers["same"], answers["count"])
    yield Line("greedy: tokens, and answers that ended", f"{answers['tokens']:,}, {answers['ended']}")
    for gap in answers["gaps"]:
        yield Line("greedy: where an answer parts, the two likeliest logits differ by", f"{gap:.1e}")
    for name in plan.data:
        mine, other = ours["dpo"][name], theirs["dpo"][name]
        yield Line(f"DPO on {name}: mean log-prob, nats", f"{sum(map(sum, mine['log_probs'])) / 2 / plan.pairs:.1f}")
        yield _within(f"DPO on {name}: log-probs, of their size", relative(mine["log_probs"], other["log_probs"]))
        yield _within(f"DPO on {name}: losses of {plan.steps} steps", largest(mine["loss"], other["loss"]))
        for metric in ("rewards/chosen", "rewards/rejected"):
            yield _within(f"DPO on {name}: {metric}", largest(mine[metric], other[metric]))
        yield _within(f"DPO on {name}: gradient norms, of their size", relative(mine["grad_norm"], other["grad_norm"]))
        first, last = mine["loss"][0], mine["loss"][-1]
        yield Line(f"DPO on {name}: our loss, first and last", f"{first:.5f}, {last:.5f}")
        own = largest(other["own_log_probs"], other["log_probs"])
        yield Line(f"DPO on {name}: TRL's log-probs on its own ids differ by, nats", f"{own:.1e}")
    first = next(iter(plan.data))
    norms = *(one["dpo"][first]["grad_norm"][0] for one in (ours, theirs)), ours["gradient_norm"]
    of = f"DPO on {first}: first gradient's norm"
    yield Line(f"{of}, ours, TRL's, torch's in float64", ", ".join(f"{norm:.6f}" for norm in norms))
    yield _within(f"{of}, ours to torch's in float64", relative(norms[0], norms[2]), RELATIVE_BOUND)
    lora = ours["lora"]
    yield Line(f"LoRA: rank {plan.lora_rank}, two steps changed a log-prob by, nats", f"{lora['changed']:.2f}")
    yield _within("LoRA: peft's log-probs on the exported adapters, of their size", lora["relative"])


def relative(ours: Any, theirs: Any) -> float:
    """Greatest difference of any two numbers, as a share of the second."""
    if isinstance(ours, list):
        return max(relative(*both) for both in zip(ours, theirs, strict=True))
    return abs(ours - theirs) / max(abs(theirs), 1.0)


def name_of(path: Path) -> str:
    """What the table calls a file."""
    return path.name.split(".")[0]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash benchmarks/run.sh real-model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with a chat template")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="preference files of conversations")
    for name in ("pairs", "max-tokens", "logit-rows", "steps", "prompts", "new-tokens", "lora-rank"):
        field = name.replace("-", "_")
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, field), help=f"{getattr(Plan, field)}")
    parser.add_argument("--keep", type=Path, help="folder for what the processes write, which otherwise is removed")
    parser.add_argument("--dev-python", default=os.environ.get("DEV_PYTHON", sys.executable), help="runs rpo_jax")
    parser.add_argument("--peers-python", default=os.environ.get("PEERS_PYTHON"), help="runs TRL")
    options = parser.parse_args(arguments)
    for path in (options.model, *options.data):
        if not path.exists():
            parser.error(f"{path} is not there")
    if len({*map(name_of, options.data)}) < len(options.data):
        parser.error("two files of --data have the same name")
    if options.peers_python is None:
        parser.error("--peers-python is not given; benchmarks/run.sh provides it")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parse_arguments(arguments))
    pythons = {name: options.pop(name) for name, _ in CHILDREN}
    model = str(options.pop("model").resolve())
    data = {name_of(path): str(path.resolve()) for path in options.pop("data")}
    keep = options.pop("keep")
    if keep is not None:
        keep.mkdir(parents=True)
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        plan = Plan(model=model, data=data, folder=str(Path(folder).resolve()), **options)
        for python, module in CHILDREN:
            print(f"{module} ...", flush=True)
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run([pythons[python], "-m", module, plan.to_json()], env=environment, check=True)
        table = list(lines(plan))
    print("| what | found | bound | holds |\n|---|---|---|---|")
    for line in table:
        print(f"| {' | '.join(line.cells)} |")
    return int(any(line.holds is False for line in table))


if __name__ == "__main__":
    raise SystemExit(main())
