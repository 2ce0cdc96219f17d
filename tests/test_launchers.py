"""The launchers in scripts/: their syntax and schemas, the commands that they would run, and two processes for real."""

import copy
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests import quick_xla
from tests.processes import free_port
from tests.runs import metric_lines, settings, write_rows

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
MANIFESTS = sorted(SCRIPTS.glob("jobset_*.yaml"))
RUN = ["--config", "a file.yaml", "--run.dir", "runs/mine"]


def bash(script, *arguments, timeout=120, **variables):
    """A script's end: its status and all that it said."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "CACHE", "VENV", "EXTRAS"))
    }
    command = ["bash", str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, timeout=timeout, check=False)


def processes(dry):
    """{process: its command} of a dry run's lines `process N on HOST: cd FOLDER && exec COMMAND`."""
    assert dry.returncode == 0, dry.stderr
    lines = [line.split(": ", 1) for line in dry.stdout.splitlines() if line.startswith("process ")]
    return {where: shlex.split(command)[4:] for where, command in lines}


def values(command):
    """The flags of a command as a dict; it starts with the interpreter and `-m rpo_jax.train`."""
    assert command[0].endswith("/bin/python")
    assert command[1:3] == ["-m", "rpo_jax.train"]
    return dict(zip(command[3::2], command[4::2], strict=True))


def check_run(flags, cache):
    """What every launcher gives to every process: the user's options, a shared cache, and to go on where it stopped."""
    assert flags["--config"] == "a file.yaml"
    assert flags["--run.dir"] == "runs/mine"
    assert flags["--resume"] == "auto"
    assert flags["--run.cache_dir"] == cache


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def check_manifest(manifest):
    jsonschema.validate(manifest, json.loads((ROOT / "tests/schemas/jobset.json").read_text(encoding="utf-8")))
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_keep_the_published_schemas(path):
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_manifest(manifest)
    for spoil in (
        lambda m: m["spec"].update(replicas=2),
        lambda m: m["spec"]["replicatedJobs"][0].update(parallelism=2),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(completion=2),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].pop("name"),
    ):
        spoilt = copy.deepcopy(manifest)
        spoil(spoilt)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check_manifest(spoilt)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_pod_of_a_manifest_runs_one_process_of_the_run(path):
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert container["command"] == ["bash", "/shared/rpo_jax/scripts/pod.sh"]
    found = []
    for index in range(job["completions"]):
        dry = bash("pod.sh", *container["args"], DRY_RUN="1", JOB_COMPLETION_INDEX=str(index), **variables)
        assert dry.returncode == 0, dry.stderr
        found.append(values(shlex.split(dry.stdout)[4:]))
        assert found[-1]["--resume"] == "auto"
        assert found[-1]["--run.cache_dir"] == variables["CACHE"]
    shared = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"]
    assert all(found[0][key].startswith(f"{shared[0]}/") for key in ("--run.dir", "--run.cache_dir"))
    (accelerators,) = container["resources"]["limits"].items()
    if accelerators[0] == "google.com/tpu":
        # GKE tells the pods of a slice who they are; every host of it has one.
        assert not any(key.startswith("--distributed.") and "timeout" not in key for flags in found for key in flags)
        chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
        assert chips == job["completions"] * accelerators[1]
    else:
        name = manifest["metadata"]["name"]
        host, port = found[0]["--distributed.coordinator"].split(":")
        assert host == f"{name}-{replicated['name']}-0-0.{name}"
        assert int(port) in [one["containerPort"] for one in container["ports"]]
        assert manifest["spec"]["network"]["enableDNSHostnames"]
        assert [flags["--distributed.process_id"] for flags in found] == [str(i) for i in range(len(found))]
        assert {flags["--distributed.num_processes"] for flags in found} == {str(len(found))}


