"""What other trainers call a key, so that a key of theirs is answered with ours."""

from __future__ import annotations

from collections.abc import Iterable

# TRL's (DPOConfig, SFTConfig, KTOConfig, ModelConfig and ScriptArguments), LLaMA-Factory's and Tunix's names.
KEYS = {
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "adapter_name_or_path": "model.path",
    "attn_implementation": "model.attention",
    "attn_mechanism": "model.attention",
    "batch_size": "batch.pairs",
    "beta1": "optim.b1",
    "beta2": "optim.b2",
    "bf16": "model.compute_dtype",
    "bnb_4bit_quant_type": "lora.base_dtype",
    "checkpoint_root_directory": "run.dir",
    "column_mapping": "data.columns",
    "cutoff_len": "data.max_tokens",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "dataset_test_split": "data.eval_split",
    "dataset_train_split": "data.split",
    "ddp_timeout": "distributed.timeout_seconds",
    "desirable_weight": "objective.kto_desirable_weight",
    "dpo_label_smoothing": "objective.label_smoothing",
    "dtype": "model.compute_dtype",
    "enable_thinking": "data.template_arguments",
    "epochs": "train.epochs",
    "epsilon": "optim.eps",
    "eval_dataset": "data.eval_path",
    "eval_every_n_steps": "train.eval_every",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "f_alpha_divergence_coef": "objective.f_dpo_alpha",
    "f_divergence_type": "objective.f_dpo_divergence",
    "flash_attn": "model.attention",
    "fsdp": "mesh.fsdp",
    "gradient_accumulation_steps": "batch.micro_rows",
    "gradient_checkpointing": "model.remat",
    "kto_chosen_weight": "objective.kto_desirable_weight",
    "kto_rejected_weight": "objective.kto_undesirable_weight",
    "label_smoothing": "objective.label_smoothing",
    "ld_alpha": "objective.ld_dpo_alpha",
    "load_in_4bit": "lora.base_dtype",
    "load_in_8bit": "lora.base_dtype",
    "logging_steps": "train.log_every",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "loss": "objective.name",
    "loss_type": "objective.name",
    "lr": "optim.learning_rate",
    "lr_schedule": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "data.max_tokens",
    "max_grad_norm": "optim.max_grad_norm",
    "max_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "data.max_tokens",
    "max_samples": "data.train_rows",
    "max_seq_length": "data.max_tokens",
    "max_steps": "train.steps",
    "model_name_or_path": "model.path",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optimizer": "optim.name",
    "output_dir": "run.dir",
    "overwrite_output_dir": "run.overwrite",
    "packing": "batch.row_tokens",
    "per_device_eval_batch_size": "batch.pairs",
    "per_device_train_batch_size": "batch.pairs",
    "precompute_ref_log_probs": "reference.mode",
    "pref_beta": "objective.beta",
    "pref_ftx": "objective.nll_weight",
    "pref_loss": "objective.name",
    "quantization_bit": "lora.base_dtype",
    "ref_model": "reference.path",
    "reference_free": "reference.mode",
    "remove_unused_columns": "data.ignore_columns",
    "report_to": "tracking.wandb",
    "resume_from_checkpoint": "run.resume",
    "rpo_alpha": "objective.nll_weight",
    "save_interval_steps": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_last",
    "scheduler": "optim.schedule",
    "sft_weight": "objective.nll_weight",
    "simpo_gamma": "objective.simpo_margin",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.compute_dtype",
    "truncation_mode": "data.truncation_side",
    "undesirable_weight": "objective.kto_undesirable_weight",
    "use_peft": "lora.rank",
    "val_size": "data.eval_rows",
    "warmup_ratio": "optim.warmup_steps",
}
SECTIONS = {
    "dataset": "data",
    "datasets": "data",
    "eval": "train",
    "logging": "tracking",
    "loss": "objective",
    "method": "objective",
    "optimiser": "optim",
    "optimizer": "optim",
    "output": "run",
    "parallel": "mesh",
    "peft": "lora",
    "policy": "model",
    "preference": "objective",
    "ref": "reference",
    "scheduler": "optim",
    "trainer": "train",
    "training": "train",
}


# TRL's loss_type, LLaMA-Factory's pref_loss.
LOSSES = {
    "exo_pair": "exo",
    "hinge": "rso",
    "kto_pair": "kto",
    "nca_pair": "nca",
    "robust": "rdpo",
    "sigmoid": "dpo",
}


def named_elsewhere(key: str) -> list[str]:
    """The key that is another trainer's name of one, whatever section it was put in."""
    name = key.rpartition(".")[2]
    return [KEYS[name]] if name in KEYS and KEYS[name] != key else []


def meant(key: str, known: Iterable[str]) -> list[str]:
    """The known keys that an unknown key means: another trainer's name of one, or the same name in another section.

    Args:
        key: as it was given, with its section or without.
        known: all keys, with their sections.
    """
    section, _, name = key.rpartition(".")
    section = SECTIONS.get(section, section)
    known = list(known)
    if f"{section}.{name}" in known:
        return [f"{section}.{name}"]
    if name in KEYS:
        return [KEYS[name]]
    return [one for one in known if one.rpartition(".")[2] == name]
