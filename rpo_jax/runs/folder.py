"""The folder of a run: made whole or not at all, never emptied of what the run itself reads, checked before a resume.

It holds config.yaml, run_id, data.json (what of the data was cut), metrics.jsonl, tensorboard/, checkpoints/, and in
model/ all of a Hugging Face folder but the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_jax import models
from rpo_jax.config import Config, DistributedConfig, ObjectiveConfig, PolicyConfig, with_defaults_taken
from rpo_jax.config.reading import dump_config, load_config
from rpo_jax.core.files import atomic_directory, check_writable, read_json, recover
from rpo_jax.core.locks import one_writer
from rpo_jax.data.tokenize import describe_cuts, describe_notes
from rpo_jax.data.tokenizer import load_tokenizer, tokenizer_folder
from rpo_jax.hosts import processes
from rpo_jax.models import ModelConfig
from rpo_jax.models.huggingface.configuration import write_config
from rpo_jax.models.huggingface.folders import copy_tokenizer, folder_fingerprint
from rpo_jax.objectives import heads, partition, reward, running, value
from rpo_jax.runs.checkpoints import Checkpoints, check_architecture, to_json_dict
from rpo_jax.runs.tracking import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"
MODEL = "model"
RUN_ID = "run_id"
DATA_COUNTS = "data.json"
GENERATION_CONFIG = "generation_config.json"
NETWORK_FOLDER_SECONDS = 30  # until a network folder shows on one host what another wrote


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, this run alone writes its folder: process 0 has the lock.

    Raises ValueError that names host and process where another run writes there, and for a folder that cannot be made.
    """
    if not processes.is_main():
        yield
        return
    _check_place(folder)
    with one_writer(folder, "run.dir"):
        yield


def check_run_folder(config: Config, folder: Path) -> bool:
    """Whether there is a checkpoint to resume from.

    Raises ValueError where the processes of a run do not see the same, for a run that neither resume nor overwrite was
    asked for, and for a folder that cannot be made or whose replacement would delete what this run reads.
    """
    if processes.is_main():
        recover(folder)
    processes.agree()
    # First without the storage, whose reader waits for the other processes' readers.
    _check_seen_by_all(folder, (folder / "config.yaml").is_file() + any(folder.glob(f"{CHECKPOINTS}/[0-9]*")))
    resuming = _resuming(config, folder)
    _check_seen_by_all(folder, resuming)  # all have looked before one changes anything
    return resuming


def _check_seen_by_all(folder: Path, mine: int) -> None:
    """ValueError where a process sees less of the folder than another."""
    seen = processes.gather(int(mine))
    if len(set(seen)) > 1:
        raise ValueError(_not_shared(folder, seen.index(max(seen)), seen.index(min(seen))))


def check_shared(folder: Path) -> None:
    """ValueError unless all processes see the run folder that process 0 made."""
    run_id = processes.from_main(lambda: (folder / RUN_ID).read_text(encoding="utf-8"))
    deadline = time.monotonic() + NETWORK_FOLDER_SECONDS
    while not (same := _reads(folder / RUN_ID, run_id)) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = processes.gather(same)
    if not all(seen):
        raise ValueError(_not_shared(folder, 0, seen.index(False)))


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == content
    except OSError:
        return False


def _not_shared(folder: Path, has: int, lacks: int) -> str:
    return (
        f"run.dir={folder} is not one folder for all: {processes.name(lacks)} does not see there what "
        f"{processes.name(has)} sees; choose one on storage that all hosts share."
    )


def _check_place(folder: Path) -> None:
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"run.dir={folder} cannot be made: {nearest} is no folder to write to; choose another.")
    check_writable(nearest)  # before hours go into what could not be saved
    if os.path.ismount(folder):
        raise ValueError(
            f"run.dir={folder} is where a disk is mounted, so it cannot be replaced; choose a folder in it."
        )


