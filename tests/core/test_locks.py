"""One writer a place, among threads, processes, containers and hosts; none is asked for its id or its clock."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rpo_jax.core import locks
from rpo_jax.core.files import atomic_directory, recover
from rpo_jax.core.locks import InUse, one_writer
from tests.processes import REPOSITORY

HOST = socket.gethostname()
# Writes until its input ends; `without` takes flock away, as a disk that has none does.
HOLDER = """
import os, sys
from pathlib import Path
from rpo_jax.core import locks
path, without, pid = Path(sys.argv[1]), sys.argv[2] == "without", int(sys.argv[3])
locks.BEAT_SECONDS = 0.1
locks.fcntl = None if without else locks.fcntl
os.getpid = lambda: pid
with locks.one_writer(path):
    print("inside", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(path, without="", pid=7, command=()):
    arguments = [*command, sys.executable, "-c", HOLDER, str(path), without, str(pid)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(arguments, cwd=REPOSITORY, text=True, **pipes) as process:
        try:
            assert process.stdout
            assert process.stderr
            assert process.stdout.readline() == "inside\n", process.stderr.read()
            yield process
        finally:
            process.kill()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 1.0)


@pytest.fixture
def unwatched(monkeypatch):
    """Whether its owner lives is clear without a look at how it goes on."""

    def watched(*_):
        raise AssertionError("watched")

    monkeypatch.setattr(locks, "_is_beating", watched)


def lock_file(path):
    return path.parent / f".{path.name}.lock"


def left_by(path, **changes):
    """A lock file of a dead process, which was of another boot unless changes say otherwise."""
    record = {"host": "node9", "process": 1, "since": "2026-01-01 00:00:00 UTC", "token": "x", "kernel": "another 1"}
    lock_file(path).write_text(json.dumps(record | changes))


def assert_free(path):
    with one_writer(path):
        assert json.loads(lock_file(path).read_text())["process"] == os.getpid()
    assert not lock_file(path).exists()


def test_the_second_is_refused_by_name_and_the_first_is_unharmed(tmp_path, unwatched):
    path = tmp_path / "new" / "run"
    with holder(path) as first:
        with pytest.raises(
            InUse,
            match=rf"^run\.dir={path} is in use: process 7 on {HOST}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC by its "
            rf"clock, writes there; .* If it is gone for good, remove {lock_file(path)}\.$",
        ):
            one_writer(path, "run.dir").__enter__()
        assert first.communicate("")[1] == ""
        assert first.returncode == 0
    assert not lock_file(path).exists()
    assert_free(path)


def test_a_killed_one_is_known_to_be_dead_at_once_whatever_its_number(tmp_path, unwatched):
    path = tmp_path / "run"
    with holder(path, pid=os.getpid()) as first:
        pass
    assert first.returncode == -signal.SIGKILL
    assert json.loads(lock_file(path).read_text())["process"] == os.getpid(), (
        "as number 1 of a container is that of all"
    )
    assert_free(path)


def test_one_of_the_same_number_is_refused(tmp_path, unwatched):
    path = tmp_path / "run"
    with holder(path, pid=os.getpid()), pytest.raises(InUse):
        one_writer(path).__enter__()


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0 or bool(subprocess.call(["unshare", "-pf", "true"])),
    reason="needs process namespaces",
)
def test_two_containers_of_one_machine(tmp_path, unwatched):
    path, container = tmp_path / "run", ("unshare", "--pid", "--fork", "--kill-child")
    code = "import sys; from pathlib import Path; from rpo_jax.core import locks; locks.one_writer(Path(sys.argv[1]))"
    with holder(path, pid=1, command=container):
        second = [*container, sys.executable, "-c", f"{code}.__enter__()", str(path)]
        done = subprocess.run(second, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert f"InUse: {path} is in use: process 1 on {HOST}" in done.stderr


DAY = 86_400


@pytest.mark.parametrize("skew", [0, -DAY, DAY])
def test_one_of_another_boot_is_dead_if_it_does_not_beat_whatever_its_clock(tmp_path, quick, skew, caplog):
    path = tmp_path / "run"
    left_by(path)
    os.utime(lock_file(path), (time.time() + skew,) * 2)
    assert_free(path)
    assert "process 1 on node9, since 2026-01-01 00:00:00 UTC by its clock, did not say that it is done" in caplog.text


@pytest.mark.parametrize("skew", [0, -DAY, DAY])
def test_one_of_another_host_lives_if_it_beats_whatever_its_clock(tmp_path, quick, skew):
    """Where its flock does not reach."""
    path, ended = tmp_path / "run", threading.Event()
    left_by(path)

    def beat():
        now = time.time() + skew
        while not ended.wait(0.1):
            now += 0.1
            os.utime(lock_file(path), (now, now))

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(InUse, match="process 1 on node9, since"):
        one_writer(path).__enter__()
    ended.set()
    beating.join()
    assert "node9" in lock_file(path).read_text(), "the first one's name stays"


def test_on_a_disk_without_flock_a_living_one_is_refused_and_a_dead_one_known(tmp_path, quick, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(locks, "fcntl", None)
    with holder(path, "without"), pytest.raises(InUse, match="process 7 on"):
        one_writer(path).__enter__()
    assert_free(path)


def test_one_that_was_taken_for_dead_ends_when_it_comes_back(tmp_path, quick, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(locks, "fcntl", None)
    with holder(path, "without") as first:
        first.send_signal(signal.SIGSTOP)
        with one_writer(path):
            first.send_signal(signal.SIGCONT)
            assert first.wait(60) == 2
            assert first.stderr
            assert first.stderr.read().startswith(f"error: {path} is written by process {os.getpid()} on {HOST}, since")
        assert not lock_file(path).exists()


def test_a_link_has_two_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for held, asked in (("run", "link"), ("link", "run"), ("link", "link")):
        with one_writer(tmp_path / held), pytest.raises(InUse):
            one_writer(tmp_path / asked).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["link", "run"]


def test_a_disk_of_its_own_has_its_lock_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda place: str(place).endswith("run"))
    (tmp_path / "run").mkdir()
    with one_writer(tmp_path / "run"):
        assert os.listdir(tmp_path / "run") == [".lock"]
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("content", [b"", b"\0" * 9000, b"[" * 4000, b'{"host": 1}', b'{"process": "' + b"9" * 4000])
def test_a_lock_file_that_says_nothing_is_no_lock(tmp_path, unwatched, content):
    lock_file(tmp_path / "run").write_bytes(content)
    assert_free(tmp_path / "run")


def test_a_lock_file_that_leads_elsewhere_is_not_written(tmp_path):
    (tmp_path / "precious").write_text("mine")
    lock_file(tmp_path / "run").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"run cannot be locked: .*\.run\.lock is not written"):
        one_writer(tmp_path / "run").__enter__()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_host_that_colours_the_terminal_is_not_named(tmp_path, quick):
    left_by(tmp_path / "run", host="\33[31m")
    assert_free(tmp_path / "run")


def test_one_at_a_time_also_where_they_come_and_go(tmp_path):
    inside, most, entered = 0, 0, 0

    def work():
        nonlocal inside, most, entered
        for _ in range(100):
            with contextlib.suppress(InUse), one_writer(tmp_path / "run"):
                inside += 1
                most, entered = max(most, inside), entered + 1
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_container_writes_is_left_to_it(tmp_path):
    """Both processes have one number there."""
    path, inside = tmp_path / "out", threading.Event()
    going_on = threading.Event()

    def write():
        with atomic_directory(path, overwrite=True) as new:
            (new / "file").write_text("first")
            inside.set()
            going_on.wait(20)

    first = threading.Thread(target=write)
    first.start()
    assert inside.wait(20)
    with pytest.raises(InUse), atomic_directory(path, overwrite=True):
        pass
    going_on.set()
    first.join()
    assert (path / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_dead_writers_of_any_host_left_is_cleared_up(tmp_path):
    path = tmp_path / "out"
    for name in (".out.partial-1", ".out.partial-0123", ".out.replaced-77.gone-1", ".out.gone-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "junk").write_text("junk")
    (tmp_path / ".out.replaced-1").mkdir()
    (tmp_path / ".out.replaced-1" / "file").write_text("whole")
    with one_writer(path):
        recover(path)
    assert os.listdir(tmp_path) == ["out"]
    assert (path / "file").read_text() == "whole"
