"""Dashboards that take the scalars of a run besides metrics.jsonl: one protocol, one entry of LOGGERS for each.

None of them may hold up or end a run: whatever a client raises is an OSError here, which is told once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from rpo_jax.config import TrackingConfig
from rpo_jax.core import files
from rpo_jax.core.store import ByProduct

# What TensorBoard shows may be late by; a dashboard that refused is tried again after as long.
FLUSH_SECONDS = 30.0
PARAMETERS_AT_ONCE = 100  # that MLflow takes
PARAMETER_CHARACTERS = 500  # of one value, which every MLflow takes
# A server that does not answer holds a step up for seconds, not for MLflow's own minutes; what a user sets stays.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run when it begins.

    Attributes:
        run_id: the same for all parts of a run, so that a resumed one goes on in the same chart.
        first_step: the first that will be logged.
        settings: the whole configuration, by section and key.
    """

    folder: Path
    config: TrackingConfig
    run_id: str
    first_step: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people, and for those who go by it the same for all parts of a run and of no other run."""
        return f"{self.folder.resolve().name}-{self.run_id[:8]}"


class Logger(Protocol):
    """Where scalars go."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Take the scalars of a step; OSError where they are not taken."""
        ...

    def close(self) -> None:
        """Let go of what has been taken; OSError where it is lost."""
        ...


@dataclass(frozen=True)
class LoggerKind:
    """An entry of LOGGERS.

    Attributes:
        what: what it keeps, in the plural; begins messages.
        begin: the logger of a run.
        package: what has to be installed for it; None for what always is.
        check: asks whoever keeps it whether they would, before a run computes anything; raises with the reason.
        remedy: what to do about that reason.
        takes_again: whether a step that was taken once may come again, as after a resume.
    """

    what: str
    begin: Callable[[LoggedRun], Logger]
    package: str | None = None
    check: Callable[[], None] = lambda: None
    remedy: str = ""
    takes_again: bool = False


def check_installed(config: TrackingConfig) -> None:
    """ValueError if a dashboard that was asked for is not installed."""
    for key, kind in asked_for(config).items():
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            raise ValueError(
                f"tracking.{key}=true, but {kind.package} is not installed; run `pip install {kind.package}`."
            )


def check_login(config: TrackingConfig) -> None:
    """ValueError where a dashboard that was asked for would refuse, as one that does not know the user."""
    for key, kind in asked_for(config).items():
        try:
            kind.check()
        except Exception as error:  # their classes differ between packages and versions
            name = kind.what.partition("'")[0]
            raise ValueError(f"tracking.{key}=true, but {name} says: {_first_line(error)}; {kind.remedy}.") from None


def asked_for(config: TrackingConfig) -> dict[str, LoggerKind]:
    return {key: kind for key, kind in LOGGERS.items() if getattr(config, key)}


class OptionalLogger:
    """A logger that a run can do without: told once when it refuses, tried again later, told when it takes them again.

    One that cannot begin stays away: clients wait for a minute and more before they give up.
    """

    def __init__(self, kind: LoggerKind, run: LoggedRun, say: Callable[[str], None]) -> None:
        self.takes_again = kind.takes_again
        self._state = ByProduct(kind.what, say)
        self._logger: Logger | None = None
        self._fault: OSError | None = None
        self._failed = -math.inf
        self._state.write(lambda: self._begin(kind, run))

    def _begin(self, kind: LoggerKind, run: LoggedRun) -> None:
        self._logger = kind.begin(run)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        if self._logger is not None:
            self._state.write(functools.partial(self._write, self._logger, scalars, step))

    def _write(self, logger: Logger, scalars: Mapping[str, float], step: int) -> None:
        if self._fault is not None and time.monotonic() - self._failed < FLUSH_SECONDS:
            raise self._fault
        try:
            logger.write(scalars, step)
        except OSError as error:
            self._fault, self._failed = error, time.monotonic()
            raise
        self._fault = None

    def close(self) -> None:
        if self._logger is not None:
            self._state.write(self._logger.close)