def _resuming(config: Config, folder: Path) -> bool:
    _check_place(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not is_run(folder):
        raise ValueError(f"run.dir={folder} is not empty and holds no run; choose another folder.")
    if config.run.resume == "never" and not config.run.overwrite:
        raise ValueError(
            f"run.dir={folder} holds a run already; go on with it (--resume auto), replace it (--overwrite), or "
            "choose another folder."
        )
    if config.run.resume == "auto" and newest_record(folder) is not None:
        return True
    for key, path in (
        ("model.path", config.model.path),
        ("reference.path", config.reference.path),
        *(("data.mix" if config.data.mix else "data.path", path) for path in config.data.sources),
        ("data.eval_path", config.data.eval_path),
        *(("reference.others", path) for path in config.reference.others),
        ("model.tokenizer", config.model.tokenizer),
        ("embedding.encoder", config.embedding.encoder),
        ("rounds.score", (config.rounds.score or "").partition(":")[2].partition(":")[0]),
    ):
        place = Path(path or "").expanduser()
        if path and place.exists() and place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{key}={path} lies in run.dir={folder}, which this run would replace; move it, or choose another "
                "run.dir."
            )
    return False


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and not one that a file config.yaml happens to be in."""
    return (folder / "config.yaml").is_file() and (folder / RUN_ID).is_file()


def newest_record(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint says about its run; None where there is no checkpoint."""
    return newest_checkpoint(folder)[1]


def newest_checkpoint(folder: Path) -> tuple[int | None, dict[str, Any] | None]:
    """The newest checkpoint's step and what it says about its run; None twice where there is none."""
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, read_only=True)) as checkpoints:
        newest = checkpoints.latest_step()
        return newest, None if newest is None else checkpoints.record(newest)


def ranked_steps(folder: Path) -> tuple[int | None, int | None]:
    """The steps of the best checkpoint that is kept and of the newest; both are the newest where none is ranked."""
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, read_only=True)) as checkpoints:
        newest, best = checkpoints.latest_step(), checkpoints.best_step()
        return newest if best is None else best, newest


