"""A run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rpo_jax import models
from rpo_jax.config.reading import load_config
from rpo_jax.core.files import check_target
from rpo_jax.data.tokenizer import load_tokenizer, padding_id
from rpo_jax.objectives import heads, reward
from rpo_jax.runs.folder import CHECKPOINTS, GENERATION_CONFIG, MODEL
from rpo_jax.runs.model_card import model_card
from rpo_jax.sampling.end_tokens import end_tokens
from rpo_jax.sampling.policy import checked_base, find_checkpoint, restored


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | str | None = None,
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
        step: which checkpoint: a number, or `best` by its evaluation; the newest where not given.
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
    policy = models.Policy(models.read_config(run_dir / MODEL), config.lora)
    if not policy.trains_adapters and (adapter or base is not None):
        raise ValueError(f"{run_dir} is no LoRA run: it trained all weights; leave out --adapter and --base.")
    # What comes next may take minutes: hashing, loading and merging a base.
    bases = (Path(path) for path in (base, config.model.path) if path is not None)
    sources = run_dir / MODEL, run_dir / CHECKPOINTS, *bases
    check_target(Path(out).expanduser(), overwrite=overwrite, sources=sources)
    wanted = "last" if step is None else str(step)
    step, record = find_checkpoint(
        run_dir, policy.model_config, wanted, "of step {wanted}; there are {steps}, and best"
    )
    rewards = config.objective.build().uses_reward_head
    if rewards and adapter:
        raise ValueError(f"{run_dir} trained a reward model, whose head is no adapter; leave out --adapter.")
    trained, of_heads = heads.split(restored(run_dir, step, policy, (reward.NAME,) if rewards else ()))
    start = base or (record["base"]["path"] if policy.trains_adapters else config.model.path)
    settings = {
        "tokenizer": run_dir / MODEL,
        "dtype": dtype,
        "readme": model_card(
            config,
            policy.model_config,
            run_dir=run_dir,
            step=step,
            base=start,
            adapter=adapter,
            chat=record.get("rendered", config.data.template == "chat"),  # older checkpoints do not say
        ),
        "overwrite": overwrite,
    }
    if adapter:
        named, part = _base_name(base, record["base"], run_dir), within(policy.model_config, str(start))
        return policy.save_adapter(out, trained, base=named, within=part, **settings)
    weights = _checked_base(base, record["base"], run_dir) if policy.trains_adapters else None
    # As the folder that the run started from had them; otherwise from the architecture.
    settings["config"] = run_dir / MODEL
    settings["generation_config"] = run_dir / MODEL if (run_dir / MODEL / GENERATION_CONFIG).is_file() else None
    tokenizer, arguments = load_tokenizer(run_dir / MODEL), config.data.template_arguments
    if rewards:
        names = ("template", "template_arguments", "max_prompt_tokens", "max_tokens", "truncation_side")
        rendering = {name: getattr(config.data, name) for name in names}
        kernel = np.asarray(of_heads[reward.NAME]["kernel"])
        padding = padding_id(tokenizer, policy.model_config.vocab_size)
        settings["reward"] = models.RewardHead(kernel, padding, rendering)
    ends = end_tokens(run_dir / MODEL, policy.model_config, tokenizer, arguments)
    return policy.save(out, trained, weights, end_ids=ends, **settings)


def check_push(name: str) -> None:
    """See that the hub would take a push to this repository, before an export's minutes. Raises ValueError if not."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push {name} is no name of a repository: {' '.join(str(error).split())}") from None
    try:
        HfApi().whoami()
    except Exception as error:  # the classes differ between versions of the hub client
        raise ValueError(
            f"--push {name}: {constants.ENDPOINT} knows no user of this machine ({type(error).__name__}); log in by "
            "`hf auth login`, or set HF_TOKEN to a token that may write."
        ) from None


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload a folder to a model repository of the hub, which is made where it is not there; returns its address.

    Args:
        public: whether a repository that is made can be seen by everyone.

    Weights and adapters of an earlier export that this one has not are removed: readers would take them.

    Raises ValueError where the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    def is_stale(file: str) -> bool:
        weights = file.endswith((".safetensors", ".safetensors.index.json")) or file == "adapter_config.json"
        return weights and "/" not in file and not (folder / file).exists()

    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        stale = [file for file in api.list_repo_files(name) if is_stale(file)]
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export of rpo_jax", delete_patterns=stale or None
        )
    except Exception as error:  # the classes differ between versions of the hub client
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--push {name} failed: {reason}; {folder} is whole: `hf upload {name} {folder}` sends it again."
        ) from None
    return str(address)


def within(model: models.ModelConfig, base: str) -> str | None:
    """The module of the base that holds the model's layers, where the base is more than text.

    Of the base its config.json is read alone. Raises ValueError where there is none.
    """
    from transformers import PretrainedConfig

    kinds = models.FAMILIES[model.family].multimodal
    if not kinds:
        return None
    try:
        values, _ = PretrainedConfig.get_config_dict(str(Path(base).expanduser()))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"No config.json of the base {base}: {reason} (--base says where the base is)") from None
    return "language_model" if values.get("model_type") in kinds else None


def _base_name(base: str | None, recorded: Mapping[str, str], run_dir: Path) -> str:
    """What a PEFT folder says of its base: a local folder's full path, once checked, or a hub's name as it is."""
    if base is None or not Path(base).expanduser().is_dir():
        return base or recorded["path"]
    return str(_checked_base(base, recorded, run_dir).resolve())


def _checked_base(base: str | None, recorded: Mapping[str, str], run_dir: Path) -> Path:
    return checked_base(
        base,
        recorded,
        run_dir,
        need="The base of {run_dir} is needed to merge its adapters",
        instead=", or write the adapters alone with --adapter",
    )