def test_a_pod_has_its_own_copy_of_the_code_and_starts_its_process_there(tmp_path):
    """The whole of pod.sh, with an environment that exists and an interpreter that tells its arguments."""
    source = tmp_path / "source"
    (source / "scripts").mkdir(parents=True)
    (source / ".venv").mkdir()
    (source / "scripts/environment.sh").write_text('python=$PWD/tell\n[ "$EXTRAS" = cuda ]\n', encoding="utf-8")
    (source / "tell").write_text('#!/bin/sh\necho "$PWD: $*"\n', encoding="utf-8")
    (source / "tell").chmod(0o755)
    work = tmp_path / "work"
    places = {"SOURCE": str(source), "WORK": str(work), "CACHE": str(tmp_path / "cache"), "EXTRAS": "cuda"}
    meeting = {"COORDINATOR": "first:7777", "NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
    done = bash("pod.sh", "--config", "c.yaml", **places, **meeting)
    assert done.returncode == 0, done.stderr
    own = "--distributed.timeout_seconds 1800 --config c.yaml --resume auto"
    assert done.stdout.startswith(f"{work}: -m rpo_jax.train {own}")
    assert done.stdout.endswith("--distributed.num_processes 2 --distributed.process_id 1\n")
    assert not (work / ".venv").exists()
    assert (tmp_path / "cache").is_dir()
    # It saves and ends well when it is asked to stop, and the pod does not count as done; nor does it train afterwards.
    (source / "tell").write_text(
        '#!/bin/sh\ntrap "sleep 1; echo saved; exit" TERM\necho here\nwhile :; do sleep 0.1; done\n'
    )
    for setup, last in (("", b"saved\n"), ("echo here\nsleep 1\n", b"")):
        (source / "scripts/environment.sh").write_text(f"python=$PWD/tell\n{setup}", encoding="utf-8")
        pod = subprocess.Popen(
            ["bash", str(SCRIPTS / "pod.sh"), "--config", "c.yaml"],
            env={**os.environ, **places},
            stdout=subprocess.PIPE,
        )
        with pod.stdout as said:
            assert said.readline() == b"here\n"
            pod.send_signal(signal.SIGTERM)
            assert pod.wait(60) == 143
            assert said.read() == last


def test_slurm_starts_one_process_for_each_gpu():
    dry = bash("slurm.sh", *RUN, DRY_RUN="1", CACHE="/shared/cache")
    found = processes(dry)
    script = (SCRIPTS / "slurm.sh").read_text(encoding="utf-8")
    asked = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in script.splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    per_node = int(asked["ntasks-per-node"])
    assert asked["gpus-per-node"] == asked["ntasks-per-node"], "jax takes a task to have one GPU"
    assert len(found) == int(asked["nodes"]) * per_node
    assert list(found)[per_node] == f"process {per_node} on node 1, GPU 0"
    for command in found.values():
        check_run(values(command), "/shared/cache")
    assert len(processes(bash("slurm.sh", *RUN, DRY_RUN="1", SLURM_NNODES="3", SLURM_NTASKS_PER_NODE="4"))) == 12


def test_the_launcher_shows_the_command_of_every_host():
    dry = bash(
        "launch.sh",
        "--hosts",
        "me@node0,node1,node2",
        "--port",
        "7001",
        "--",
        *RUN,
        DRY_RUN="1",
        CACHE="/c",
        EXTRAS="tpu",
    )
    found = processes(dry)
    assert list(found) == ["process 0 on me@node0", "process 1 on node1", "process 2 on node2"]
    for number, command in enumerate(found.values()):
        flags = values(command)
        check_run(flags, "/c")
        assert flags["--distributed.coordinator"] == "node0:7001"
        assert flags["--distributed.num_processes"] == "3"
        assert flags["--distributed.process_id"] == str(number)
    made = [line for line in dry.stdout.splitlines() if line.startswith("set up ")]
    assert len(made) == 3
    assert all("EXTRAS=tpu" in line and "scripts/environment.sh" in line for line in made)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("launch.sh", ["--", *RUN], "no hosts; give --hosts"),
        ("launch.sh", ["--nodes", "2", "--", *RUN], "unknown option '--nodes'"),
        ("launch.sh", ["--hosts", "a,b", "--local", "2", "--", *RUN], "not both"),
        ("launch.sh", ["--hosts", "a,,b", "--", *RUN], "'', which is no host's name"),
        ("launch.sh", ["--hosts", "a,-oProxyCommand=x", "--", *RUN], "which is no host's name"),
        ("launch.sh", ["--hosts", "a,a", "--", *RUN], "names a host twice"),
        ("launch.sh", ["--hosts"], "--hosts needs a value"),
        ("launch.sh", ["--local", "two", "--", *RUN], "--local two must be a number"),
        ("launch.sh", ["--local", "2", "--port", "99999", "--", *RUN], "--port 99999 must lie between"),
        ("launch.sh", ["--local", "2"], "nothing to run"),
        ("slurm.sh", [], "nothing to run"),
        ("slurm.sh", RUN, "this is no SLURM job"),
        ("pod.sh", [], "nothing to run"),
    ],
)
def test_wrong_usage_is_refused(script, arguments, message):
    done = bash(script, *arguments, **({"CACHE": "/c"} if script == "pod.sh" else {}))
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def program(folder, lines):
    """A stand-in for training that knows its number, as `number`."""
    path = folder / "program.sh"
    path.write_text('for number in "$@"; do :; done\n' + lines, encoding="utf-8")
    return f"bash {path}"


