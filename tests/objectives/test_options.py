"""Options of single objectives: in the configuration by themselves, checked by their rows, refused by all others."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rpo_jax import train
from rpo_jax.config import Config, ConfigError, ObjectiveConfig, options_taken, resolve, with_defaults_taken
from rpo_jax.config.reading import dump_config, known_keys, load_config, parse_config
from rpo_jax.objectives import losses, methods
from rpo_jax.objectives.objective import Option, likelihood_of
from tests.objectives import laws


def test_every_row_of_the_table_has_a_test_of_its_own():
    others = (path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name)
    text = "".join(path.read_text(encoding="utf-8") for path in others)
    for name in losses.OBJECTIVES:
        assert f'"{name}"' in text, name


def test_every_option_is_a_key_of_the_configuration_with_its_default(tmp_path):
    for name, option in losses.OPTIONS.items():
        assert known_keys()[f"objective.{name}"] == option.default
        assert option.fault(option.default) is None
        assert f"{name}: {option.doc}" in (ObjectiveConfig.__doc__ or "")
    config = parse_config(["--objective.name", "odpo", "--objective.odpo_alpha", "2", "--objective.odpo_scale=linear"])
    assert config.objective.odpo_alpha == 2.0
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slic_margin": 2.0}, r"objective\.slic_margin=2\.0 means nothing to objective\.name=rpo; .* slic\."),
        ({"name": "dpo", "odpo_alpha": 0.5}, r"odpo_alpha=0\.5 means nothing to objective\.name=dpo"),
        ({"name": "odpo", "odpo_alpha": -1.0}, r"objective\.odpo_alpha=-1\.0 must be at least 0"),
        ({"name": "odpo", "odpo_scale": "square"}, r"objective\.odpo_scale=square must be one of log, linear"),
        ({"name": "simpo", "simpo_margin": float("nan")}, r"objective\.simpo_margin=nan must be at least 0"),
        ({"name": "rdpo", "label_smoothing": 0.5}, r"label_smoothing=0\.5 must be at least 0 and below 0\.5 .* robust"),
        ({"name": "exo", "label_smoothing": 0.0}, r"label_smoothing=0\.0 must be above 0 and at most 0\.5 .* exo"),
        ({"name": "dpo", "label_smoothing": 0.2}, r"label_smoothing=0\.2 means nothing .* cdpo, rdpo, exo"),
        ({"name": "simpo", "average_log_prob": True}, r"average_log_prob=True means nothing to objective\.name=simpo"),
        ({"name": "kto", "nll_weight": 1.0}, r"nll_weight=1\.0 means nothing to objective\.name=kto"),
        ({"nll_weight": -1.0}, r"objective\.nll_weight=-1\.0 must be at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**changes)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["name=simpo"], "beta 2.0, simpo_margin 0.5"),
        (["name=simpo", "beta=0.1"], "simpo_margin 0.5"),
        (["name=alpha_dpo", "alpha_dpo_alpha=0.3"], "beta 2.5, alpha_dpo_margin 0.6"),
        (["name=dpo"], "beta 0.1, link logistic"),
        (["name=cdpo", "beta=1"], "link smoothed, label_smoothing 0.1"),
    ],
)
def test_what_is_not_given_is_the_objectives_own_and_is_said(arguments, options, tmp_path):
    config = load_config(None, [f"objective.{argument}" for argument in arguments])
    assert options_taken(config) == options
    assert resolve(config).objective == config.objective.build()
    recorded = with_defaults_taken(config).objective
    assert recorded.beta == resolve(config).objective.beta
    assert recorded.label_smoothing == 0.1
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_help_has_the_defaults_that_are_an_objectives_own():
    assert "the objective's own where not given: alpha_dpo 2.5, reward 1, simpo 2, others 0.1." in (
        ObjectiveConfig.__doc__ or ""
    )


def test_configurations_of_earlier_runs_which_name_every_default_are_read():
    for name in losses.OBJECTIVES:
        config = ObjectiveConfig(name=name, beta=0.1, label_smoothing=0.1, slic_margin=1.0)  # pyright: ignore
        assert config.build().beta == 0.1


def test_options_that_mean_something_are_not():
    ObjectiveConfig(link="robust", label_smoothing=0.3)
    ObjectiveConfig(name="slic", slic_margin=2.0, average_log_prob=True)
    ObjectiveConfig(name="rpo", nll_weight=0.5)
    assert Config().objective.nll_weight == 0


def test_the_command_says_it_in_one_line(capsys, tmp_path):
    arguments = ["--data.path", str(tmp_path / "none.jsonl"), "--objective.name=dpo", "--objective.simpo_margin=1"]
    assert train.main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: objective.simpo_margin=1.0 means nothing to objective.name=dpo; leave it out")
    assert "\n" not in told


def test_bounds_say_what_they_are():
    share = Option(0.5, "", low=0, high=1, open=True)
    assert share.fault(0.5) is None
    assert share.fault(1.0) == "must lie between 0 and 1, both excluded"
    assert Option(1.0, "", low=0, open=True).fault(0.0) == "must be greater than 0"
    assert Option(0.5, "", low=0, high=1).fault(1.5) == "must lie between 0 and 1"


def test_two_families_do_not_share_an_option_by_accident():
    owners = [name for objective in losses.OBJECTIVES.values() for name in objective.options()]
    shared = {"beta", "link", "label_smoothing", "average_log_prob", "nll_weight", "nll_mean"}
    assert set(owners) - shared == set(losses.OPTIONS)
    assert methods.OBJECTIVES is losses.OBJECTIVES


@pytest.mark.parametrize("name", ["rpo", "simpo", "exo"])
def test_the_chosen_responses_nll_comes_beside_any_pairwise_objective(name):
    """Mean over responses of -log pi / length: arXiv 2404.19733."""
    scores = laws.draw_scores(6, fill=np.nan)
    alone = laws.named(name).total_loss(scores)
    log_prob, num_tokens, valid = (np.asarray(x) for x in likelihood_of(scores["chosen"]))
    nll = np.mean((-log_prob.astype(np.float64) / num_tokens)[valid])
    got = laws.named(name, nll_weight=0.25).total_loss(scores)
    np.testing.assert_allclose(got, alone + 0.25 * nll, rtol=1e-6)


def test_the_index_of_methods_has_every_objective_and_settings_that_build_it():
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("|` ") for row in rows) == sorted(losses.OBJECTIVES)
    for row in rows:
        assert len(row) == 6, "name, source, loss, settings, data, TRL's name"
        assert all(cell.strip(" |") for cell in row), row
        name, settings = row[0].strip("|` "), row[3].replace("`", "").replace("<br>", "\n")
        assert len(settings.splitlines()) <= 3, "three lines of YAML"
        sections = yaml.safe_load(settings)
        keys = {f"{section}.{key}": value for section, of in sections.items() for key, value in of.items()}
        overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
        assert load_config(None, overrides).objective.name == name
