"""The README.md of an exported folder: what was trained, on what, how, and how well; metadata as the hub reads it.

Nothing of the machine goes into it: of local paths the last name alone, of the configuration the keys listed here.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from rpo_jax.config import Config, resolve
from rpo_jax.core.jsonl import read_jsonl
from rpo_jax.core.templates import render
from rpo_jax.core.text import table_cell
from rpo_jax.core.yaml_text import parse_yaml, read_text
from rpo_jax.models import ModelConfig
from rpo_jax.runs.folder import data_notes
from rpo_jax.runs.tracking import METRICS

_HIDDEN = ("eval_seconds",)  # of the machine, not of the model


def model_card(
    config: Config,
    model_config: ModelConfig,
    *,
    run_dir: Path,
    step: int,
    base: str | None,
    adapter: bool,
    chat: bool = False,
) -> str:
    """The card of a run's policy after a step.

    Args:
        base: folder or hub name that the run started from; None for a model from scratch. Its own card, where it has
            one, gives the license, and for a local folder the hub's model that it came from.
        adapter: the folder holds LoRA adapters alone.
        chat: prompts were rendered by the tokenizer's chat template.
    """
    from huggingface_hub import ModelCardData

    method, reference = resolve(config), config.reference
    objective = method.objective
    of_base = _card_of(base)
    # Adapters fit their base alone; whole weights descend also from what their base was made of.
    on_hub = base if base is not None and _cached(base, "config.json") else None
    descends_from = on_hub or (None if adapter else of_base.get("base_model"))
    known = [source for source in config.data.sources if _cached(source, None)]
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if objective.uses_reward_head else "text-generation",
        base_model=descends_from,
        datasets=known[0] if len(known) == 1 else known or None,
        tags=["rpo_jax", config.objective.name, *(["lora"] if config.lora.rank else [])],
        # A link into the base's folder would lead nowhere from here.
        **{key: of_base[key] for key in ("license", "license_name", "license_link") if _license(key, of_base.get(key))},
    )
    start = f"a new {model_config.family} model" if base is None else _name(base)
    metrics = [line for line in read_jsonl(run_dir / METRICS) if line["step"] <= step]
    is_own_reference = method.reference is not None and reference.path is None and not reference.others
    steps, rows = _held_out(metrics, is_own_reference)
    return render(
        "model_card.md",
        metadata=metadata.to_yaml(),
        title=start if base else "Language model",
        start=start,
        objective=objective,
        data=_data_name(*config.data.sources),
        family=model_config.family,
        rewards=objective.uses_reward_head,
        adapts=_name(base) if adapter and base is not None else None,
        chat=chat,
        settings=_settings(config, step, _epochs(metrics, step)),
        notes=data_notes(run_dir, config.data.max_tokens),
        steps=steps,
        held_out=rows,
        eval_rows=config.data.eval_rows,
        eval_data=None if config.data.eval_path is None else _data_name(config.data.eval_path),
    )


def _name(path: str) -> str:
    """What may be published of a path: a hub name that the cache knows as it is, of anything else the last part."""
    return path if _cached(path, "config.json") or _cached(path, None) else Path(path).name


def _data_name(*sources: str) -> str:
    return " and ".join(f"`{_name(source)}`" for source in sources) or "no data"


def _cached(name: str, file: str | None) -> Path | None:
    """A file of a hub model in the local cache, or, without a file, the folder of a hub data set there."""
    from huggingface_hub import constants, file_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().exists():
        return None
    try:
        if file is None:
            folder = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(
                repo_id=name.partition(":")[0], repo_type="dataset"
            )
            return folder if folder.is_dir() else None
        cached = try_to_load_from_cache(name, file)
    except (HFValidationError, ValueError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def _card_of(base: str | None) -> dict[str, Any]:
    """The metadata of the base's card, {} where it has none that can be read."""
    if base is None:
        return {}
    own = Path(base).expanduser() / "README.md"
    if (card := own if own.is_file() else _cached(base, own.name)) is None:
        return {}
    try:
        lines = iter(read_text(card).splitlines())
        if next(lines, "").strip() != "---":
            return {}
        metadata = parse_yaml("\n".join(itertools.takewhile(lambda line: line.strip() != "---", lines)))
        return metadata if isinstance(metadata, dict) else {}
    except Exception:  # a card that others wrote, in YAML: whatever is wrong with it, an export does without
        return {}


def _license(key: str, value: Any) -> bool:
    return isinstance(value, str) and (key != "license_link" or value.startswith("https://"))


def _epochs(metrics: list[dict[str, float]], step: int) -> str | None:
    """Passes over the training data until a step; None where no line says."""
    rates = [line["epoch"] / line["step"] for line in metrics if line["step"] > 0 and "epoch" in line]
    return f"{rates[-1] * step:.3g}" if rates else None


def _settings(config: Config, step: int, epochs: str | None) -> list[tuple[str, str]]:
    """The keys that decide what was computed, as they are written in a configuration."""
    method = resolve(config)

    def of(section: str, *keys: str) -> dict[str, Any]:
        return {f"{section}.{key}": getattr(getattr(config, section), key) for key in keys}

    chosen: dict[str, Any] = {
        "objective.name": config.objective.name,
        **{f"objective.{name}": value for name, value in method.objective.options_in_use().items()},
        "contrast.weights": method.weights,
        "contrast.weights_on": "loss" if method.weights_on == "loss" else None,
    }
    if method.weights == "embedding":
        chosen |= of("contrast", "temperature", "perplexity", "group") | {"contrast.perplexity": method.perplexity}
        chosen |= {"embedding.encoder": _name(config.embedding.encoder)} | of("embedding", "text")
    if method.objective.uses_reference:
        reference = config.reference.path
        chosen |= of("reference", "mode") | {"reference.path": reference and _name(reference)}
    arguments = config.data.template_arguments
    chosen |= of("data", "pairing") | {"data.template_arguments": json.dumps(arguments) if arguments else None}
    chosen |= of("data", "template", "max_prompt_tokens", "max_tokens") | of("batch", "pairs", "order")
    chosen |= {"steps": step, "epochs": epochs}
    chosen |= of("optim", "name", "learning_rate", "warmup_steps", "schedule", "max_grad_norm", "weight_decay")
    chosen |= of("model", "compute_dtype") | of("run", "seed")
    if config.lora.rank:
        targets = {"lora.targets": ", ".join(config.lora.targets)}
        chosen |= of("lora", "rank", "alpha", "targets", "base_dtype") | targets
    return [(key, table_cell(value)) for key, value in chosen.items() if value is not None]


def _held_out(metrics: list[dict[str, float]], is_own_reference: bool) -> tuple[list[int], list[tuple[str, ...]]]:
    """The last held-out metrics of these lines, beside those before training: their steps and a line of each."""
    by_step: dict[int, dict[str, float]] = {}
    for line in metrics:
        held_out = {
            name.removeprefix("eval_"): value
            for name, value in line.items()
            if name.startswith("eval_") and name not in _HIDDEN and math.isfinite(value)
        }
        if held_out:
            by_step[int(line["step"])] = held_out
    steps = sorted({min(by_step), max(by_step)}) if by_step else []

    def told(name: str, at: int) -> str:
        if name not in by_step[at]:
            return ""
        if is_own_reference and at == 0 and name == "rewards/accuracies":
            return "tied"  # every reward is 0, whatever rounding makes of it
        return f"{round(by_step[at][name], 4) + 0.0:.4f}"  # 0 has no sign

    names = by_step[steps[-1]] if steps else ()
    return steps, [(table_cell(name), *(told(name, at) for at in steps)) for name in names]