def test_processes_that_all_end_well_make_a_launch_that_does(tmp_path):
    command = program(tmp_path, 'echo "number $number"\n')
    done = bash("launch.sh", "--local", "3", "--no-setup", "--program", command, "--", *RUN)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{number}] number {number}" for number in range(3)]


def test_a_process_that_fails_stops_the_others_and_gives_its_status(tmp_path):
    left = tmp_path / "left"
    lines = f'[ $number = 1 ] && exit 7\ntrap "touch {left}-$number; exit" TERM\nsleep 300 & wait\n'
    started = time.monotonic()
    done = bash(
        "launch.sh", "--local", "3", "--no-setup", "--program", program(tmp_path, lines), "--", *RUN, GRACE_SECONDS="1"
    )
    assert time.monotonic() - started < 60
    assert done.returncode == 7
    assert done.stderr == "error: process 1 on this machine ended with status 7; stopping the others.\n"
    assert sorted(path.name for path in tmp_path.glob("left-*")) == ["left-0", "left-2"]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_launcher_leaves_no_process_behind(asked, tmp_path):
    saving = 'trap "sleep 1; echo saved $number; exit" TERM\n'
    lines = f"{saving}echo $$ > {tmp_path}/pid-$number\nsleep 300 & wait\n"
    # These tests may run under nohup.
    command = ["env", "--default-signal=HUP", "bash", str(SCRIPTS / "launch.sh"), "--local", "2", "--no-setup"]
    launcher = subprocess.Popen(
        [*command, "--program", program(tmp_path, lines), "--", *RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while not all(
        (tmp_path / f"pid-{number}").exists() and (tmp_path / f"pid-{number}").read_text() for number in (0, 1)
    ):
        time.sleep(0.1)
    launcher.send_signal(asked)
    assert launcher.wait(60) == 130
    with launcher.stdout as said:
        assert sorted(said) == ["[0] saved 0\n", "[1] saved 1\n"]  # their last words arrive too
    for number in (0, 1):
        assert not Path(f"/proc/{(tmp_path / f'pid-{number}').read_text().strip()}").exists()


@pytest.mark.slow
def test_the_launcher_trains_with_two_processes_and_goes_on_where_they_stopped(tmp_path):
    data, run_dir, cache = write_rows(tmp_path / "pairs.jsonl"), tmp_path / "run", tmp_path / "cache"
    changes = {"train.save_every": 2, "contrast.weights": "uniform", "tracking.tensorboard": False}
    variables = {"VENV": sys.prefix, "CACHE": str(cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_xla.flags(2)}
    for steps in (2, 4):
        chosen = settings(data, run_dir, cache, {**changes, "train.steps": steps})
        options = [f"--{one}" for one in chosen if not one.startswith("run.cache_dir")]
        launch = ["--local", "2", "--port", str(free_port()), "--no-setup", "--", *options]
        done = bash("launch.sh", *launch, timeout=400, HF_HUB_OFFLINE="1", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[0] 2 processes, as configured" in done.stdout
    assert "[0] resuming after step 2 of 4" in done.stdout
    assert [line["step"] for line in metric_lines(run_dir) if "loss" in line] == [1, 2, 3, 4]
