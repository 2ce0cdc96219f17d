"""rpo_jax on a real model, and what its own environment can hold it against: torch, transformers, peft."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rpo_jax
from benchmarks.cells.ours import RESPONSES_USED
from benchmarks.cells.torch_common import BETA, LEARNING_RATE, MAX_GRAD_NORM, whole_gradient
from benchmarks.cells.torch_rpo import log_probs, padded_rows
from benchmarks.real_model import Ids, Plan
from benchmarks.workloads import Pair
from rpo_jax import models
from rpo_jax.config import Config, MeshConfig
from rpo_jax.core.records import PreferenceExample, TokenizedExample
from rpo_jax.data.examples import make_examples
from rpo_jax.data.sources import read_rows
from rpo_jax.data.tokenize import PromptEncoder, TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import load_tokenizer
from rpo_jax.hosts import sharding
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.engine import Engine, Sampling
from rpo_jax.sampling.kv_cache import to_decode_layout
from rpo_jax.sampling.policy import StoredPolicy, find_policy
from rpo_jax.tools.exporting import export
from rpo_jax.training.prepare import batches_of, prepare
from rpo_jax.training.step import build_log_probs, put_batch

UNCUT = TokenLimits(10**6 - 1, 10**6, "keep_end")
LORA_STEPS = 2
LORA_LEARNING_RATE = 1e-4


def ids_of(example: TokenizedExample) -> Ids:
    return [example.prompt_ids.tolist(), *(response.ids.tolist() for response in example.responses)]


def as_conversations(example: PreferenceExample) -> dict[str, Any]:
    """The row as TRL takes it: messages of the prompt and of each response."""
    assert not isinstance(example.prompt, str), f"{example.row_id} is text; rows must be conversations"
    row: dict[str, Any] = {"prompt": [message.to_dict() for message in example.prompt]}
    for response in example.responses:
        row[response.kind] = [{"role": "assistant", "content": response.text}]
    return row


def read_all(plan: Plan) -> dict[str, list[tuple[PreferenceExample, Ids]]]:
    """Every usable row of each file with its uncut ids."""
    tokenizer, found = load_tokenizer(plan.model), {}
    for name, path in plan.data.items():
        examples = make_examples(read_rows(path), on_bad_row="skip").examples
        tokenized, faults = tokenize_examples(examples, tokenizer, UNCUT)
        assert not faults, faults.report()
        found[name] = list(zip(examples, map(ids_of, tokenized), strict=True))
    return found


def torch_model(plan: Plan, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(plan.model, dtype=dtype).eval()


def compare_logits(plan: Plan, sequences: list[list[int]]) -> dict[str, float]:
    """Of every position: ours, torch's in float32, and in float64, which is what both round."""
    model_config, params = models.load_pretrained(plan.model)
    single, double = torch_model(plan, torch.float32), torch_model(plan, torch.float64)
    longest = max(map(len, sequences))
    found: dict[str, float] = dict.fromkeys(("ours_torch32", "torch32_torch64", "ours_torch64", "largest"), 0.0)
    equal = positions = 0
    for sequence in sequences:
        # Padded on the right to one shape, so that one program serves all; no position sees what follows it.
        tokens = np.array([sequence + [0] * (longest - len(sequence))])
        ours = np.asarray(models.apply(model_config, params, jnp.array(tokens)))[0, : len(sequence)]
        with torch.inference_mode():
            narrow, wide = (
                model(torch.tensor(tokens)).logits[0, : len(sequence)].numpy() for model in (single, double)
            )
        for name, difference in (
            ("ours_torch32", ours - narrow),
            ("torch32_torch64", narrow - wide),
            ("ours_torch64", ours - wide),
            ("largest", wide),
        ):
            found[name] = max(found[name], float(np.abs(difference).max()))
        equal += int((ours.argmax(-1) == narrow.argmax(-1)).sum())
        positions += len(sequence)
    relative = found["ours_torch64"] / found["largest"]
    return {**found, "relative": relative, "argmax_equal": equal, "positions": positions}


