"""Runs of several processes on this machine, as its user would start them: real processes that meet on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import quick_xla

REPOSITORY = Path(__file__).parent.parent
LIMIT_SECONDS = 500


class Ended(NamedTuple):
    status: int
    output: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def process_flags(count: int, process_id: int, port: int) -> list[str]:
    return [
        f"--distributed.coordinator=127.0.0.1:{port}",
        f"--distributed.num_processes={count}",
        f"--distributed.process_id={process_id}",
    ]


def slurm_environment(count: int, process_id: int, port: int) -> dict[str, str]:
    """What srun sets for a task of a job on this machine."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(process_id),
        "SLURM_LOCALID": str(process_id),
        "JAX_COORDINATOR_PORT": str(port),
    }


def start(
    arguments: Sequence[str],
    devices: int,
    output: Path,
    module: str = "rpo_jax.train",
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """One process with so many virtual devices; what it says goes to a file."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick_xla.flags(devices),
        "HF_HUB_OFFLINE": "1",
        **(variables or {}),
    }
    with output.open("wb") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)


class Processes:
    """`count` processes of `devices` virtual devices each; `own` gives further flags to one of them by its id,
    `variables` its environment, and `by_slurm` tells them of each other by a SLURM task's variables instead of flags.

    As a context: whatever still runs at its end is killed.
    """

    def __init__(
        self,
        settings: Sequence[str],
        folder: Path,
        *,
        count: int,
        devices: int = 2,
        module: str = "rpo_jax.train",
        own: dict[int, list[str]] | None = None,
        variables: dict[int, dict[str, str]] | None = None,
        by_slurm: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self._outputs = [folder / f"process-{i}.txt" for i in range(count)]
        self.running = [
            start(
                [
                    *(f"--{setting}" for setting in settings),
                    *(process_flags(count, i, port) if count > 1 and not by_slurm else ()),
                    *(own or {}).get(i, ()),
                ],
                devices,
                output,
                module,
                (slurm_environment(count, i, port) if by_slurm else {}) | (variables or {}).get(i, {}),
            )
            for i, output in enumerate(self._outputs)
        ]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[Ended]:
        deadline = time.monotonic() + seconds
        for process in self.running:
            process.wait(max(deadline - time.monotonic(), 0.1))
        return [
            Ended(process.returncode, output.read_text(errors="replace"))
            for process, output in zip(self.running, self._outputs, strict=True)
        ]

    def until(self, happened: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, [output.read_text() for output in self._outputs]
            assert all(process.poll() is None for process in self.running), [o.read_text() for o in self._outputs]
            time.sleep(0.1)


def finished(processes: Processes) -> list[str]:
    """The outputs of processes that all end well."""
    with processes:
        ended = processes.wait()
    assert [process.status for process in ended] == [0] * len(ended), "\n".join(process.output for process in ended)
    return [process.output for process in ended]