@contextlib.contextmanager
def _client() -> Iterator[None]:
    """Whatever a client raises, as an OSError: no disk, no connection and no service are all the same to a run."""
    try:
        yield
    except files.WriteFailed:
        raise
    except Exception as error:
        raise OSError(f"its client says {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


class _Place:
    """What a client writes on this machine, without a word where its disk is full or gone.

    Args:
        path: a file or folder; None where it writes nothing here.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._seen = path, False

    def check(self) -> None:
        """WriteFailed where nothing more can be written there, or where it has vanished."""
        if self._path is None:
            return
        if self._seen:
            files.check_there(self._path)
        self._seen = self._path.exists()
        files.check_writable(self._path if self._path.is_dir() else self._path.parent)


class _TensorBoard:
    """Scalars as TensorBoard reads them.

    Written by whoever logs: tensorboardX's own thread ends on a disk that is full, and what waits for room in its queue
    then waits for ever. A file whose writing failed is left as it is, and another one begun later. What earlier files
    have from the run's first step on is not shown.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._folder, self._purge_step = run.folder / "tensorboard", run.first_step
        self._file: Any = None
        self._flushed = -math.inf

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        with files.writing(self._folder):
            try:
                self._opened()
                self._add(step=step, summary=Summary(value=values))
                if time.monotonic() - self._flushed > FLUSH_SECONDS:
                    self._file.flush()
                    self._flushed = time.monotonic()
            except OSError:
                with contextlib.suppress(OSError):
                    self.close()
                raise

    def _opened(self) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

        if self._file is not None:
            return
        files.check_there(self._folder.with_name("metrics.jsonl"))
        self._folder.mkdir(exist_ok=True)
        self._file = RecordWriter(str(self._folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._add(file_version="brain.Event:2")
        if self._purge_step is not None:
            self._add(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
            self._purge_step = None

    def _add(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

        self._file.write(Event(wall_time=time.time(), **event).SerializeToString())

    def close(self) -> None:
        file, self._file, self._flushed = self._file, None, -math.inf
        if file is not None:
            with files.writing(self._folder):
                file.close()


class _WeightsAndBiases:
    """https://docs.wandb.ai; WANDB_MODE, WANDB_DIR and the like say where it goes."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # optional

        with _client():
            self._run: Any = wandb.init(
                project=run.config.wandb_project, id=run.run_id, resume="allow", config=dict(run.settings)
            )
        self._place = _Place(Path(self._run.dir) if os.environ.get("WANDB_MODE") == "offline" else None)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._place.check()
        with _client():
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        with _client():
            self._run.finish()


def _check_wandb() -> None:
    """Asks for the key on a terminal."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    import wandb  # pyright: ignore[reportMissingImports]  # optional

    if not wandb.login():
        raise ValueError("it is not logged in")


class _Trackio:
    """https://huggingface.co/docs/trackio: a local database (TRACKIO_DIR), a server or a Space of the hub."""

    def __init__(self, run: LoggedRun) -> None:
        with _client():
            import trackio  # pyright: ignore[reportMissingImports]  # optional

            self._run: Any = trackio.init(
                project=run.config.trackio_project,
                name=run.name,
                resume="allow",
                config=dict(run.settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
            self._place = _Place(None if remote else Path(trackio.utils.TRACKIO_DIR))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._place.check()
        with _client():
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._place.check()
        with _client():
            self._run.finish()


def _check_trackio() -> None:
    if os.environ.get("TRACKIO_SPACE_ID"):
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError("its Space needs a token of the hub, and there is none")


class _MLflow:
    """https://mlflow.org/docs: a database or folder of this machine, or a server, as MLFLOW_TRACKING_URI says."""

    def __init__(self, run: LoggedRun) -> None:
        with _client():
            client, uri = _mlflow_client()
            self._entities = importlib.import_module("mlflow.entities")
            self._place = _Place(_mlflow_path(uri))
            self._place.check()
            name = run.config.mlflow_experiment
            experiment = client.get_experiment_by_name(name)
            number = client.create_experiment(name) if experiment is None else experiment.experiment_id
            tag = "rpo_jax.run_id"
            known = client.search_runs([number], f"tags.`{tag}` = '{run.run_id}'", max_results=1)
            mlflow_run = known[0] if known else client.create_run(number, tags={tag: run.run_id}, run_name=run.name)
            self._client, self._id = client, mlflow_run.info.run_id
            client.update_run(self._id, status="RUNNING")
            if not known:  # it takes a parameter once
                self._keep(run.settings)

    def _keep(self, settings: Mapping[str, Any]) -> None:
        flat = {f"{section}.{key}": value for section, of in settings.items() for key, value in of.items()}
        parameters = [self._entities.Param(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in flat.items()]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[start : start + PARAMETERS_AT_ONCE])

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._place.check()
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, float(value), now, step) for name, value in scalars.items()]
        with _client():
            self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._place.check()
        with _client():
            self._client.set_terminated(self._id)


def _mlflow_client() -> tuple[Any, str]:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    import mlflow  # pyright: ignore[reportMissingImports]  # optional

    return mlflow.MlflowClient(), mlflow.get_tracking_uri()


def _mlflow_path(uri: str) -> Path | None:
    """What lies on this machine; None where a server keeps it."""
    parts = urlparse(uri)
    if parts.scheme == "sqlite":
        return Path(unquote(parts.path.removeprefix("/"))).absolute()
    return Path(unquote(parts.path)).absolute() if parts.scheme in ("", "file") else None


def _check_mlflow() -> None:
    client, uri = _mlflow_client()
    if _mlflow_path(uri) is None:
        client.search_experiments(max_results=1)


# By the key of the tracking section that asks for each.
LOGGERS: Mapping[str, LoggerKind] = {
    "tensorboard": LoggerKind("TensorBoard's events", _TensorBoard, takes_again=True),
    "wandb": LoggerKind(
        "Weights & Biases' charts",
        _WeightsAndBiases,
        "wandb",
        _check_wandb,
        "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to upload later",
    ),
    "trackio": LoggerKind(
        "trackio's charts",
        _Trackio,
        "trackio",
        _check_trackio,
        "run `hf auth login`, set HF_TOKEN, or unset TRACKIO_SPACE_ID to keep them on this machine",
    ),
    "mlflow": LoggerKind(
        "MLflow's charts",
        _MLflow,
        "mlflow",
        _check_mlflow,
        "see that its server runs, or set MLFLOW_TRACKING_URI to another one or to sqlite:///mlflow.db",
    ),
}