def compare_greedy(plan: Plan, examples: list[PreferenceExample]) -> dict[str, Any]:
    """Answers of the sampler that rpo_jax.generate runs beside those of transformers, on the same prompts."""
    policy, mesh = find_policy(plan.model), sharding.make_mesh(MeshConfig())
    encoder = PromptEncoder(policy.tokenizer, "auto", {}, None, "keep_end")
    prompts = [encoder.encode(example.prompt) for example in examples]
    with jax.set_mesh(mesh):
        params = jax.jit(to_decode_layout, static_argnums=(1, 2))(policy.load(mesh), "float32", "cpu")
        engine = Engine(policy.model_config, mesh, sampling=Sampling(), end_ids=sorted(policy.end_ids))
        limits = [plan.new_tokens] * len(prompts)
        ended = engine.answers(params, prompts, range(len(prompts)), limits, len(prompts))
        ours = dict(pair for some in ended for pair in some)
    theirs, gaps, longest = torch_model(plan, torch.float32), [], max(map(len, prompts))
    ids, seen = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):  # on the left, as a decoder's batches are padded
        ids[row, longest - len(prompt) :], seen[row, longest - len(prompt) :] = prompt, 1
    with torch.inference_mode():
        whole = theirs.generate(
            torch.tensor(ids), attention_mask=torch.tensor(seen), do_sample=False, max_new_tokens=plan.new_tokens
        )
        for row, answer in enumerate(whole[:, longest:].tolist()):
            # A row that has ended is padded to the longest answer.
            answer = answer[: next((at + 1 for at, token in enumerate(answer) if token in policy.end_ids), len(answer))]
            if answer != ours[row]:
                parted = next(i for i, pair in enumerate(zip(answer, ours[row], strict=False)) if len({*pair}) > 1)
                read = whole[row : row + 1, longest - len(prompts[row]) : longest + parted]
                two = theirs(read).logits[0, -1].topk(2).values
                gaps.append(float(two[0] - two[1]))
    rendered: list[Any] = [
        policy.tokenizer.apply_chat_template(
            as_conversations(example)["prompt"], add_generation_prompt=True, return_dict=True
        )
        for example in examples
    ]
    same_prompts = sum(one["input_ids"] == ids.tolist() for one, ids in zip(rendered, prompts, strict=True))
    return {
        "count": len(prompts),
        "same_prompts": same_prompts,
        "same": len(prompts) - len(gaps),
        "tokens": sum(map(len, ours.values())),
        "ended": sum(ids[-1] in policy.end_ids for ids in ours.values()),
        "gaps": gaps,
    }


def run_config(plan: Plan, name: str, run_dir: Path, *settings: str) -> Config:
    """DPO on the batch of a file, in step with the constants of the peers."""
    return rpo_jax.load_config(
        None,
        [
            f"run.dir={run_dir}",
            f"run.cache_dir={plan.path('cache')}",
            f"model.path={plan.model}",
            f"data.path={plan.path(f'batch-{name}.jsonl')}",
            f"data.max_prompt_tokens={plan.max_tokens - 1}",
            f"data.max_tokens={plan.max_tokens}",
            "objective.name=dpo",
            f"objective.beta={BETA}",
            f"batch.pairs={plan.pairs}",
            "batch.order=sequential",
            "optim.warmup_steps=0",
            f"optim.learning_rate={LEARNING_RATE}",
            f"optim.max_grad_norm={MAX_GRAD_NORM}",
            f"train.steps={plan.steps}",
            "train.log_every=1",
            "tracking.tensorboard=false",
            *settings,
        ],
    )


def pair_log_probs(config: Config, policy: StoredPolicy) -> list[list[float]]:
    """[pairs, 2] log-probs of chosen and rejected responses under a policy, in packed rows as in training."""
    mesh = sharding.make_mesh(config.mesh)
    data = prepare(config, Reporter(silent=True)).train
    batch = batches_of(config, data, RESPONSES_USED, sharding.row_shards(mesh)).batch_at(0)
    with jax.set_mesh(mesh):
        values = build_log_probs(config, policy.model_config, mesh)[0](policy.load(mesh), put_batch(mesh, batch))
    found = np.zeros((len(data.examples), len(RESPONSES_USED)), np.float64)
    for column, (kind, slots) in enumerate(batch.slots().items()):
        found[batch.sides[kind].example_index, column] = np.asarray(values.log_prob)[slots]
    return found.tolist()


