"""The doctor on a sound run, and on each part of it really damaged."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from rpo_jax import doctor, train
from rpo_jax.core.manifest import write_manifest
from rpo_jax.tools.checkup import environment, machine
from rpo_jax.tools.checkup.finding import failed
from tests.runs import configured, preference_rows, settings, write_rows

COMPILATIONS: list[str] = []


def _note(event: str, *_args, **_details) -> None:
    if "backend_compile" in event:
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)

CHANGES = {
    "train.steps": 2,
    "optim.warmup_steps": 1,
    "train.save_every": 1,
    "train.keep_last": 2,
    "tracking.tensorboard": False,
    "contrast.weights": "uniform",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, a cache and a run of two steps, which each test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    config = configured(write_rows(folder / "pairs.jsonl"), folder / "run", folder / "cache", CHANGES)
    train.run(config)
    return folder


@pytest.fixture
def place(trained, tmp_path):
    target = shutil.copytree(trained, tmp_path / "place")
    for file in (target / "run" / "config.yaml", *target.glob("run/checkpoints/*/record/metadata")):
        file.write_text(file.read_text().replace(str(trained), str(target)))
    for checkpoint in target.glob("run/checkpoints/*"):
        write_manifest(checkpoint)
    return target


@pytest.fixture
def seen(place, capsys):
    """seen(*arguments) -> exit status, and what was said on each subject; nothing was compiled, nothing changed."""

    def look(*arguments, run=True):
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        compiled = len(COMPILATIONS)
        status = doctor.main([*(["--run", str(place / "run")] if run else []), *arguments])
        out = capsys.readouterr().out
        assert len(COMPILATIONS) == compiled, "something was compiled"
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before
        return status, " ".join(out.split())

    return look


def test_a_sound_run(seen):
    status, said = seen()
    assert status == 0
    assert "0 warnings, 0 failed" in said
    assert f"jax {metadata.version('jax')}" in said
    assert "8 x cpu, cpu: data 8, fsdp 1, tensor 1" in said
    assert (
        "32 examples, layout preference; prompt: prompt; columns read: prompt, chosen, rejected; not read: none" in said
    )
    assert "reference cache 4 files, all whole" in said
    assert "step 2 reads back: " in said
    assert "besides 1" in said
    assert "settings the checkpoint's own" in said
    assert " free at " in said


def test_a_configuration_that_has_not_run(seen, place):
    options = [f"--{option}" for option in settings(place / "pairs.jsonl", place / "new", place / "cache", CHANGES)]
    status, said = seen(*options, run=False)
    assert status == 0
    assert "checkpoints none in" in said
    assert "0 failed" in said


def test_a_run_whose_size_is_known_before_it_is_written(trained):
    """What the disk is asked for is what the checkpoints of the run really hold."""
    config = configured(trained / "pairs.jsonl", trained / "run", trained / "cache", CHANGES)
    from rpo_jax import models
    from rpo_jax.tools.checkup.stored import read_state

    model_config = models.read_config(trained / "run" / "model")
    _, size = read_state(trained / "run" / "checkpoints" / "2" / "state")
    assert 0 <= size - machine.checkpoint_bytes(config, model_config) < 100  # the step's number


def data_file(place, step):
    """The file that holds most of a checkpoint's arrays."""
    return max(
        (file for file in (place / "run" / "checkpoints" / str(step) / "state").rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )


def test_a_checkpoint_cut_short(seen, place):
    file = data_file(place, 2)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    status, said = seen()
    assert status == 2
    assert "FAILED checkpoints step 2 is damaged" in said
    assert "resumes from step 1" in said
    shutil.rmtree(place / "run" / "checkpoints" / "2")  # what it advised
    status, said = seen()
    assert status == 0
    assert "step 1 reads back" in said


def test_a_checkpoint_with_a_file_missing(seen, place):
    data_file(place, 2).unlink()
    assert seen()[0] == 2


def test_a_checkpoint_that_the_storage_cannot_open_hides_no_other_finding(seen, place):
    (place / "run" / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(b"")
    status, said = seen()
    assert status == 2
    assert "FAILED checkpoints The checkpoint" in said
    assert "is damaged" in said
    assert "ok data" in said


def test_a_checkpoint_without_its_record(seen, place):
    shutil.rmtree(place / "run" / "checkpoints" / "2" / "record")
    status, said = seen()
    assert status == 2
    assert "step 2 is damaged" in said


def test_other_settings_than_the_checkpoint_has(seen):
    status, said = seen("--optim.learning_rate", "1e-4", "--objective.beta=0.5")
    assert status == 0
    assert "warning settings" in said
    assert "optim.learning_rate 0.001 -> 0.0001" in said
    assert "objective.beta 0.1 -> 0.5" in said
    assert seen("--objective.beta=0.5", "--strict")[0] == 1
    status, said = seen("--optim.name", "adamw", "--model.num_layers", "3", "--train.steps", "9")
    assert status == 2
    assert "FAILED settings" in said
    assert "optim.name rmsprop -> adamw" in said
    assert "model.num_layers 2 -> 3" in said
    assert "train.steps" not in said
    status, said = seen("--objective.name", "dpo", "--contrast.weights", "null")
    assert status == 2
    assert "objective.name rpo -> dpo" in said
    assert "or --force, which makes another run of it" in said
    status, said = seen("--objective.partition", "learned")  # a head that the checkpoint has not
    assert status == 2
    assert "objective.partition none -> learned" in said
    assert "--force" not in said


def test_missing_data(seen, place):
    (place / "pairs.jsonl").unlink()
    status, said = seen()
    assert status == 2
    assert "FAILED data no such file" in said


def test_prompts_of_rounds_that_are_not_here_are_not_fetched(seen, monkeypatch):
    monkeypatch.setattr("rpo_jax.data.hub._probe", lambda: pytest.fail("the hub was asked"))
    sources = "--model.path org/model --data.path org/prompts --data.eval_rows=0"
    rounds = f"--train.rounds 1 --rounds.score rule:x.py:f {sources}".split()
    _, said = seen(*rounds, run=False)
    assert "org/prompts is not on this machine" in said
    assert "if it is a hub data set, it is fetched when the run starts" in said


def test_damaged_data(seen, place):
    rows = [json.dumps(row) for row in preference_rows()]
    (place / "pairs.jsonl").write_text("\n".join([*rows[:6], "{", *rows]))
    status, said = seen()
    assert status == 2
    assert "pairs.jsonl:7: broken JSON" in "".join(said)
    status, said = seen("--data.on_bad_row", "skip")
    assert status == 0
    assert "warning data" in said
    assert "1 rows are skipped (broken JSON: 1)" in said
    status, said = seen("--data.on_bad_row", "skip", "--data.eval_rows", "38")
    assert status == 2
    assert "data.eval_rows=38 leaves nothing of 38 examples" in said


def test_data_without_the_scores_that_the_objective_needs(seen):
    status, said = seen("--objective.name", "odpo", "--contrast.weights", "pair")
    assert status == 2
    assert "FAILED data" in said
    assert "score" in said


def test_a_damaged_reference_cache(seen, place):
    file = sorted((place / "cache" / "reference_log_probs").iterdir())[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0xFF
    file.write_bytes(raw)
    status, said = seen()
    assert status == 0
    assert "warning reference cache 1 of 4 files cannot be used" in said
    assert "does not match its checksum" in said
    file.write_bytes(raw[:40])
    assert "1 of 4 files cannot be used" in seen()[1]


def test_a_foreign_reference_cache(seen, place):
    first, second = sorted((place / "cache" / "reference_log_probs").iterdir())[:2]
    shutil.copyfile(first, second)
    assert "it is of something else than its name says" in seen()[1]
    second.write_bytes(save({"log_probs": load_file(first)["log_probs"]}, {"by": "another program"}))
    assert "its header lacks what they are kept with" in seen()[1]


def test_damaged_and_foreign_embeddings(seen, place):
    def keep(encoder, metadata):
        raw = save({"keys": np.zeros((1, 32), np.uint8), "embeddings": np.zeros((1, 4), np.float32)}, metadata)
        file = place / "cache" / "embeddings" / encoder / f"{hashlib.sha256(raw).hexdigest()}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)
        return file

    file = keep("a", {"rpo_jax.embeddings.1": "a"})
    assert "embeddings 1 files, all whole" in seen()[1]
    file.write_bytes(file.read_bytes()[:-1])
    status, said = seen()
    assert status == 0
    assert "warning embeddings 1 of 1 files cannot be used" in said
    file.unlink()
    keep("b", {"rpo_jax.embeddings.1": "a"})
    assert "it holds {'rpo_jax.embeddings.1': 'a'}" in seen()[1]


def test_a_model_that_is_damaged_or_away(seen, place):
    folder = place / "model"
    assert "FAILED model There is no model folder" in seen("--model.path", str(folder))[1]
    shutil.copytree(place / "run" / "model", folder)
    status, said = seen("--model.path", str(folder))
    assert status == 2
    assert "there are no weights to load" in said
    status, said = seen("--model.path", "someone/a-model")
    assert status == 0
    assert "warning model someone/a-model is not on this machine" in said


def test_a_disk_that_is_too_small(seen):
    """10^12 parameters and their optimizer state: no disk has that free."""
    huge = {"hidden_size": 2**17, "intermediate_size": 2**17, "num_layers": 64, "num_heads": 4, "num_kv_heads": 4}
    status, said = seen(*(f"--model.{name}={value}" for name, value in huge.items()), "--run.dir", "elsewhere")
    assert status == 2
    assert "FAILED disk space" in said
    assert "lower train.keep_last" in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(seen, place):
    (place / "run").chmod(0o500)
    assert "is no folder to write to" in seen()[1]


def test_a_mesh_that_does_not_fit(seen):
    status, said = seen("--mesh.data", "3")
    assert status == 2
    assert "FAILED devices mesh.data=3" in said


def test_versions_that_do_not_meet_the_requirements(monkeypatch):
    found = metadata.requires("rpo-jax")
    monkeypatch.setattr(
        metadata, "requires", lambda name: [*found, "optax>=99", "no-such-package>=1", "a; extra == 'b'"]
    )
    (bad,) = environment.check_environment()
    assert bad == failed(
        "packages",
        f"optax {metadata.version('optax')}, needs >=99; no-such-package is missing",
        "pip install rpo-jax, or in a clone pip install -c constraints.txt -e .",
    )


def test_a_flax_that_does_not_go_with_its_jax(monkeypatch):
    versions = {"flax": "0.12.9", "jax": "0.12.0.1"}
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or found(name))
    assert any(
        "flax 0.12.9 cannot be imported beside jax 0.12.0.1" in bad.text for bad in environment.check_environment()
    )


def test_a_checkpoint_of_other_versions(seen, place):
    (file,) = (place / "run" / "checkpoints" / "2" / "record").glob("metadata")
    content = json.loads(file.read_text())
    content["versions"]["jax"] = "0.9.0"
    file.write_text(json.dumps(content))
    write_manifest(place / "run" / "checkpoints" / "2")
    status, said = seen()
    assert status == 0
    assert f"warning versions checkpoint -> here: jax 0.9.0 -> {metadata.version('jax')}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "nowhere"), "nowhere is not a run folder"),
        (("--config", "nowhere.yaml"), "No configuration file at nowhere.yaml"),
        (("--run.dri", "x"), "did you mean run.dir?"),
    ],
)
def test_a_request_that_cannot_be_read(capsys, arguments, message):
    assert doctor.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_run_needs_a_folder(capsys):
    assert doctor.main(["--run", "--strict"]) == 2
    assert "--run needs a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_itself(place):
    root = Path(doctor.__file__).parents[1]
    environment_variables = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-m", "rpo_jax.doctor", "--run", str(place / "run")],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment_variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("0 failed")
    assert len(lines) < 40, "one screen"
