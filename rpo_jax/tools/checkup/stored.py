"""What earlier runs have left: caches and checkpoints, read whole and compared with the configuration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rpo_jax.config import Config, with_defaults_taken
from rpo_jax.data.embeddings import embedding_file_fault
from rpo_jax.runs.checkpoints import Checkpoints, step_fault, to_json_dict
from rpo_jax.runs.folder import CHECKPOINTS, IDENTITY, OF_HEADS, changed_settings, heads_of, same
from rpo_jax.runs.versions import installed
from rpo_jax.tools.checkup.finding import Finding, failed, ok, warning
from rpo_jax.training.reference import FOLDER as REFERENCE_FOLDER
from rpo_jax.training.reference import cache_file_fault

MODEL_SIZES = (
    "family",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "tie_embeddings",
)


def check_caches(cache_dir: str) -> list[Finding]:
    """Every file of embeddings and of reference log-probs: is it whole, and what its name and header say?"""
    cache = Path(cache_dir).expanduser()
    return [
        _check_cache("embeddings", sorted((cache / "embeddings").glob("*/*.safetensors")), embedding_file_fault),
        _check_cache("reference cache", sorted((cache / REFERENCE_FOLDER).glob("*.safetensors")), cache_file_fault),
    ]


def _check_cache(subject: str, files: list[Path], fault_of: Any) -> Finding:
    faults = {file: fault for file in files if (fault := fault_of(file)) is not None}
    if not faults:
        return ok(subject, f"{len(files)} files, all whole" if files else "empty")
    first, reason = next(iter(faults.items()))
    text = f"{len(faults)} of {len(files)} files cannot be used; the first: {first}: {reason}"
    return warning(subject, text, "nothing needs to be done: it is computed again; rm the file to hear no more of it")


def check_checkpoints(config: Config, run_dir: Path) -> tuple[list[Finding], list[Path]]:
    """Whether the newest checkpoint can be read and resumed from; and the checkpoints that there are."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return [ok("checkpoints", f"none in {run_dir} yet")], []
    try:
        opened = Checkpoints(folder, read_only=True)
    except ValueError as error:
        return [failed("checkpoints", error)], []
    with contextlib.closing(opened) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            return [warning("checkpoints", f"none in {folder} is complete", "let the run reach its first save")], []
        paths = [checkpoints.path(step) for step in steps]
        newest = steps[-1]
        earlier = f"a run then resumes from step {steps[-2]}" if len(steps) > 1 else "the run then starts anew"
        fix = f"rm -r {checkpoints.path(newest)}; {earlier}"
        if (reason := step_fault(checkpoints.path(newest))) is not None:
            return [failed("checkpoints", f"step {newest} is damaged: {reason}", fix)], paths
        try:
            arrays, size = read_state(checkpoints.path(newest) / "state")
            record = checkpoints.record(newest)
        except Exception as error:  # the storage's libraries raise errors of many kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return [failed("checkpoints", f"step {newest} cannot be read: {reason}", fix)], paths
    others = f", besides {', '.join(map(str, steps[:-1]))}" if steps[:-1] else ""
    findings = [ok("checkpoints", f"step {newest} reads back: {arrays} arrays, {size / 2**20:,.1f} MiB{others}")]
    return [*findings, *_check_settings(config, record), *_check_versions(record)], paths


def read_state(folder: Path) -> tuple[int, int]:
    """Read every array of a saved state: their number and bytes. Raises what the storage raises."""
    with ocp.PyTreeCheckpointer() as reader:
        metadata: Any = reader.metadata(folder)
        leaves, definition = jax.tree.flatten(metadata.item_metadata.tree)
        as_numpy = jax.tree.unflatten(definition, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))
        # One at a time: all may be more than the host's memory, and the reader leaves none of its tasks behind.
        for place, leaf in enumerate(leaves):
            item: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
            item[place] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            arguments = ocp.args.PyTreeRestore(item=jax.tree.unflatten(definition, item), restore_args=as_numpy)
            reader.restore(folder, args=arguments)
    return len(leaves), sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _check_settings(config: Config, record: dict[str, Any]) -> list[Finding]:
    """What differs between the configuration and the one that the checkpoint was made with."""
    saved, now = record["config"], to_json_dict(with_defaults_taken(config))
    changed = changed_settings(saved, now)
    decisive = {"optim.name"} | {key for key in changed if key.startswith("lora.") and not same(*changed[key])}
    if config.model.path is None:
        decisive |= {f"model.{name}" for name in MODEL_SIZES}
    if heads_of(saved["objective"]) != heads_of(now["objective"]):
        decisive.add(next(key for key in OF_HEADS if key in changed))
    extrapolated = changed.get("rounds.extrapolation", (0, 0))
    if bool(extrapolated[0]) != bool(extrapolated[1]):
        decisive.add("rounds.extrapolation")
    another = set(IDENTITY) - decisive
    own = "use the checkpoint's own setting, or another run.dir"
    findings = []
    for wanted, make, fix in (
        (decisive, failed, own),
        (another, failed, f"{own}, or --force, which makes another run of it"),
        (set(changed) - decisive - another, warning, "a resumed run goes on with the new setting"),
    ):
        keys = [key for key in changed if key in wanted]
        if keys:
            changes = ", ".join(f"{key} {changed[key][0]} -> {changed[key][1]}" for key in keys)
            findings.append(make("settings", f"checkpoint -> configuration: {changes}", fix))
    return findings or [ok("settings", "the checkpoint's own")]


def _check_versions(record: dict[str, Any]) -> list[Finding]:
    """Other versions than the checkpoint was made with: it can be read, but steps may differ in their last bits."""
    saved = record.get("versions") or {}
    other = [f"{name} {then} -> {now}" for name, then in saved.items() if (now := installed(name)) != then]
    if not other:
        return []
    fix = "install those to resume bit for bit, or go on"
    return [warning("versions", f"checkpoint -> here: {', '.join(other)}", fix)]
