"""A run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo_jax import models
from rpo_jax.config.reading import load_config
from rpo_jax.core.files import check_target
from rpo_jax.models import ModelConfig, lora
from rpo_jax.models.decoder import Params
from rpo_jax.runs.checkpoints import Checkpoints, check_architecture, to_json_dict
from rpo_jax.runs.folder import CHECKPOINTS, GENERATION_CONFIG, MODEL
from rpo_jax.runs.model_card import model_card
from rpo_jax.sampling.policy import checked_base

_ALONE = ", or write the adapters alone with --adapter"


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    adapter: bool = False,
    base: str | None = None,
) -> Path:
    """Write weights, configuration, tokenizer, chat template and model card of a run's policy; whole or not at all.

    A LoRA run's adapters are added in float32 to the weights of the folder that it started from, unrounded, also
    where training kept them in int8 or bfloat16: the same model as its PEFT folder on that base, which is how such
    adapters are used. It differs from the policy that was trained by the rounding of the base.

    Args:
        step: which checkpoint; the newest where not given.
        dtype: of the tensors; where not given, that of the folder that the run started from (adapters: float32).
        overwrite: replace an existing folder.
        adapter: write the adapters alone, as a PEFT folder.
        base: where a LoRA run's base is now, if no longer where it was.

    Raises:
        ValueError: a folder that is no run, a step without a checkpoint, an `out` that exists, adapters of a run that
            has none, another base than the run's.
    """
    run_dir = Path(run_dir).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml; give the run.dir of a training run.")
    config = load_config(run_dir / "config.yaml")
    lora_config = config.lora
    if not lora_config.rank and (adapter or base is not None):
        raise ValueError(f"{run_dir} is no LoRA run: it trained all weights; leave out --adapter and --base.")
    model_dir = run_dir / MODEL
    model_config = models.read_config(model_dir)
    # What comes next may take minutes: hashing, loading and merging a base.
    check_target(Path(out).expanduser(), overwrite=overwrite)
    adapters = lora_config.rank > 0
    like = lora.abstract_adapters(model_config, lora_config) if adapters else models.abstract_params(model_config)
    trained, record, step = _checkpoint(run_dir, model_config, step, like)
    start = base or (record["base"]["path"] if adapters else config.model.path)
    card = model_card(config, model_config, run_dir=run_dir, step=step, base=start, adapter=adapter)
    if adapter:
        return lora.save_adapter(
            out,
            model_config,
            trained,
            lora_config,
            base=_base_name(base, record["base"], run_dir),
            tokenizer=model_dir,
            dtype=dtype,
            readme=card,
            overwrite=overwrite,
        )
    if lora_config.rank:
        _, weights = models.load_pretrained(checked_base(base, record["base"], run_dir, _ALONE))
        trained = lora.merge(model_config, weights, trained, lora_config)
    return models.save_pretrained(
        out,
        model_config,
        trained,
        tokenizer=model_dir,
        # As the folder that the run started from had it; otherwise from the architecture.
        generation_config=model_dir if (model_dir / GENERATION_CONFIG).is_file() else None,
        dtype=dtype,
        readme=card,
        overwrite=overwrite,
    )


def _checkpoint(
    run_dir: Path, model_config: ModelConfig, step: int | None, like: Params
) -> tuple[Params, dict[str, Any], int]:
    """What a run had trained by a step, or by its newest checkpoint, what that says about the run, and the step."""
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"{run_dir} has no complete checkpoint yet; let the run reach its first save.")
        if step is not None and step not in steps:
            raise ValueError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
        step = checkpoints.newest_whole() if step is None else step
        assert step is not None, "there are some"
        record = checkpoints.record(step)
        check_architecture(record["model"], to_json_dict(model_config), run_dir)
        return checkpoints.restore_params(step, like), record, step


def _base_name(given: str | None, recorded: Mapping[str, str], run_dir: Path) -> str:
    """What a PEFT folder says of its base: a local folder's full path, once checked, or a hub's name as it is."""
    if given is None or not Path(given).expanduser().is_dir():
        return given or recorded["path"]
    return str(checked_base(given, recorded, run_dir, _ALONE).resolve())
