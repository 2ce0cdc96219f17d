"""A model to use, not to train: what a run folder or a Hugging Face folder holds, on the mesh."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import LoraConfig
from rpo_jax.config.reading import load_config
from rpo_jax.data.tokenizer import load_tokenizer
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig, lora
from rpo_jax.models.folders import folder_fingerprint
from rpo_jax.runs.checkpoints import Checkpoints, check_architecture, to_json_dict
from rpo_jax.runs.folder import CHECKPOINTS, GENERATION_CONFIG, MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = Any
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Policy:
    """A model that has been found and checked, its weights not yet loaded.

    Attributes:
        name: its folder or hub name, and for a run the step.
        end_ids: tokens that end an answer: those of the model, its generation_config.json and the tokenizer.
        template: data.template of its run; None for a folder.
        compute_dtype: that of its run; float32 for a folder.
        folder: of the weights; None for a run that trained all of them.
        run_dir: None for a folder.
        step: of the run's checkpoint.
    """

    name: str
    model_config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    template: str | None
    compute_dtype: str
    folder: Path | None
    run_dir: Path | None = None
    step: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)

    def load(self, mesh: Mesh) -> Params:
        """The parameters that the decoder reads, on the mesh; a LoRA run's are its base with the adapters beside it."""
        model_config = self.model_config
        if self.run_dir is None:
            return models.load_sharded(str(self.folder), _shardings(mesh, model_config))
        if not self.lora.rank:
            return self._trained(models.abstract_params(model_config), _shardings(mesh, model_config))
        shapes = lora.abstract_base(model_config, self.lora.base_dtype)
        places = sharding.parameter_shardings(mesh, lora.base_axes(model_config, self.lora.base_dtype), shapes)
        base = lora.load_base(str(self.folder), self.lora.base_dtype, places)
        like = lora.abstract_adapters(model_config, self.lora)
        places = sharding.parameter_shardings(mesh, lora.adapter_axes(model_config, self.lora), like)
        return lora.combine(base, self._trained(like, places), self.lora)

    def _trained(self, like: Params, shardings: Any) -> Params:
        assert self.run_dir is not None
        with contextlib.closing(Checkpoints(self.run_dir / CHECKPOINTS, read_only=True)) as checkpoints:
            host = checkpoints.restore_params(self.step, like)
        return jax.tree.map(jax.device_put, host, shardings)


def _shardings(mesh: Mesh, model_config: ModelConfig) -> Any:
    return sharding.parameter_shardings(mesh, models.param_axes(model_config), models.abstract_params(model_config))


def find_policy(path: str, *, checkpoint: str | None = None, base: str | None = None) -> Policy:
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
    model_config = models.check_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    ends = _end_ids(folder, model_config, tokenizer)
    return Policy(path, model_config, tokenizer, ends, None, "float32", folder)


def _of_run(run_dir: Path, path: str, checkpoint: str, base: str | None) -> Policy:
    config = load_config(run_dir / "config.yaml")
    model_config = models.read_config(run_dir / MODEL)
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, read_only=True)) as checkpoints:
        step = _step(checkpoints, run_dir, checkpoint)
        record = checkpoints.record(step)
    check_architecture(record["model"], to_json_dict(model_config), run_dir)
    if base is not None and not config.lora.rank:
        raise ValueError(f"base={base} is for LoRA runs, and {path} trained all weights; leave it out.")
    folder = checked_base(base, record["base"], run_dir) if config.lora.rank else None
    tokenizer = load_tokenizer(run_dir / MODEL)
    ends = _end_ids(run_dir / MODEL, model_config, tokenizer)
    name, dtype = f"{path}@{step}", config.model.compute_dtype
    return Policy(name, model_config, tokenizer, ends, config.data.template, dtype, folder, run_dir, step, config.lora)


def _step(checkpoints: Checkpoints, run_dir: Path, wanted: str) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{run_dir} has no complete checkpoint yet; let the run reach its first save.")
    if wanted == "last":
        newest = checkpoints.newest_whole()
        assert newest is not None, "there are some"
        return newest
    if wanted == "best":
        best = checkpoints.best_step()
        if best is None:
            raise ValueError(f"No checkpoint of {run_dir} has been evaluated; give a step, or last.")
        return best
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise ValueError(
            f"{run_dir} has no checkpoint {wanted}; give last, best, or one of {', '.join(map(str, steps))}."
        )
    return int(wanted)


def checked_base(given: str | None, recorded: Mapping[str, str], run_dir: Path, otherwise: str = "") -> Path:
    """Folder of a LoRA run's base; ValueError where its weights are not those that the adapters were trained on.

    Args:
        given: where the base is now; None for where it was when the run was trained.
        otherwise: what else a user can do, for the message.
    """
    path = given or recorded["path"]
    try:
        folder = models.resolve_folder(path)
    except ValueError as error:
        raise ValueError(f"The adapters of {run_dir} need their base: {error} (--base says where it is)") from None
    if folder_fingerprint(folder) != recorded["fingerprint"]:
        raise ValueError(
            f"The weights in {path} are not those that the adapters of {run_dir} were trained on; give that folder as "
            f"--base{otherwise}."
        )
    return folder


def _end_ids(folder: Path, model_config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    file, told = folder / GENERATION_CONFIG, None
    if file.is_file():
        try:
            told = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object ({error}); copy it again, or remove it.") from None
    return frozenset(_ids(told) | _ids(model_config.eos_token_id) | _ids(tokenizer.eos_token_id))


def _ids(value: Any) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
