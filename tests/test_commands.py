"""The console script, and how errors end a command."""

import re
import subprocess
import sys

import pytest

import rpo_jax
from rpo_jax import cli
from rpo_jax.config.presets import preset_names
from rpo_jax.config.reading import known_keys
from rpo_jax.core.command import run_command
from rpo_jax.data.layouts import LAYOUTS
from rpo_jax.models import FAMILIES
from rpo_jax.objectives.losses import OBJECTIVES


def test_every_command_is_listed_with_a_line_and_jax_is_not_imported():
    code = "import sys; from rpo_jax import cli; cli.main(['--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.strip().splitlines()
    assert imported == "False"
    assert "rpo-jax train --help" in lines[-1]
    listed = dict(line.split(maxsplit=1) for line in lines[2:-2])
    assert list(listed) == list(cli.COMMANDS)
    assert listed["train"] == "Train a policy on preferences"
    assert all(summary[0].isupper() and "python" not in summary for summary in listed.values())


def test_a_command_gets_the_arguments_after_its_name(tmp_path, capsys):
    assert cli.main(["export", "--run", str(tmp_path / "none"), "--out", "x"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} is not a run folder: it has no config.yaml; give the run.dir of a training run.\n"
    )


@pytest.mark.parametrize("arguments", [["trian"], ["--run"]])
def test_what_is_no_command_is_told(arguments, capsys):
    assert cli.main(arguments) == 2
    assert f"there is no command {arguments[0]!r}; there are train, prepare" in capsys.readouterr().err


def test_without_a_command_they_are_listed(capsys):
    assert cli.main([]) == 2
    assert "usage: rpo-jax COMMAND" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rpo-jax {rpo_jax.__version__}\n"


CONFIGURED = ("train", "prepare", "doctor")
SCREEN = (40, 100)  # lines, columns


def help_of(capsys, *arguments):
    assert cli.main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", CONFIGURED)
def test_help_fits_a_screen_and_names_what_there_is(command, capsys):
    said = help_of(capsys, command, "--help")
    lines = said.splitlines()
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]
    assert lines[0].startswith(f"usage: rpo-jax {command} [--config FILE]")
    assert lines[2] == f"{cli.summary(command)}."
    words = set(re.findall(r"[\w.]+", said))
    assert words >= {*OBJECTIVES, *LAYOUTS, *FAMILIES, *preset_names()}
    assert ("--overwrite" in said, "--strict" in said) == (command == "train", command == "doctor")


@pytest.mark.parametrize("command", CONFIGURED)
def test_help_has_every_key_on_request(command, capsys):
    said = help_of(capsys, command, "--help", "all")
    assert set(re.findall(r"--([a-z]+\.\w+)", said)) >= set(known_keys())
    assert "peak learning rate" in said


def test_help_has_one_section_on_request(capsys):
    said = help_of(capsys, "train", "--config", "quickstart", "--help=optim")
    assert set(re.findall(r"--([a-z]+\.\w+)", said)) == {key for key in known_keys() if key.startswith("optim.")}
    assert "configuration file" not in said
    assert cli.main(["train", "--help", "optimizer"]) == 2
    assert "did you mean --help optim?" in capsys.readouterr().err


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_what_a_user_can_correct_is_one_line(kind, capsys):
    error = kind("the first line\n  and the second")
    error.add_note("in a cell")
    error.add_note("----\nof jax")
    assert run_command(failing(error)) == 2
    assert capsys.readouterr().err == "error: the first line and the second (in a cell)\n"


def test_other_errors_pass_once_the_processes_know():
    left = []
    with pytest.raises(RuntimeError, match="ours"):
        run_command(failing(RuntimeError("ours")), lambda status: left.append(status) or status)
    assert left == [1]


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (4, 4)])
def test_the_status_is_what_the_work_returns(returned, status):
    assert run_command(lambda: returned) == status
