"""`rpo_jax.train`, with a process 1 whose disk is full when the loop asks for the first time whether to stop."""

from rpo_jax import train
from rpo_jax.hosts import processes
from rpo_jax.hosts.stopping import Stopping

requested = Stopping.requested


def full(self: Stopping, where: str, save_seconds: float = 0.0) -> str | None:
    if processes.process_id() == 1:
        raise OSError("No space left on device")
    return requested(self, where, save_seconds)


if __name__ == "__main__":
    Stopping.requested = full
    raise SystemExit(train.main())
