"""Eight virtual CPU devices for every test: the sharded step must run as it would on real ones."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import quick_xla

os.environ["JAX_PLATFORMS"] = "cpu"
# Devices that meet late on a busy machine are slow, not lost: XLA gives up after forty seconds where nothing is said.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{quick_xla.flags(devices=8)} {_PATIENCE} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers and the processes that they start compile many programs alike: each is compiled once, and kept.
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", type=Path, help="a JSON file to note in, file by file, when these tests ran")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--ledger")) is not None:
        from tests.ledger import Ledger

        config.pluginmanager.register(Ledger(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take an hour where none says otherwise: what a machine does besides decides how long they are."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture
def disk_of(tmp_path_factory):
    """Mounts disks of a size (`6m`), empty ones in memory; skips where that is not allowed."""
    mounted = []

    def mount(size: str) -> Path:
        disk = tmp_path_factory.mktemp("disk")
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a file system of its own needs root, and leave to mount it")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