def run_dpo(plan: Plan, name: str) -> dict[str, Any]:
    """Log-probs before the first step, and what the run logged of every step."""
    config = run_config(plan, name, plan.path(f"dpo-{name}"))
    rpo_jax.run(config)
    logged = [json.loads(line) for line in (plan.path(f"dpo-{name}") / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    metrics = {
        key: [line[key] for line in steps] for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")
    }
    return {"log_probs": pair_log_probs(config, find_policy(plan.model)), **metrics}


def true_gradient_norm(plan: Plan, batch: list[Ids]) -> float:
    """Of DPO's first step on the batch, where policy and reference are the same, from torch's model in float64."""
    model = torch_model(plan, torch.float64)
    whole_gradient(model)
    for prompt, *responses in batch:
        for response, sign in zip(responses, (-1, 1), strict=True):
            tokens = torch.tensor([prompt + response])
            logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
            log_prob = torch.log_softmax(logits, -1).gather(-1, tokens[0, len(prompt) :, None]).sum()
            # At a margin of 0 the slope of -log sigmoid(BETA * margin) is -BETA / 2.
            (sign * BETA / 2 / len(batch) * log_prob).backward()
    squares = [(weight.grad**2).sum() for weight in model.parameters() if weight.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def compare_lora(plan: Plan, name: str, batch: list[Ids]) -> dict[str, float]:
    """A LoRA run's policy beside peft, which reads the exported adapters on the same base."""
    run_dir, adapter = plan.path("lora"), plan.path("adapter")
    settings = f"lora.rank={plan.lora_rank}", f"train.steps={LORA_STEPS}", f"optim.learning_rate={LORA_LEARNING_RATE}"
    config = run_config(plan, name, run_dir, *settings)
    rpo_jax.run(config)
    export(run_dir, adapter, adapter=True)
    ours = np.array(pair_log_probs(config, find_policy(str(run_dir))))
    base = torch_model(plan, torch.float32)
    rows = padded_rows([Pair(*ids, embedding=np.empty(0)) for ids in batch], torch.device("cpu"))
    with torch.inference_mode():
        before = log_probs(base, *rows).numpy()
        theirs = log_probs(PeftModel.from_pretrained(base, str(adapter)).eval(), *rows).numpy()
    theirs, before = (values.reshape(2, -1).T for values in (theirs, before))
    return {
        "changed": float(np.abs(theirs - before).max()),
        "relative": float((np.abs(ours - theirs) / np.abs(theirs)).max()),
    }


def main() -> None:
    plan = Plan.from_json(sys.argv[1])
    rows = read_all(plan)
    batches = {}
    for name, pairs in rows.items():
        fitting = [pair for pair in pairs if len(pair[1][0]) + max(map(len, pair[1][1:])) <= plan.max_tokens]
        batches[name] = fitting[: plan.pairs]
        assert len(batches[name]) == plan.pairs, f"{name}: {len(fitting)} rows of at most {plan.max_tokens} tokens"
        text = "".join(json.dumps(as_conversations(example)) + "\n" for example, _ in batches[name])
        plan.path(f"batch-{name}.jsonl").write_text(text, encoding="utf-8")
        plan.write(f"rows-{name}", [as_conversations(example) for example, _ in pairs])
    every, of_batch = ({name: [ids for _, ids in some] for name, some in part.items()} for part in (rows, batches))
    plan.write("ids", {"all": every, "batch": of_batch})
    first = next(iter(plan.data))
    room = [example for example, ids in rows[first] if len(ids[0]) <= plan.max_tokens]
    sequences = [ids[0] + ids[1] for batch in of_batch.values() for ids in batch[: plan.logit_rows]]
    parts: dict[str, Callable[[], Any]] = {
        "gradient_norm": lambda: true_gradient_norm(plan, of_batch[first]),  # of one file: float64 is slow
        "dpo": lambda: {name: run_dpo(plan, name) for name in plan.data},
        "lora": lambda: compare_lora(plan, first, of_batch[first]),
        "greedy": lambda: compare_greedy(plan, room[: plan.prompts]),
        "logits": lambda: compare_logits(plan, sequences),
    }
    found = {}
    with jax.default_matmul_precision("float32"):
        for name, part in parts.items():
            found[name] = part()
            print(name, found[name], flush=True)
    plan.write("ours", found)


if __name__ == "__main__":
    main()
