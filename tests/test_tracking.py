import json
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rpo_jax.config import TrackingConfig
from rpo_jax.runs import loggers, tracking
from rpo_jax.runs.loggers import check_installed, check_login
from rpo_jax.runs.tracking import MetricsLog, Reporter, summary
from tests.disks import filled, gone

QUIET = TrackingConfig(tensorboard=False)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write(run_dir, metrics, start_step=0, config=QUIET) -> MetricsLog:
    log = MetricsLog(run_dir, config, start_step, "id", {})
    for line in metrics:
        log.write(line)
    log.close()
    return log


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, QUIET, 0, "id", {})
    log.write({"step": 1, "loss": 0.6931})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.6931}]
    log.close()


def test_a_resume_drops_what_will_be_logged_again(tmp_path):
    told = [{"step": 0, "eval_loss": 9.0}, *({"step": s, "loss": float(s)} for s in range(1, 7))]
    write(tmp_path, told)
    resumed = write(tmp_path, [{"step": 5, "loss": 50.0}], start_step=4)
    assert lines(tmp_path) == [*told[:5], {"step": 5, "loss": 50.0}]
    assert resumed.initial == told[0] == resumed.held_out
    assert resumed.training == {"step": 5, "loss": 50.0}


def test_a_start_from_nothing_keeps_nothing(tmp_path):
    """A run that was stopped before its first checkpoint evaluates before step 1 once more."""
    write(tmp_path, [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 1.0}])
    fresh = write(tmp_path, [{"step": 0, "eval_loss": 9.0}])
    assert lines(tmp_path) == [{"step": 0, "eval_loss": 9.0}]
    assert fresh.training == {}


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 2, "loss": 2.0}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, [{"step": 1, "loss": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(torn)
    write(tmp_path, [{"step": 4, "loss": 4.0}], start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_a_number_that_is_not_finite_still_gives_lines_that_can_be_read(tmp_path):
    write(tmp_path, [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}])
    resumed = write(tmp_path, [], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert resumed.training == {"step": 2, "loss": 1.0}


def test_tensorboard_holds_every_number(tmp_path):
    write(
        tmp_path, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "rewards/margins": 1.5}], config=TrackingConfig()
    )
    assert list((tmp_path / "tensorboard").glob("events.*"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.value for event in events.Scalars("rewards/margins")] == [1.5]


def test_tensorboard_can_be_left_out(tmp_path):
    write(tmp_path, [{"step": 1, "loss": 0.5}])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("key", ["wandb", "trackio", "mlflow"])
def test_a_dashboard_that_is_not_installed_is_said_before_the_run(monkeypatch, key):
    check_installed(TrackingConfig())
    found = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == key else found(name))
    with pytest.raises(ValueError, match=rf"tracking\.{key}=true.*pip install {key}"):
        check_installed(TrackingConfig(**{key: True}))


def failing(reason):
    def fail(*_, **__):
        raise RuntimeError(f"{reason}\nand more")

    return fail


def test_weights_and_biases_that_fails_is_told_before_the_run_and_keeps_no_run_from_going_on(tmp_path, monkeypatch):
    """A stand-in for its client, which is no dependency; the next test has the real one where it is installed."""
    gone = failing("the service has gone")
    run = SimpleNamespace(log=gone, finish=gone)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=failing("no key"), init=lambda **_: run))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config, said = TrackingConfig(tensorboard=False, wandb=True), []
    with pytest.raises(ValueError, match=r"tracking\.wandb=true, but .*: no key; run `wandb login`"):
        check_login(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_login(config)
    check_login(QUIET)
    monkeypatch.delenv("WANDB_MODE")
    log = MetricsLog(tmp_path, config, 0, "id", {}, say=said.append)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert said == [
        "Weights & Biases' charts are not kept: its client says the service has gone; it goes on without them"
    ]


def test_weights_and_biases_itself_on_a_full_disk(tmp_path, monkeypatch, disk_of):
    wandb = pytest.importorskip("wandb")
    disk, said = disk_of("6m"), []
    for name, value in {"WANDB_DIR": disk, "HOME": tmp_path, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = TrackingConfig(tensorboard=False, wandb=True)
    with pytest.raises(ValueError, match=r"tracking\.wandb=true, but .*WANDB_MODE=offline"):
        check_login(config)
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLog(tmp_path, config, 0, "id", {}, say=said.append)
    with filled(disk, 0):
        for step in range(1, 300):
            log.write({"step": step, "loss": 1.0})
    log.close()
    assert len(lines(tmp_path)) == 299
    assert len(said) == 1
    assert "Weights & Biases' charts are not kept: " in said[0]
    assert "No space left on device; free some room there" in said[0]


# Real clients, each where it is installed: on this machine, without a network.


def trackio_in(folder, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    # It reads the environment when it is imported, and these when it opens a file.
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio.")]:
        for name, below in {"TRACKIO_DIR": "", "MEDIA_DIR": "media", "ARTIFACTS_DIR": "artifacts"}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, folder / below)
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    return trackio


def in_trackio(trackio, name):
    """[step, loss] of a run's lines that have one, and its configuration."""
    run = trackio.Api().runs("rpo_jax")[0]
    assert len(trackio.Api().runs("rpo_jax")) == 1
    assert run.name == name
    rows = trackio.SQLiteStorage.get_logs("rpo_jax", name)
    return [[row["step"], row["loss"]] for row in rows if "loss" in row]


def in_mlflow(uri):
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("rpo_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"objective.name": "rpo", "objective.beta": "0.1"}
    assert run.info.status == "FINISHED"
    return [[point.step, point.value] for point in client.get_metric_history(run.info.run_id, "loss")]


SETTINGS = {"objective": {"name": "rpo", "beta": 0.1}}


def interrupted(run_dir, config, said):
    """Four steps, an evaluation, and a resume after the second of them, which takes a fifth."""
    run_dir.mkdir()
    told = [{"step": s, "loss": float(s), "rewards/margins": 0.5} for s in range(1, 5)]
    for start, lines_of_part in ((0, told), (2, [*told[2:], {"step": 5, "loss": 5.0}])):
        log = MetricsLog(run_dir, config, start, "0123456789abcdef", SETTINGS, say=said.append)
        for line in lines_of_part:
            log.write(line)
            if line["step"] == 2:
                log.write({"step": 2, "eval_loss": 1.5})
        log.close()
    return [[s, float(s)] for s in range(1, 6)]


def test_trackio_has_every_step_once_also_after_a_resume(tmp_path, monkeypatch, capsys):
    trackio, said = trackio_in(tmp_path / "trackio", monkeypatch), []
    config = TrackingConfig(tensorboard=False, trackio=True)
    check_login(config)
    wanted = interrupted(tmp_path / "run", config, said)
    assert in_trackio(trackio, "run-01234567") == wanted
    assert said == []


@pytest.fixture
def mlflow_at(monkeypatch, tmp_path):
    def at(uri):
        mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.chdir(tmp_path)
        mlflow.set_tracking_uri(None)
        return uri

    return at


def test_mlflow_has_every_step_once_also_after_a_resume(tmp_path, mlflow_at):
    uri, said = mlflow_at(f"sqlite:///{tmp_path}/mlflow.db"), []
    config = TrackingConfig(tensorboard=False, mlflow=True)
    check_login(config)
    wanted = interrupted(tmp_path / "run", config, said)
    assert in_mlflow(uri) == wanted
    assert said == []


def test_a_server_of_mlflow_that_does_not_answer_is_told_before_the_run(mlflow_at):
    mlflow_at("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"tracking\.mlflow=true, but MLflow says: .*; see that its server runs"):
        check_login(TrackingConfig(mlflow=True))


def test_a_space_of_trackio_without_a_token_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "owner/space")
    with pytest.raises(ValueError, match=r"tracking\.trackio=true, but trackio says: .*hf auth login"):
        check_login(TrackingConfig(trackio=True))


@pytest.mark.filterwarnings("default")  # their threads and pools warn of files that the disk refused
@pytest.mark.parametrize("key", ["trackio", "mlflow"])
@pytest.mark.parametrize("trouble", ["full", "gone"])
def test_a_dashboard_s_disk_that_is_full_or_gone_is_told_once(tmp_path, monkeypatch, disk_of, mlflow_at, key, trouble):
    disk, said = (disk_of("16m") if trouble == "full" else tmp_path / "disk"), []
    if key == "trackio":
        trackio_in(disk / "trackio", monkeypatch)
    else:
        mlflow_at(f"sqlite:///{disk}/mlflow.db")
    disk.mkdir(exist_ok=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = MetricsLog(run_dir, TrackingConfig(tensorboard=False, **{key: True}), 0, "id", SETTINGS, say=said.append)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 1.0})
    with filled(disk, 0) if trouble == "full" else gone(disk):
        for step in range(3, 100):
            log.write({"step": step, "loss": 1.0})
        log.close()
    assert len(lines(run_dir)) == 99
    assert len(said) == 1, said
    assert "charts are not kept: " in said[0]
    assert ("free some room there" if trouble == "full" else "see that its disk is still there") in said[0]


def test_the_summary_is_short_and_ordered():
    line = summary({"pairs_per_second": 12.34, "loss": 0.69314, "grad_norm": 3.0, "rewards/accuracies": 0.75})
    assert line == "loss 0.6931  pairs/s 12.3  accuracy 0.750"


def test_pairs_that_all_tie_are_no_accuracy_of_zero():
    tied = {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.0, "eval_rewards/ties": 1.0, "eval_logps/accuracies": 0.5}
    assert summary(tied) == "held-out loss 0.6931  held-out accuracy tied  held-out accuracy of log-probs 0.500"
    assert "held-out accuracy 0.000" in summary({**tied, "eval_rewards/ties": 0.9})
    assert summary({"rewards/accuracies": 0.0}) == "accuracy 0.000", "runs of earlier versions counted no ties"


@pytest.mark.parametrize(("rate", "shown"), [(0.0123, "0.012"), (0.5, "0.5"), (1.26, "1.3"), (345.6, "345.6")])
def test_a_slow_rate_is_not_zero(rate, shown):
    assert summary({"pairs_per_second": rate}) == f"pairs/s {shown}"
    assert summary({"generated_per_second": 0.04}) == "tokens/s 0.04"


def use_reporter(reporter):
    with reporter.phase("read") as notes:
        notes.append("[3 rows]")
    with reporter.progress("train", 4) as update:
        update(1, {"loss": 0.5})
        update(2, {})
        update(3, {"loss": 0.25})


def test_where_there_is_no_terminal_lines_are_plain(capsys):
    reporter = Reporter()
    use_reporter(reporter)
    phase, *progress = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"read +\d+\.\d s  \[3 rows\]", phase), "square brackets are text, not markup"
    assert progress == ["train 1/4  loss 0.5000", "train 3/4  loss 0.2500  0:00 left"]
    assert list(reporter.phase_seconds) == ["read"]


def test_a_plain_line_is_never_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Reporter().say("a path of many letters " + "x" * 80)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_on_a_terminal_there_is_a_bar_with_the_metrics(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "Console", lambda **given: Console(**given, force_terminal=True, width=160))
    use_reporter(Reporter())
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "3/4" in out
    assert "loss 0.2500" in out
    assert "left" in out


def test_a_phase_that_comes_twice_adds_up(capsys):
    reporter = Reporter()
    for _ in range(2):
        with reporter.phase("read"):
            pass
    assert list(reporter.phase_seconds) == ["read"]


def test_a_phase_that_fails_reports_no_time(capsys):
    reporter = Reporter()
    with pytest.raises(ValueError, match="no rows"), reporter.phase("read"):
        raise ValueError("no rows")
    assert reporter.phase_seconds == {}
    assert capsys.readouterr().out == ""


class SlowClock:
    """Steps of 100 s each, the first of 1,000."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tracking.time, "perf_counter", lambda: self.now)

    def take(self, reporter, steps):
        with reporter.progress("train", 60) as update:
            for step in range(1, steps + 1):
                self.now += 100 if step > 1 else 1000
                update(step, {"loss": 0.5})


def test_the_time_left_is_told_once_a_step_without_compiling_is_timed(capsys, monkeypatch):
    clock = SlowClock(monkeypatch)
    clock.take(Reporter(), 3)
    assert capsys.readouterr().out.splitlines() == [
        "train 1/60  loss 0.5000",
        "train 2/60  loss 0.5000  1:36:40 left",
        "train 3/60  loss 0.5000  1:35:00 left",
    ]


def test_a_bar_knows_the_time_left_of_slow_steps(capsys, monkeypatch):
    monkeypatch.setattr(tracking, "Console", lambda **given: Console(**given, force_terminal=True, width=160))
    clock = SlowClock(monkeypatch)
    bars = []

    class Bar(tracking.Progress):
        def __init__(self, *columns, **given):
            super().__init__(*columns, get_time=lambda: clock.now, **given)
            bars.append(self)

    monkeypatch.setattr(tracking, "Progress", Bar)
    clock.take(Reporter(), 3)
    assert bars[0].tasks[0].time_remaining == 57 * 100
