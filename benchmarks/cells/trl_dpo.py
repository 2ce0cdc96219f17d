"""TRL's DPOTrainer through its public interface: as it comes (`trl`), and set for speed (`trl-best`).

Held equal in both: float32, the optimizer, the batch and its order. TRL takes texts, so the token ids become words of a
word-level tokenizer and are compared with what the trainer made of them.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]  # it is in the peers' environment only
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.cells.torch_common import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    make_lora,
    make_policy,
    make_reference,
    warm_up,
)
from benchmarks.spec import CellSpec, Measurement, command_line, report, seconds_since_start
from benchmarks.workloads import BOS, EOS, PAD, Pair, make_pairs, timed_work

# What else its options offer does not apply: padding_free is switched off in this version, Liger's and the hub's
# kernels are for GPUs, and logits are computed in tiles without being asked.
BEST: dict[str, Any] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
SETTINGS: dict[str, dict[str, Any]] = {"trl": {}, "trl-best": BEST}
SPECIAL = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}


def word(token: int) -> str:
    return SPECIAL.get(token, f"w{token}")


def text(tokens: list[int]) -> str:
    return " ".join(map(word, tokens))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per id, so that a text has exactly the intended tokens."""
    vocabulary = {word(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS]
    )


def make_dataset(pairs: list[Pair]) -> Dataset:
    rows = [
        {"prompt": text(pair.prompt) + " ", "chosen": text(pair.chosen), "rejected": text(pair.rejected)}
        for pair in pairs
    ]
    return Dataset.from_list(rows)


def check_tokens(trainer: DPOTrainer, pairs: list[Pair]) -> None:
    """RuntimeError unless the trainer's rows hold the ids that every other system trains on."""
    rows = list(trainer.train_dataset)
    made = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    if made != [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]:
        raise RuntimeError("TRL's token ids differ from the workload's")


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, from its first forward pass to the end of its update: wall and processor time."""

    def __init__(self, spec: CellSpec) -> None:
        self.spec = spec
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.first_step_seconds = 0.0
        self._began = self._worked = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._began, self._worked = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.processor_seconds.append(time.process_time() - self._worked)
        self.first_step_seconds = self.first_step_seconds or seconds_since_start(self.spec)


def measure(spec: CellSpec, folder: str) -> Measurement:
    count = spec.pairs * (spec.warmup + spec.steps)
    pairs = make_pairs(spec)
    policy = make_policy(spec)
    warm_up(policy, pairs[: spec.micro])
    settings = SETTINGS[spec.system]
    cached = settings.get("precompute_ref_log_probs", False)
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=spec.micro,
        gradient_accumulation_steps=spec.pairs // spec.micro,
        max_steps=spec.warmup + spec.steps,
        train_sampling_strategy="sequential",
        beta=BETA,
        optim="rmsprop",
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=False,
        use_cpu=spec.device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    clock = StepClock(spec)
    began = time.perf_counter()
    trainer = DPOTrainer(
        model=policy,
        ref_model=None if cached or spec.lora_rank else make_reference(policy),
        peft_config=make_lora(spec) if spec.lora_rank else None,
        args=arguments,
        train_dataset=make_dataset(pairs[:count]),
        processing_class=make_tokenizer(spec.sizes.vocab_size),
        callbacks=[clock],
    )
    built = time.perf_counter() - began
    check_tokens(trainer, pairs[:count])
    trainer.train()

    measured = Measurement(step_seconds=clock.seconds[spec.warmup :], first_step_seconds=clock.first_step_seconds)
    measured.processor_seconds = clock.processor_seconds[spec.warmup :]
    measured.reference_seconds = built if cached else 0.0
    measured.peak_device_bytes = torch.cuda.max_memory_allocated() if spec.device == "gpu" else 0
    measured.useful_tokens, measured.necessary_flops = timed_work(spec, pairs)
    measured.notes = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "threads": torch.get_num_threads(),
        "settings": settings,
    }
    return measured


def main() -> None:
    spec, path = command_line()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(spec, folder), path)


if __name__ == "__main__":
    main()
