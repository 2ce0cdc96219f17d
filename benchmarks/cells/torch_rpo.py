"""A plain PyTorch RPO step, laid out as the paper's and its authors' release do it, written here from the paper.

Each pair is two rows padded to the longest of the micro-batch; the policy runs on chosen and rejected rows together,
the reference too, in every step; logits are [rows, length, vocabulary]; the contrast matrix is that of a micro-batch.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model

from benchmarks.cells.torch_common import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    make_lora,
    make_policy,
    make_reference,
    torch_device,
    warm_up,
)
from benchmarks.spec import CellSpec, Measurement, command_line, report, seconds_since_start
from benchmarks.workloads import PAD, Pair, batch_of, make_pairs, timed_work

TEMPERATURE = 0.5


def padded_rows(pairs: list[Pair], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[2m, T] tokens, attention mask and mask of the responses' tokens: all chosen rows, then all rejected ones."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), longest), PAD)
    attention, scored = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for number, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[number, :end] = torch.tensor(prompt + response)
        attention[number, :end] = 1
        scored[number, len(prompt) : end] = 1
    return tokens.to(device), attention.to(device), scored.to(device)


def log_probs(model, tokens: torch.Tensor, attention: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """[2m] summed log-probabilities of the responses, nats."""
    logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, :-1]
    every = F.log_softmax(logits.float(), dim=-1)
    of_next = every.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (of_next * scored[:, 1:]).sum(-1)


def contrast_weights(pairs: list[Pair], device: torch.device) -> torch.Tensor:
    """[m, m] softmax over j of -d_ij / tau, d the cosine distance of prompts i and j (Eqs. 10 and 11)."""
    unit = F.normalize(torch.tensor([pair.embedding.tolist() for pair in pairs], device=device), dim=-1)
    return torch.softmax((unit @ unit.T - 1) / TEMPERATURE, dim=-1)


def rpo_loss(policy: torch.Tensor, reference: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the matrix of -log sigmoid(w_ij beta (rho_i - rho_j)) (Eqs. 12 and 14)."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(weights * BETA * (chosen[:, None] - rejected[None, :])).mean()


def train_step(spec: CellSpec, policy, reference, optimizer: torch.optim.Optimizer, batch: list[Pair]) -> float:
    """Takes None for a reference that is the policy with its adapters off; returns the loss."""
    device = torch_device(spec)
    total = 0.0
    for start in range(0, len(batch), spec.micro):
        pairs = batch[start : start + spec.micro]
        rows = padded_rows(pairs, device)
        off = policy.disable_adapter() if reference is None else contextlib.nullcontext()
        with torch.no_grad(), off:
            before = log_probs(policy if reference is None else reference, *rows)
        loss = rpo_loss(log_probs(policy, *rows), before, contrast_weights(pairs, device)) * len(pairs) / len(batch)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if spec.device == "gpu":
        torch.cuda.synchronize()
    return total


def measure(spec: CellSpec) -> Measurement:
    pairs, measured = make_pairs(spec), Measurement()
    policy: Any = make_policy(spec)
    if spec.lora_rank:
        policy, reference = get_peft_model(policy, make_lora(spec)), None
    else:
        reference = make_reference(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=LEARNING_RATE, alpha=0.99, eps=1e-8)
    warm_up(policy, pairs[: spec.micro])
    for number in range(spec.warmup + spec.steps):
        started, worked = time.perf_counter(), time.process_time()
        loss = train_step(spec, policy, reference, optimizer, batch_of(spec, pairs, number))
        if number >= spec.warmup:
            measured.step_seconds.append(time.perf_counter() - started)
            measured.processor_seconds.append(time.process_time() - worked)
        measured.first_step_seconds = measured.first_step_seconds or seconds_since_start(spec)
        assert loss == loss, f"loss {loss} in step {number}"
    measured.useful_tokens, measured.necessary_flops = timed_work(spec, pairs)
    measured.peak_device_bytes = torch.cuda.max_memory_allocated() if spec.device == "gpu" else 0
    measured.notes = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return measured


def main() -> None:
    spec, path = command_line()
    report(measure(spec), path)


if __name__ == "__main__":
    main()
