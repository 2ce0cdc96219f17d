"""Checkpoints of a run on disk, through orbax: saved in the background, the newest and the best kept."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.path import atomicity

from rpo_jax.core.files import (
    WriteFailed,
    check_there,
    file_identity,
    has_moved,
    refusal,
    remove_folder,
    rename,
    sync,
    sync_folder,
)
from rpo_jax.core.jsonl import parse_json
from rpo_jax.core.manifest import NAME, fault, write_manifest
from rpo_jax.hosts.devices import devices
from rpo_jax.models import Experts, Variant

log = logging.getLogger(__name__)

_DAMAGED = "damaged-"  # what a checkpoint is renamed to that cannot be used; its step can then be saved again
_SUMMED = "checksums"  # in the record of a checkpoint that has them
_REMOVED = "removed"  # a checkpoint that is no longer wanted goes here in one rename, so that none is ever half there
LEAST_SAVE_SECONDS, SLOWEST_BYTES_PER_SECOND = 1200, 10**7  # what a save may take, and a disk at least write
_UNRANKED = -1e30  # score of a checkpoint without an evaluation of its own: orbax ranks only numbers


class SaveFailed(OSError):
    """A checkpoint is not on disk; the message says why."""


class _DurablePath(atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that counts, and pushes out an older one, once all of it and its name are on disk.

    The storage itself syncs tensors, not its metadata, nor the folders that they are in.
    """

    on_disk: ClassVar[set[Path]] = set()

    async def finalize(self) -> None:
        partial, step = Path(self.get()), Path(self.get_final())
        identity = file_identity(partial)
        try:
            await super().finalize()
        except OSError:
            if not has_moved(identity, partial, step):
                raise
        await asyncio.to_thread(sync, step)
        for folder in (step.parent, step.parent.parent):  # its name, and that of the folder of checkpoints
            await asyncio.to_thread(sync_folder, folder)
        self.on_disk.add(step)


