"""Sections on where a run lives, on what it runs, how long, and where it reports its progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rpo_jax.config.checks import ConfigError, positive


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives.

    Args:
        dir: run folder; holds config, metrics, checkpoints and the tokenizer.
        seed: seed of data order, and of the initial weights of a model from scratch or of LoRA adapters.
        resume: `auto` continues from the newest checkpoint in `dir`, or starts where there is none.
        overwrite: empty an existing run folder first.
        force: resume also where that makes another run of it: other data or pairing, another objective, or another
            length of a decaying learning rate. It is recorded in the checkpoints.
        cache_dir: prepared embeddings, reference log-probs and compiled programs; shared between runs.
    """

    dir: str = "runs/run"
    seed: int = 0
    resume: Literal["never", "auto"] = "never"
    overwrite: bool = False
    force: bool = False
    cache_dir: str = "~/.cache/rpo_jax"

    def __post_init__(self) -> None:
        if self.resume == "auto" and self.overwrite:
            raise ConfigError("run.resume=auto and run.overwrite=true contradict each other; give one of them.")
        if self.seed < 0:
            raise ConfigError(f"run.seed={self.seed} must not be negative.")
        for name in ("dir", "cache_dir"):
            if "://" in (given := str(getattr(self, name))):
                raise ConfigError(
                    f"run.{name}={given} is an address, not a folder; mount the bucket (gcsfuse, mountpoint-s3) and "
                    "give its folder here."
                )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 takes all that the others leave.

    Args:
        data: copies of the model.
        fsdp: shards of parameters, gradients and optimizer state; rows are split over data, fsdp and expert.
        tensor: shards of heads, MLP and vocabulary.
        expert: shards of a mixture's experts, each of which has whole experts; of other parameters as fsdp.
        context: shards of a row's tokens, for rows that are too long for one device; of parameters as fsdp. A number.
        reduce_dtype: what devices add the gradients of the layers' matrices in: `compute` is `model.compute_dtype`,
            `float32` sends twice as much for them where that is bfloat16, and loses nothing along long axes.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    reduce_dtype: Literal["compute", "float32"] = "compute"

    @property
    def described(self) -> str:
        """The keys with their values; of `expert` and `context` only where they are given."""
        names = ("data", "fsdp", "tensor", *(name for name in ("expert", "context") if getattr(self, name) != 1))
        return ", ".join(f"mesh.{name}={getattr(self, name)}" for name in names)

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor, self.expert, self.context)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"{self.described}: sizes must be positive, and at most one of them -1.")
        if self.context == -1:
            raise ConfigError("mesh.context=-1: the length of rows depends on it; give it a number, as mesh.context=2.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and how often to look.

    Args:
        steps: optimizer steps; where not given, `epochs` passes over the data.
        epochs: passes over the training data.
        rounds: of sampling and training, as the section rounds has them; 0 trains on the data as it is.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations; 0 evaluates before the first and after the last step only.
        save_every: steps between checkpoints; 0 saves the last step only.
        max_minutes: time limit from the start of the run, its preparation included: it then saves and stops, so early
            that the save fits, and `run.resume=auto` goes on; none where not given.
        keep_last: newest checkpoints to keep.
        keep_best: checkpoints of highest held-out preference accuracy (lowest loss where there are no rewards) to keep
            besides; where it is not 0, every save is preceded by an evaluation.
        sample_prompts: held-out prompts (training ones where there are none) that are answered greedily at every
            evaluation, into samples.jsonl of the run folder.
        sample_tokens: most tokens of such an answer.
    """

    steps: int | None = None
    epochs: float = 1.0
    rounds: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    max_minutes: float | None = None
    keep_last: int = 2
    keep_best: int = 1
    sample_prompts: int = 0
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        positive("train", steps=self.steps, epochs=self.epochs, log_every=self.log_every, keep_last=self.keep_last)
        positive("train", sample_tokens=self.sample_tokens, max_minutes=self.max_minutes)
        for name in ("rounds", "eval_every", "save_every", "keep_best", "sample_prompts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Dashboards besides metrics.jsonl.

    Args:
        tensorboard: write event files into the run folder.
        wandb: log to Weights & Biases (needs `pip install wandb`; the key comes from the environment).
        wandb_project: project there.
        trackio: log to trackio (needs `pip install trackio`): on this machine, or in the Space TRACKIO_SPACE_ID.
        trackio_project: project there.
        mlflow: log to MLflow (needs `pip install mlflow`): where MLFLOW_TRACKING_URI says.
        mlflow_experiment: experiment there.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "rpo_jax"
    trackio: bool = False
    trackio_project: str = "rpo_jax"
    mlflow: bool = False
    mlflow_experiment: str = "rpo_jax"


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run, one or more on each host. Without these keys, SLURM, GKE, Cloud TPU and Open MPI are
    recognised; otherwise a run is one process.

    Args:
        coordinator: host:port where process 0 waits for the others; a free port that all hosts reach.
        num_processes: how many there are.
        process_id: which one this is, from 0; the only setting in which the processes of a run differ, besides
            run.cache_dir.
        timeout_seconds: how long to wait for the others to come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_seconds: int = 300

    def __post_init__(self) -> None:
        positive("distributed", num_processes=self.num_processes, timeout_seconds=self.timeout_seconds)
        settings = {"coordinator": self.coordinator, "num_processes": self.num_processes, "process_id": self.process_id}
        absent = [f"distributed.{name}" for name, value in settings.items() if value is None]
        if absent and len(absent) < len(settings):
            raise ConfigError(
                f"{' and '.join(absent)} must be given too: distributed.coordinator, num_processes and process_id go "
                "together, or none of them is given."
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ConfigError(f"distributed.coordinator={self.coordinator} must be host:port, as in node0:7777.")
        count = self.num_processes
        if self.process_id is not None and count is not None and not 0 <= self.process_id < count:
            raise ConfigError(
                f"distributed.process_id={self.process_id} must lie between 0 and {count - 1} for "
                f"distributed.num_processes={count}."
            )
