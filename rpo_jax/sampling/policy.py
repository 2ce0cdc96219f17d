"""A policy to use, not to train: what a run folder or a Hugging Face folder holds, on the mesh."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import DataConfig
from rpo_jax.config.reading import load_config
from rpo_jax.core.manifest import NAME as MANIFEST
from rpo_jax.data.tokenizer import load_tokenizer
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.models.huggingface.folders import folder_fingerprint
from rpo_jax.objectives import heads
from rpo_jax.runs.checkpoints import Checkpoints, check_architecture, to_json_dict
from rpo_jax.runs.folder import CHECKPOINTS, MODEL
from rpo_jax.sampling.end_tokens import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = Any
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class StoredPolicy:
    """A policy that has been found and checked, its weights not yet loaded.

    Attributes:
        name: its folder or hub name, and for a run the step.
        policy: what of it was trained.
        end_ids: tokens that end an answer: those of the model, its generation_config.json and the tokenizer.
        compute_dtype: that of its run; float32 for a folder.
        folder: of the weights; None for a run that trained all of them.
        run_dir: None for a folder.
        step: of the run's checkpoint.
        data: how its run read data; the default for a folder.
    """

    name: str
    policy: models.Policy
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    compute_dtype: str
    folder: Path | None
    run_dir: Path | None = None
    step: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def model_config(self) -> ModelConfig:
        return self.policy.model_config

    @functools.cached_property
    def weights_id(self) -> str:
        """Which weights these are: of a run's checkpoint its checksums, of a folder that of its tensors."""
        if self.run_dir is None:
            assert self.folder is not None, "there are no other weights"
            return folder_fingerprint(self.folder)[:16]
        manifest = self.run_dir / CHECKPOINTS / str(self.step) / MANIFEST
        return hashlib.sha256(manifest.read_bytes() if manifest.is_file() else b"").hexdigest()[:16]

    def load(self, mesh: Mesh) -> Params:
        """The parameters that the decoder reads, on the mesh; ValueError for experts that it does not divide."""
        experts = self.model_config.parts.experts
        sharding.check_experts(experts and experts.count, mesh, self.name)
        policy, place = self.policy, functools.partial(sharding.parameter_shardings, mesh)
        weights = {} if self.folder is None else policy.load(self.folder, place(*policy.weights))
        if self.run_dir is None:
            return weights
        on_host = restored(self.run_dir, self.step, policy)
        return policy.combine(jax.tree.map(jax.device_put, on_host, place(*policy.trained)), weights)


def find_policy(path: str, *, checkpoint: str | None = None, base: str | None = None) -> StoredPolicy:
    """The policy of a run folder, or the model of a Hugging Face folder or hub name.

    Args:
        checkpoint: of a run: `last`, `best` by its evaluation, or a step; `last` where not given.
        base: of a LoRA run: where the model that it started from is now, if it has moved.

    Raises ValueError for a folder that is neither, a run without that checkpoint, or a base that is not the run's.
    """
    run_dir = Path(path).expanduser()
    if (run_dir / "config.yaml").is_file() and (run_dir / MODEL).is_dir():
        return _of_run(run_dir, path, checkpoint or "last", base)
    for name, value in (("checkpoint", checkpoint), ("base", base)):
        if value is not None:
            raise ValueError(f"{name}={value} is for run folders, and {path} is none; leave it out.")
    folder = models.resolve_folder(path)
    policy = models.Policy(models.check_pretrained(folder))
    tokenizer = load_tokenizer(folder)
    models.check_tokenizer(tokenizer, policy.model_config, folder)
    ends = end_tokens(folder, policy.model_config, tokenizer)
    return StoredPolicy(path, policy, tokenizer, ends, "float32", folder)


def _of_run(run_dir: Path, path: str, checkpoint: str, base: str | None) -> StoredPolicy:
    config = load_config(run_dir / "config.yaml")
    policy = models.Policy(models.read_config(run_dir / MODEL), config.lora)
    step, record = find_checkpoint(run_dir, policy.model_config, checkpoint)
    if base is not None and not policy.trains_adapters:
        raise ValueError(f"base={base} is for LoRA runs, and {path} trained all weights; leave it out.")
    folder = checked_base(base, record["base"], run_dir) if policy.trains_adapters else None
    tokenizer = load_tokenizer(run_dir / MODEL)
    ends = end_tokens(run_dir / MODEL, policy.model_config, tokenizer, config.data.template_arguments)
    name, dtype = f"{path}@{step}", config.model.compute_dtype
    return StoredPolicy(name, policy, tokenizer, ends, dtype, folder, run_dir, step, config.data)


def find_checkpoint(
    run_dir: Path,
    model_config: ModelConfig,
    wanted: str,
    absent: str = "{wanted}; give last, best, or one of {steps}",
) -> tuple[int, dict[str, Any]]:
    """Step of a run's checkpoint, and what that says about the run.

    Args:
        wanted: `last`, `best` by its evaluation, or a step.
        absent: what a message says of a step without a checkpoint.

    Raises ValueError for a checkpoint that is not there or of another architecture.
    """
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"{run_dir} has no complete checkpoint yet; let the run reach its first save.")
        if wanted in ("last", "best"):
            step = checkpoints.newest_whole() if wanted == "last" else checkpoints.best_step()
            if step is None:
                raise ValueError(f"No checkpoint of {run_dir} has been evaluated; give a step, or last.")
        elif wanted.isdecimal() and int(wanted) in steps:
            step = int(wanted)
        else:
            choices = absent.format(wanted=wanted, steps=", ".join(map(str, steps)))
            raise ValueError(f"{run_dir} has no checkpoint {choices}.")
        record = checkpoints.record(step)
    check_architecture(record["model"], to_json_dict(model_config), run_dir)
    return step, record


def restored(run_dir: Path, step: int, policy: models.Policy, head_names: tuple[str, ...] = ()) -> Params:
    """What a run had trained by a step, these heads besides, in host memory."""
    of_heads = jax.eval_shape(functools.partial(heads.init, head_names, policy.model_config.hidden_size))
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, read_only=True)) as checkpoints:
        return checkpoints.restore_params(step, {**policy.trained.shapes, **of_heads})


def checked_base(
    base: str | None,
    recorded: Mapping[str, str],
    run_dir: Path,
    *,
    need: str = "The adapters of {run_dir} need their base",
    instead: str = "",
) -> Path:
    """Folder of a LoRA run's base; ValueError where its weights are not those that the adapters were trained on.

    Args:
        need: what a message says of a base that is not found.
        instead: what it suggests besides another --base.
    """
    path = base or recorded["path"]
    try:
        folder = models.resolve_folder(path)
    except ValueError as error:
        raise ValueError(f"{need.format(run_dir=run_dir)}: {error} (--base says where it is)") from None
    if folder_fingerprint(folder) != recorded["fingerprint"]:
        raise ValueError(
            f"The weights in {path} are not those that the adapters of {run_dir} were trained on; give that folder as "
            f"--base{instead}."
        )
    return folder