class Checkpoints:
    """The checkpoints below a folder.

    Each holds the training state, a record, a JSON object that says which model and configuration made it, and
    checksums of all its files, which are in it before it gets its name.

    Args:
        warn: called with why a save failed, when the next one begins.
        folder: created on the first save.
        keep_last: newest checkpoints to keep.
        keep_best: checkpoints of highest score to keep besides.
        marker: a file without which nothing is saved, as its disk has gone.
        save_bytes: size of what is saved, for the time that a save may take.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
        marker: Path | None = None,
        save_bytes: int = 0,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        _quieten_storage()
        self.folder = Path(folder).resolve()
        self._read_only, self._marker, self._warn = read_only, marker, warn
        policy: list[Any] = [checkpoint_managers.LatestN(n=keep_last)]
        if keep_best:
            policy.append(
                checkpoint_managers.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policy),
            best_fn=_score,
            create=not read_only,
            read_only=read_only,
            # What a process that was killed had begun to write.
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else _REMOVED,
            temporary_path_class=_DurablePath,
            async_options=None
            if read_only
            else ocp.AsyncOptions(
                post_finalization_callback=self._add_checksums,
                timeout_secs=LEAST_SAVE_SECONDS + save_bytes // SLOWEST_BYTES_PER_SECOND,
            ),
        )
        self._saving: int | None = None
        self._failed: SaveFailed | None = None
        devices()  # the storage asks jax for them, and would fail less plainly
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "record"))
        except Exception as error:
            reasons = faults(self.folder)
            if not reasons:
                raise
            step, reason = next(iter(reasons.items()))
            raise ValueError(
                f"The checkpoint {self.path(step)} is damaged: {reason}; remove that folder to use the others."
            ) from error
        self._removing: threading.Thread | None = None
        self._saving_since: float | None = None
        self._longest_save: float | None = None
        if not read_only:
            self._empty_removed()
            self._finish_removing()  # or a step that is trained again finds its earlier self there

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the highest score; None where none was given one."""
        best = self._manager.best_step()
        metrics = None if best is None else self._manager.metrics(best)
        return best if metrics is not None and _score(metrics) > _UNRANKED else None

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def save(self, step: int, state: Any, record: dict[str, Any], score: float | None = None) -> None:
        """Start saving in the background; `score` ranks the checkpoint for keep_best, higher is better.

        A save that fails, as on a full disk, changes no earlier checkpoint: the next `save` warns of it, `wait` raises.
        """
        self.settle()
        self._clear_partial()
        if self._failed is not None:
            self._warn(f"{self._failed}; training goes on, {self._newest_kept()}")
        self._empty_removed()
        self._saving, self._failed, self._saving_since = step, None, time.monotonic()
        _DurablePath.on_disk.discard(self.path(step))
        record = {**record, _SUMMED: NAME}
        try:
            if self._marker is not None:
                check_there(self._marker)  # the storage would make its folder anew, whatever disk is there now
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                metrics={"score": _UNRANKED if score is None else float(score)},
            )
        except Exception as error:  # of many kinds; what the disk refuses, the storage raises as ValueError too
            self._note_failed(error)

    def _add_checksums(self) -> None:
        """Called by the storage once all is written, before the folder is renamed to its step."""
        for partial in self.folder.glob(f"{self._saving}.*tmp*"):
            write_manifest(partial)

    def _note_failed(self, error: Exception) -> None:
        step, self._saving_since = self._saving, None
        reason = _why(error, self.folder / str(step))
        if step is not None and self.path(step) in _DurablePath.on_disk:
            self._warn(f"the checkpoint of step {step} is saved, but not what it replaces put away: {reason}")
            self._manager.reload()
            return
        self._failed = SaveFailed(f"the checkpoint of step {step} was not saved: {reason}")
        self._clear_partial()
        self._manager.reload()  # it took those for gone that were to make room

    def _clear_partial(self) -> None:
        """Give back the room of a save that failed; threads of the storage may still write there for a moment."""
        if jax.process_index() == 0 and self._failed is not None:
            for partial in self.folder.glob(f"{self._saving}.*tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _newest_kept(self) -> str:
        newest = self.latest_step()
        return "there is none yet" if newest is None else f"the newest checkpoint is that of step {newest}"

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is whole; warns of those that are passed over.

        None where there is no checkpoint; raises ValueError where none of them is whole.
        """
        reasons = {}
        for step in reversed(self.steps()):
            reason = step_fault(self.path(step))
            if reason is None:
                return step
            reasons[step] = reason
            self._warn(f"the checkpoint {self.path(step)} is damaged and not used: {reason}")
        if reasons:
            raise ValueError(_none_left(self.folder, reasons))
        return None

    def record(self, step: int) -> dict[str, Any]:
        stored = self._restore(step, record=ocp.args.JsonRestore())["record"]
        return {key: value for key, value in stored.items() if key != _SUMMED}

    def restore(self, step: int, like: Any) -> Any:
        """State of a step, with the shapes, dtypes and shardings of `like`: arrays or jax.ShapeDtypeStruct."""
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        return self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]

    def _restore(self, step: int, **items: Any) -> Any:
        with self._readable(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def restore_params(self, step: int, like: Any) -> Any:
        """Parameters of a step alone, as NumPy arrays in host memory; `like` gives their shapes.

        Raises ValueError for a checkpoint that does not match its checksums.
        """
        if (reason := step_fault(self.path(step))) is not None:
            others = [other for other in self.steps() if other != step]
            there = f"there are also {', '.join(map(str, others))}" if others else "there is no other"
            raise ValueError(f"The checkpoint {self.path(step)} cannot be read, as it is damaged: {reason}; {there}.")
        item = {"params": like}
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with self._readable(step), ocp.PyTreeCheckpointer() as reader:
            return reader.restore(
                self.path(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True),
            )["params"]

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turn the storage's report, which runs over pages, into one line."""
        try:
            yield
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The checkpoint {self.path(step)} cannot be read ({reason} ...); remove that folder to use an earlier "
                "checkpoint, if there is one."
            ) from error

    def wait(self) -> None:
        """Block until saves in the background are on disk; raises SaveFailed where the last one is not."""
        self.settle()
        if self._failed is not None:
            raise SaveFailed(f"{self._failed}; {self._newest_kept()}")

    def settle(self) -> None:
        """Block until the save in the background has ended, well or not."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._note_failed(error)
        self._note_saved()

    def longest_save(self, default: float) -> float:
        """Seconds from the start of a save until it was seen to be on disk: the most so far."""
        if not self._manager.is_saving_in_progress():
            self._note_saved()
        return default if self._longest_save is None else self._longest_save

    def _note_saved(self) -> None:
        if self._saving_since is not None:
            self._longest_save = max(self._longest_save or 0.0, time.monotonic() - self._saving_since)
            self._saving_since = None

    def _empty_removed(self) -> None:
        """Delete in the background what earlier saves have put away; a network disk may take long to do so."""
        if jax.process_index() != 0 or (self._removing is not None and self._removing.is_alive()):
            return
        unwanted = list((self.folder / _REMOVED).glob("*"))
        self._removing = threading.Thread(target=lambda: [remove_folder(path) for path in unwanted])
        self._removing.start()

    def _finish_removing(self) -> None:
        if self._removing is not None:
            self._removing.join()

    def close(self) -> None:
        self.settle()
        if not self._read_only:
            self._finish_removing()
            self._empty_removed()
            self._finish_removing()
        try:
            self._manager.close()
        except Exception:
            if self._failed is None:  # it raises once more what has been told
                raise


def _why(error: BaseException, path: Path) -> str:
    """Why a save failed: what the disk refused, where that is behind the error, such as a wait for a process."""
    cause: BaseException | None = error
    while cause is not None:
        if reason := str(cause) if isinstance(cause, WriteFailed) else refusal(path, cause):
            return reason
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__


@functools.cache
def _quieten_storage() -> None:
    """The storage logs every save and restore, and the traceback of an error that is reported in one line here.

    Where a save fails, each of its other writes fails by itself, some when nobody waits for them any more.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook = sys.unraisablehook
    sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else hook(error)