def make_run_folder(
    config: Config, model_config: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A new run folder, in place of one that is there; process 0 makes it."""
    if not processes.is_main():
        return
    with atomic_directory(folder, overwrite=True, locked=True) as new:
        _describe_model(config.model, model_config, tokenizer, new / MODEL)
        # What was asked of this start only would, read back from here, ask it again of the next.
        lasting = dataclasses.replace(config.run, resume="never", overwrite=False, force=False)
        lasting = dataclasses.replace(config, run=lasting, distributed=DistributedConfig())
        (new / "config.yaml").write_text(dump_config(lasting), encoding="utf-8")
        (new / RUN_ID).write_text(uuid.uuid4().hex, encoding="utf-8")


def _describe_model(
    asked: PolicyConfig, model_config: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """All of a Hugging Face folder but the weights, the files of the folder that the run starts from as they are."""
    folder.mkdir()
    base = None if asked.path is None else models.resolve_folder(asked.path)
    write_config(folder, model_config, model_config.dtype, base)
    if base is not None and (base / GENERATION_CONFIG).is_file():
        shutil.copyfile(base / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    source = asked.path or asked.tokenizer
    copy_tokenizer(tokenizer if source == "train" else tokenizer_folder(source), folder)
    if load_tokenizer(folder).chat_template != tokenizer.chat_template:  # one that the run gave it
        (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")


def data_notes(run_dir: Path, max_tokens: int) -> list[str]:
    """What of a run's data was cut or is worth a word, a line each; nothing for runs older than the file."""
    if not (run_dir / DATA_COUNTS).is_file():
        return []
    notes = []
    for part, counts in read_json(run_dir, DATA_COUNTS).items():
        try:
            cuts = describe_cuts(counts, max_tokens)
            lines = [*([cuts] if cuts else []), *describe_notes(counts)]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{run_dir / DATA_COUNTS} is damaged: '{part}' should be counts; remove it.") from None
        notes += [f"{part.replace('_', '-')} data: {line}" for line in lines]
    return notes


def held_out_examples(run_dir: Path) -> int | None:
    """How many held-out examples a run has; None where it has none, or is older than the file that says so."""
    counts = read_json(run_dir, DATA_COUNTS) if (run_dir / DATA_COUNTS).is_file() else {}
    count = counts.get("held_out", {}).get("examples")
    return count if isinstance(count, int) and count > 0 else None


def resume_command(config: Config, started: bool) -> str:
    """The command that goes on with a run: the configuration in its folder, and what else this start was given.

    Args:
        started: whether the folder is this run's by now; otherwise the command starts it as this start was to.
    """
    file = Path(config.run.dir).expanduser() / "config.yaml"
    before = to_json_dict(load_config(file) if started else Config())
    asked = ("run.resume", "run.overwrite", "run.force")
    changed = {
        f"{section}.{key}": value
        for section, values in to_json_dict(config).items()
        for key, value in values.items()
        if value != before[section][key] and not (started and f"{section}.{key}" in asked)
    }
    words = ["python", "-m", "rpo_jax.train", *(["--config", str(file), "--resume", "auto"] if started else [])]
    words += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return shlex.join(words)


def base_record(config: Config) -> dict[str, str] | None:
    """What a checkpoint of adapters says about the base without which they are nothing; None without LoRA."""
    if not config.lora.rank:
        return None
    assert config.model.path is not None, "checked with the configuration"
    # A local folder by its full path, so that it is found from anywhere; a hub's name as it is.
    path, local = config.model.path, Path(config.model.path).expanduser()
    fingerprint = folder_fingerprint(models.resolve_folder(path))
    return {"path": str(local.resolve()) if local.is_dir() else path, "fingerprint": fingerprint}


def same(before: Any, now: Any) -> bool:
    """Equal settings; the order of a list says nothing."""
    return before == now or (isinstance(before, list) and isinstance(now, list) and sorted(before) == sorted(now))


def changed_settings(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint's configuration and the current one say of every setting in which they differ.

    Where, how long and on what a run goes on is left out: it may change without changing what its steps compute.
    """
    defaults = to_json_dict(with_defaults_taken(Config()))
    return {
        f"{section}.{key}": (before, now)
        for section, values in current.items()
        for key, now in values.items()
        # A checkpoint that is older than a setting was made with what is its default now.
        if (before := (defaults[section] | saved.get(section, {}))[key]) != now
        and section not in ("mesh", "distributed", "train", "tracking")
        and key not in ("dir", "cache_dir", "resume", "overwrite", "force")
    }


# Of the settings, those that make another run; of another model, base or optimizer nothing could go on.
IDENTITY = ("objective.name", "objective.bco_shift", "data.pairing", "data.mix")
LIMITS = {"data.max_tokens", "data.max_prompt_tokens"}


# Settings of rounds that say nothing of what a round trains on.
NOT_OF_A_ROUND = ("steps", "extrapolation", "eval_prompts", "eval_every", "judge")


def _changed_round(saved: dict[str, Any], record: dict[str, Any], step: int, changed: Mapping[str, Any]) -> list[str]:
    """What would make another round of the one that a checkpoint is in the middle of, or of its number."""
    before, now = (
        (of.get("total_steps") or 0) // rounds if (rounds := of["config"]["train"].get("rounds", 0)) else 0
        for of in (saved, record)
    )
    if not step or not before or not now:
        return []
    if before != now:
        return [f"rounds of {before} steps, not {now}"]
    kept = {f"rounds.{key}" for key in NOT_OF_A_ROUND}
    of_rounds = [key for key in changed if key.startswith("rounds.") and key not in kept] if step % now else []
    return [f"{key}={changed[key][0]}, not {changed[key][1]}, in the round that step {step} is in" for key in of_rounds]


# What decides the heads beside a model, which are part of a checkpoint's state, and what they are.
OF_HEADS = ("objective.partition", "objective.name", "objective.bco_shift")
_HEADS = {
    partition.NAME: "a head for a value of the prompt",
    value.NAME: "a value head",
    reward.NAME: "a reward head",
    running.NAME: "a running mean of rewards",
}


def heads_of(settings: Mapping[str, Any]) -> set[str]:
    """Names of the heads of an objective, by its section of a checkpoint's settings."""
    known = {one.name for one in dataclasses.fields(ObjectiveConfig)}
    section = ObjectiveConfig(**{key: value for key, value in settings.items() if key in known})
    return set(heads.wanted(section.build(), section.partition == "learned"))


def check_resumable(folder: Path, record: dict[str, Any], reporter: Reporter, force: bool) -> None:
    """ValueError where the newest checkpoint is of another model, base, optimizer or run; says what else differs.

    With `force` another run goes on, as long as it can; `record` then says what it was before.
    """
    step, saved = newest_checkpoint(folder)
    assert step is not None, "check_run_folder found a checkpoint"
    assert saved is not None, "and it has a record"
    check_architecture(saved["model"], record["model"], folder)
    changed = changed_settings(saved["config"], record["config"])
    adapters = [key for key, (before, now) in changed.items() if key.startswith("lora.") and not same(before, now)]

    def refused(reason: str, fix: str) -> ValueError:
        return ValueError(f"The checkpoint in {folder} {reason}; resume with {fix}, or choose another run.dir.")

    if adapters:
        settings = ", ".join(f"{key}={changed[key][0]}, not {changed[key][1]}" for key in adapters)
        raise refused(f"was trained with {settings}", "its own lora section")
    if differing := heads_of(saved["config"]["objective"]) ^ heads_of(record["config"]["objective"]):
        key = next(key for key in OF_HEADS if key in changed)
        note = f", and one of them has {_HEADS[min(differing)]}" if key == "objective.name" else ""
        raise refused(f"was trained with {key}={changed[key][0]}, not {changed[key][1]}{note}", "its own")
    before, now = changed.get("rounds.extrapolation", (0, 0))
    if bool(before) != bool(now):  # what it goes on from is part of the state
        raise refused(f"was trained with rounds.extrapolation={before}, not {now}", "its own")
    before, now = saved.get("base"), record["base"]
    if before is not None and before["fingerprint"] != now["fingerprint"]:
        weights = f"the weights that {before['path']} had, which are not those in model.path={now['path']} now"
        raise refused(f"holds adapters of {weights}", "the former")
    if "optim.name" in changed:
        before, now = changed["optim.name"]
        raise refused(f"holds the state of optim.name={before}, not of {now}", before)
    others = [f"{key}={changed[key][0]}, not {changed[key][1]}" for key in IDENTITY if key in changed]
    # Checkpoints of earlier versions say neither what their data was nor how long they were to be.
    if saved.get("data", record["data"]) != record["data"]:
        others.append("other training data")
    # With other limits, other examples may be too long to be told apart, and are left out.
    elif saved.get("labels", record["labels"]) != record["labels"] and not changed.keys() & LIMITS:
        others.append("other labels, scores or weights of the same training data")
    before, now = saved.get("total_steps"), record["total_steps"]
    if before not in (None, now) and record["config"]["optim"]["schedule"] not in ("constant", "inverse_sqrt"):
        others.append(f"a learning rate that decays over {before} steps, not {now}")
    others += _changed_round(saved, record, step, changed)
    if others and not force:
        raise refused(
            f"was trained with {'; '.join(others)}", "its own, or with --force (the rest is then another run)"
        )
    if others:
        reporter.say(f"resuming by --force what was trained with {'; '.join(others)}")
    for key, (before, now) in changed.items():
        reporter.say(f"resuming with another {key}: {before} until now, {now} from here on")
    record["forced"] = [*saved.get("forced", []), *others]
