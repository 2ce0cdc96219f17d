"""TRL's DPOTrainer on the same model and rows: the ids that it makes, and DPO steps on ours."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]  # it is in the peers' environment only

from benchmarks.cells.torch_common import BETA, LEARNING_RATE, MAX_GRAD_NORM, make_reference, whole_gradient
from benchmarks.real_model import IDS, Ids, Plan

METRICS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")


def make_trainer(plan: Plan, rows: list[dict[str, Any]], folder: str) -> DPOTrainer:
    """The trainer on the real model, with rows as it reads and tokenises them."""
    policy: Any = AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32)
    whole_gradient(policy)
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=plan.pairs,
        max_steps=plan.steps,
        train_sampling_strategy="sequential",
        max_length=None,
        beta=BETA,
        optim="rmsprop",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=policy,
        ref_model=make_reference(policy),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(plan.model),
    )


def batch_log_probs(trainer: DPOTrainer) -> list[list[float]]:
    """[pairs, 2] log-probs of the first batch, as the trainer computes those of its reference."""
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    return torch.stack([chosen, rejected], dim=-1).tolist()


def run_dpo(trainer: DPOTrainer, ours: list[Ids], own: list[Ids]) -> dict[str, Any]:
    """Steps on our ids; of its own ids, which may have more after the end token, the log-probs alone."""
    found: dict[str, Any] = {}
    for name, ids in (("own_log_probs", own), ("log_probs", ours)):
        trainer.train_dataset = Dataset.from_list([dict(zip(IDS, row, strict=True)) for row in ids])
        found[name] = batch_log_probs(trainer)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return found | {key: [line[key] for line in logged] for key in METRICS}


def main() -> None:
    plan = Plan.from_json(sys.argv[1])
    ours = plan.read("ids")
    found: dict[str, Any] = {"ids": {}, "dpo": {}}
    for name in plan.data:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(plan, plan.read(f"rows-{name}"), folder)
            found["ids"][name] = made = [[row[key] for key in IDS] for row in list(trainer.train_dataset)]
            of_batch = [made[ours["all"][name].index(ids)] for ids in ours["batch"][name]]
            found["dpo"][name] = run_dpo(trainer, ours["batch"][name], of_batch)
    plan.write("trl", found)


if __name__ == "__main__":
    main()