def step_fault(folder: Path) -> str | None:
    """Why the checkpoint in a folder cannot be used; None where it can, or was made before there were checksums."""
    if (folder / NAME).is_file():
        return fault(folder)
    try:
        record = parse_json((folder / "record" / "metadata").read_bytes())
    except (OSError, ValueError) as error:
        return f"its record cannot be read ({' '.join(str(error).split())[:200]})"
    return f"{NAME} is missing" if _SUMMED in record else None


def faults(folder: Path) -> dict[int, str]:
    """The steps whose checkpoint cannot be used, newest first, and why."""
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)
    by_step = {step: step_fault(folder / str(step)) for step in steps}
    return {step: reason for step, reason in by_step.items() if reason is not None}


def set_aside_damaged(folder: Path, say: Callable[[str], None]) -> None:
    """Rename the checkpoints that are damaged, so that a run resumes from the newest of the others.

    Where none is left, one that was to be removed is taken back. Raises ValueError where there is none either.
    """
    reasons = faults(folder)
    whole = [path for path in folder.glob("*") if path.name.isdecimal() and int(path.name) not in reasons]
    taken_back = None
    if not whole and (reasons or any(folder.glob(f"{_DAMAGED}*"))):
        removed = sorted(int(path.name) for path in (folder / _REMOVED).glob("*") if path.name.isdecimal())
        usable = (step for step in reversed(removed) if step_fault(folder / _REMOVED / str(step)) is None)
        if (taken_back := next(usable, None)) is None:
            raise ValueError(_none_left(folder, reasons))
    for step, reason in reasons.items():
        aside = folder / f"{_DAMAGED}{step}"
        if aside.exists():
            remove_folder(aside)
        rename(folder / str(step), aside)
        say(f"the checkpoint of step {step} is damaged and not used: {reason}; it is {aside} now")
    if taken_back is not None:
        rename(folder / _REMOVED / str(taken_back), folder / str(taken_back))
        say(f"the checkpoint of step {taken_back} was to be removed and is taken back, as no other is whole")


def _none_left(folder: Path, reasons: dict[int, str]) -> str:
    why = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items()) or "all were set aside before"
    return (
        f"No checkpoint in {folder} can be used ({why}); put a copy of one there, or train again from the start with "
        "--overwrite."
    )


def _score(metrics: Any) -> float:
    return metrics["score"]


def to_json_dict(record: Any) -> dict[str, Any]:
    """A dataclass, an architecture or a configuration, as JSON gives it back, where tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def check_architecture(saved: dict[str, Any], current: dict[str, Any], where: str | Path) -> None:
    """Raise ValueError naming the differences if a checkpoint's model is not the configured one."""
    saved, current = map(_with_newer_fields, (saved, current))
    differences = [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} in this configuration"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise ValueError(
            f"The checkpoint in {where} is of another architecture: {', '.join(differences)}; resume with the run's "
            "own configuration, or choose another run.dir."
        )


def _with_newer_fields(model: dict[str, Any]) -> dict[str, Any]:
    """The record of an architecture with those fields of its variant that are newer than it, at what they were then."""
    variant = model.get("variant")
    if not isinstance(variant, dict):
        return model
    experts = variant.get("experts")
    if isinstance(experts, dict):
        fields = (entry for entry in dataclasses.fields(Experts) if entry.default is not dataclasses.MISSING)
        experts = {entry.name: entry.default for entry in fields} | experts
    return model | {"variant": to_json_dict(Variant()) | variant | {"experts": experts}}
