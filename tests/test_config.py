import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from rpo_jax.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig, TrackingConfig, resolve, synonyms
from rpo_jax.config.presets import preset_names
from rpo_jax.config.reading import dump_config, known_keys, load_config, parse_config

ALL_CONFIGS = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(
    path for path in ALL_CONFIGS.glob("**/*.yaml") if not path.name.startswith(("compare", "frontier"))
)  # those are studies of many runs


def write_yaml(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(arguments) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        parse_config(arguments)
    return str(caught.value)


def test_nothing_given_is_the_defaults():
    assert parse_config([]) == load_config() == Config()


def test_overrides_win_over_the_file(tmp_path):
    file = write_yaml(tmp_path / "a.yaml", "batch:\n  pairs: 32\noptim:\n  learning_rate: 1e-4\n")
    config = load_config(file, ["optim.learning_rate=2e-5", "contrast.group=8"])
    assert (config.batch.pairs, config.optim.learning_rate, config.contrast.group) == (32, 2e-5, 8)
    assert config.optim.warmup_steps == Config().optim.warmup_steps
    assert parse_config(["--config", str(file), "--optim.learning_rate", "2e-5", "--contrast.group=8"]) == config


def test_several_files_are_merged_in_order(tmp_path):
    first = write_yaml(tmp_path / "a.yaml", "batch:\n  pairs: 32\n  order: sequential\ntrain:\n  steps: 3\n")
    second = write_yaml(tmp_path / "b.yaml", "batch:\n  pairs: 16\n")
    merged = parse_config(["--config", str(first), "--config", str(second)])
    assert (merged.batch.pairs, merged.batch.order, merged.train.steps) == (16, "sequential", 3)
    assert parse_config(["--config", str(second), "--config", str(first)]).batch.pairs == 32


def test_a_file_wins_over_an_option_before_it(tmp_path):
    """Order is meaning: what comes later wins, files included."""
    file = write_yaml(tmp_path / "a.yaml", "batch:\n  pairs: 32\n")
    assert parse_config(["--batch.pairs=8", "--config", str(file)]).batch.pairs == 32


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("contrst:\n  group: 8\n", "contrst", "contrast"),
        ("contrast:\n  temprature: 0.5\n", "contrast.temprature", "contrast.temperature"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, text, unknown, nearest):
    file = write_yaml(tmp_path / "a.yaml", text)
    message = refusal(["--config", str(file)])
    assert str(file) in message
    assert f"'{unknown}'" in message
    assert f"did you mean {nearest}" in message


def test_an_unknown_key_on_the_command_line_names_the_nearest():
    assert "did you mean batch.pairs?" in refusal(["--batch.pair", "8"])
    assert "did you mean run.resume?" in refusal(["--run.resum=auto"])
    with pytest.raises(ValueError, match=r"objective\.beta"):
        load_config(None, ["objective.betta=0.2"])
    assert "learning_rate" in refusal(["--optim.zzzz=1e-5"]), "a section's keys are listed where none is near"
    assert "contrast" in refusal(["--zzzzzzzz=1"]), "and the sections where not even a section is"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("beta", "objective.beta"),
        ("loss.beta", "objective.beta"),
        ("batch.beta", "objective.beta"),
        ("loss_type", "objective.name"),
        ("per_device_train_batch_size", "batch.pairs"),
        ("num_train_epochs", "train.epochs"),
        ("training.epochs", "train.epochs"),
        ("max_length", "data.max_tokens"),
        ("cutoff_len", "data.max_tokens"),
        ("gradient_checkpointing", "model.remat"),
        ("model_name_or_path", "model.path"),
        ("data.max_prompt_length", "data.max_prompt_tokens"),
        ("dir", "run.dir"),
    ],
)
def test_a_key_is_known_by_what_other_trainers_call_it(tmp_path, given, meant):
    assert f"unknown configuration key '{given}'; did you mean {meant}?" in refusal([f"--{given}", "1"])
    section, _, name = given.rpartition(".")
    file = write_yaml(tmp_path / "a.yaml", f"{section}:\n  {name}: 1\n" if section else f"{given}: 1\n")
    assert refusal(["--config", str(file)]).startswith(f"{file}: unknown configuration key '{given}'; did you mean")


def test_a_name_that_several_sections_have_is_answered_with_all():
    assert "did you mean data.path or model.path or reference.path?" in refusal(["--path=x"])


def test_synonyms_lead_to_keys():
    assert set(synonyms.KEYS.values()) <= set(known_keys())
    assert set(synonyms.SECTIONS.values()) <= {key.partition(".")[0] for key in known_keys()}


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--batch.pairs=many", "batch.pairs"),
        ("--optim.learning_rate=fast", "optim.learning_rate"),
        ("--data.pairing=both", "data.pairing"),
        ("--run.overwrite=perhaps", "run.overwrite"),
        ("--contrast.group=all", "contrast.group"),
        ("--contrast.weights=cosine", "contrast.weights"),
        ("--train.steps=1.5", "train.steps"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(argument, named):
    message = refusal([argument])
    assert "<class" not in message
    assert named in message
    assert argument.partition("=")[2] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("batch.pairs", "eight", "is 'eight', and must be a whole number."),
        ("optim.learning_rate", "fast", "is 'fast', and must be a number."),
        ("run.overwrite", "perhaps", "is 'perhaps', and must be true or false."),
        ("train.steps", "[1, 2]", "is [1, 2], and must be a whole number or null."),
        ("data.pairing", "both", "is 'both', and must be one of paired, unpaired, grouped."),
        ("model.remat", "some", "is 'some', and must be one of none, dots, attention, full."),
        ("contrast.group", "all", "is 'all', and must be a whole number or global."),
        ("lora.targets", "5", "is 5, and must be a list, each a text."),
        ("data.columns", "question", "is 'question', and must be names with values, as {name: value}."),
        (
            "objective.link",
            "odd",
            "is 'odd', and must be one of logistic, smoothed, squared, hinge, robust, exo or null.",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_its_file_and_the_type_in_words(tmp_path, key, value, told):
    section, name = key.split(".")
    file = write_yaml(tmp_path / "a.yaml", f"{section}:\n  {name}: {value}\n")
    assert refusal([f"--config={file}", "--run.seed=1"]) == f"{file}: {key} {told}"


def test_a_value_out_of_range_names_its_file(tmp_path):
    file = write_yaml(tmp_path / "a.yaml", "batch:\n  pairs: 0\n")
    assert refusal(["--config", str(file)]) == f"{file}: batch.pairs=0 must be greater than 0."
    assert refusal(["--config", str(file), "--batch.pairs=-1"]) == "batch.pairs=-1 must be greater than 0."
    both = write_yaml(tmp_path / "b.yaml", "contrast:\n  group: 24\n")
    assert refusal(["--config", str(both)]).startswith(f"{both}: contrast.group=24 does not divide")


# Each of these is out of range in one way; the message names what the user can change.
OUT_OF_RANGE = {
    "run.seed": ["run.seed=-1"],
    "run.overwrite": ["run.resume=auto", "run.overwrite=true"],
    "data.max_prompt_tokens": ["data.max_prompt_tokens=0"],
    "data.train_rows": ["data.train_rows=0"],
    "data.max_tokens": ["data.max_tokens=256", "data.max_prompt_tokens=256"],
    "data.eval_rows": ["data.eval_rows=-1"],
    "data.eval_path": ["data.eval_rows=8", "data.eval_path=x.jsonl"],
    "model.vocab_size": ["model.vocab_size=0"],
    "model.num_layers": ["model.num_layers=0"],
    "model.num_heads": ["model.hidden_size=30", "model.num_heads=4"],
    "model.num_kv_heads": ["model.num_heads=4", "model.num_kv_heads=3"],
    "model.rope_theta": ["model.rope_theta=0"],
    "objective.beta": ["objective.beta=0"],
    "objective.label_smoothing": ["objective.label_smoothing=0.6"],
    "contrast.alpha": ["contrast.alpha=1.5"],
    "contrast.temperature": ["contrast.temperature=0"],
    "contrast.perplexity": ["contrast.perplexity=0.5"],
    "contrast.temperature fixes tau": ["contrast.perplexity=6", "contrast.temperature=0.5"],
    "contrast.group": ["contrast.group=0"],
    "contrast.group=24 does not divide the 64 pairs": ["contrast.group=24"],
    "contrast.weights": ["contrast.weights=diagonal", "data.pairing=unpaired"],
    "embedding.batch_texts": ["embedding.batch_texts=0"],
    "batch.pairs": ["batch.pairs=0"],
    "batch.micro_rows": ["batch.micro_rows=0"],
    "batch.row_tokens": ["batch.row_tokens=0"],
    "mesh.data": ["mesh.data=0"],
    "mesh.fsdp": ["mesh.data=-1", "mesh.fsdp=-1"],
    "mesh.expert": ["mesh.expert=0"],
    "mesh.context": ["mesh.context=0"],
    "mesh.context=-1: the length of rows depends on it": ["mesh.context=-1", "mesh.data=1"],
    "use a multiple of 256, as 512": ["mesh.context=2", "batch.row_tokens=320"],
    "model.router_aux_loss_coef": ["model.router_aux_loss_coef=-0.1"],
    "optim.learning_rate": ["optim.learning_rate=0"],
    "optim.max_grad_norm": ["optim.max_grad_norm=-1"],
    "optim.eps": ["optim.eps=0"],
    "optim.b1": ["optim.b1=1.1"],
    "optim.b2": ["optim.b2=-0.1"],
    "optim.decay": ["optim.decay=2"],
    "optim.warmup_steps": ["optim.warmup_steps=-1"],
    "optim.weight_decay": ["optim.weight_decay=-1"],
    "weight_decay=0.1 is not used by optim.name=rmsprop": ["optim.weight_decay=0.1"],
    "train.steps": ["train.steps=0"],
    "train.epochs": ["train.epochs=0"],
    "train.log_every": ["train.log_every=0"],
    "train.keep_last": ["train.keep_last=0"],
    "train.eval_every": ["train.eval_every=-1"],
    "train.save_every": ["train.save_every=-1"],
    "train.keep_best": ["train.keep_best=-1"],
    "train.max_minutes": ["train.max_minutes=0"],
    "train.sample_prompts": ["train.sample_prompts=-1"],
    "train.sample_tokens": ["train.sample_tokens=0"],
}


@pytest.mark.parametrize("named", OUT_OF_RANGE)
def test_a_value_out_of_range_names_its_key(named):
    with pytest.raises(ValueError, match=r"^\S") as caught:
        load_config(None, OUT_OF_RANGE[named])
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert len(message) < 250, "a section's own reason, not jsonargparse's report of all that it tried"


def test_sections_check_themselves_without_a_file():
    with pytest.raises(ConfigError, match=r"batch\.pairs=0"):
        dataclasses.replace(Config().batch, pairs=0)


def test_configurations_made_in_python_are_checked_too():
    config = Config(optim=OptimConfig(learning_rate=np.float64(0.1), eps=1), data=DataConfig(path=Path("a"), mix={}))
    assert (type(config.optim.learning_rate), config.data.path) == (float, "a")
    assert yaml.safe_load(dump_config(config))["optim"]["learning_rate"] == 0.1
    for made, said in (
        (lambda: Config(data=DataConfig(eval_rows=0.1)), "data.eval_rows=0.1 must be int, not float"),
        (lambda: Config(data={}), "data must be a DataConfig, not dict"),
        (lambda: Config(tracking=TrackingConfig(wandb="yes")), "tracking.wandb='yes' must be bool, not str"),
        (lambda: RunConfig(dir="gs://bucket/run"), "run.dir=gs://bucket/run is an address, not a folder; mount"),
    ):
        with pytest.raises((ConfigError, TypeError), match=re.escape(said)):
            made()


def test_nan_is_in_no_range():
    for key in ("objective.beta", "optim.learning_rate", "contrast.alpha", "contrast.perplexity", "optim.weight_decay"):
        assert key in refusal([f"--{key}=.nan"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.path=m", "--model.tokenizer=t"], "model.tokenizer=t is for a new model"),
        (["--reference.path=r", "--reference.mode=none"], "would not be read: reference.mode=none asks for none"),
        (["--reference.path=r", "--objective.name=simpo"], "would not be read: objective.name=simpo uses none"),
    ],
)
def test_what_would_not_be_read_is_refused(arguments, said):
    assert said in refusal(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objective", "dpo"], "'--objective' is a section, not a key; did you mean --objective.name?"),
        (["--data=rows.jsonl"], "'--data' is a section, not a key; did you mean --data.path?"),
        (["--lora", "16"], "'--lora' is a section, not a key; did you mean --lora.rank?"),
        (["--run.dir=null"], "run.dir is null, and must be a text"),
        (["--data.eval_split=dev"], "data.eval_split=dev is a split of data.eval_path, which is not given"),
        (["--objective.name=dpo", "--objective.label_smoothing=0.1"], "label_smoothing=0.1 means nothing to"),
        (["--objective.name=sigmoid"], "unknown objective 'sigmoid'; did you mean 'dpo'?"),
        (["--objective.name=DPO"], "unknown objective 'DPO'; did you mean 'dpo'?"),
        (["--objective.name=nonsense"], "unknown objective 'nonsense'; there are "),
        (["--train.save_steps=1"], "did you mean train.save_every?"),
        (["--objective.rpo_alpha=1"], "did you mean objective.nll_weight?"),
        (["--kto_rejected_weight=9"], "did you mean objective.kto_undesirable_weight?"),
        (["--use_liger_kernel=true"], "the sections are run, data,"),
        (["--label_smoothing=0.1"], "did you mean objective.label_smoothing?"),
        (["--embedding.batch_size=8"], "did you mean embedding.batch_texts?"),
        (["--data.batch_size=8"], "did you mean batch.pairs?"),
        (["--optim.b1=1"], "optim.b1=1.0 must be at least 0, and below 1"),
    ],
)
def test_habits_of_other_trainers_are_answered(arguments, said):
    assert said in refusal(arguments)


@pytest.mark.parametrize("key", ["optim.max_grad_norm", "data.max_prompt_tokens", "lora.targets", "batch.pairs"])
def test_null_where_there_must_be_a_value_is_refused(tmp_path, key):
    section, name = key.split(".")
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}: {{{name}: null}}\n")
    assert refusal(["--config", str(file)]).startswith(f"{file}: {key} is null, and must be ")


def test_a_file_of_comments_changes_nothing_and_a_runs_own_says_what_it_said(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(file) == Config()
    file.write_text("objective: {name: dpo, label_smoothing: 0.1}\n")
    assert "means nothing to objective.name=dpo" in refusal(["--config", str(file)])
    (tmp_path / "run_id").touch()  # as earlier runs recorded it, whatever the objective
    assert load_config(file).objective.name == "dpo"
    file.write_text("optim: {weight_decay: 0.01}\nreference: {path: r, mode: none}\nmodel: {path: m, tokenizer: t}\n")
    assert load_config(file, ["data.eval_split=dev"]).optim.weight_decay == 0.01


def test_a_group_that_does_not_divide_lists_those_that_do():
    assert "1, 2, 4, 8, 16, 32, 64 or 'global'" in refusal(["--contrast.group=24"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "sections"),
        ("batch: 8\n", "'batch' is a section"),
        ("batch:\n\tpairs: 8\n", "not valid YAML"),
        ("batch:\n  pairs: eight\n", "batch.pairs"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, said):
    file = write_yaml(tmp_path / "a.yaml", text)
    message = refusal(["--config", str(file)])
    assert said in message


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "no.yaml") in refusal([f"--config={tmp_path}/no.yaml"])
    assert "--config" in refusal(["--config"])


def test_presets_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    here = load_config(ALL_CONFIGS / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "configs/quickstart.yaml"):
        config = load_config(name)
        assert config.optim == here.optim
        assert Path(config.data.path).is_file()
        assert Path(config.data.eval_path).name == "quickstart_eval.jsonl"
    assert parse_config(["--config", "quickstart", "--batch.pairs", "8"]).batch.pairs == 8
    own = write_yaml(tmp_path / "quickstart", "batch:\n  pairs: 2\n")
    assert load_config("quickstart").batch.pairs == 2, "a file here is meant before a preset"
    own.unlink()
    assert load_config(None, ["data.path=configs/data/mine.jsonl"]).data.path == "configs/data/mine.jsonl"


def test_a_preset_that_there_is_not_is_answered_with_the_nearest():
    message = refusal(["--config", "qickstart"])
    assert "did you mean the preset quickstart? There are " in message
    assert set(preset_names()) >= {"hh_small", "quickstart", "small_data"}
    assert not any(name.startswith(("compare", "frontier")) for name in preset_names())
    assert "compare_small" in preset_names(studies=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=a.jsonl", "data.mix={b.jsonl: 1}"], "data.mix names the sources"),
        (["data.mix={b.jsonl: 0}"], r"data.mix: the weight 0.* of b.jsonl"),
        (["data.mix={b.jsonl: 1}", "data.eval_rows=5"], "give data.eval_path"),
        (["data.mix={b.jsonl: 1}", "batch.order=sequential"], "use shuffled or related"),
        (["data.mix={b.jsonl: much}"], "data.mix is"),
        (["optim.decay_share=0"], "optim.decay_share"),
    ],
)
def test_mixtures_and_schedules_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, changes)


def test_words_that_are_no_options_are_refused():
    assert "'runs/a'" in refusal(["runs/a"])
    assert "'8'" in refusal(["--batch.pairs=16", "8"])
    assert "batch.pairs" in refusal(["--batch.pairs"])


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("optim", {"name": "adma"}, r"optim\.name=adma is not known; use one of .*adamw"),
        ("data", {"template": "chats"}, r"data\.template=chats is not known; use one of auto, chat"),
        ("contrast", {"group": "globl"}, r"contrast\.group=globl is not known; use one of global"),
    ],
)
def test_a_word_that_no_field_knows_is_refused_in_python_too(section, values, reason):
    wrong = dataclasses.replace(getattr(Config(), section), **values)
    with pytest.raises(ConfigError, match=reason):
        Config(**{section: wrong})


def test_null_takes_a_value_back(tmp_path):
    file = write_yaml(tmp_path / "a.yaml", "contrast:\n  temperature: 0.5\n")
    config = load_config(file, ["contrast.temperature=null", "contrast.perplexity=4"])
    assert (config.contrast.temperature, resolve(config).perplexity) == (None, 4)


def test_the_short_flags():
    assert parse_config(["--resume", "auto"]).run.resume == "auto"
    assert parse_config(["--resume=auto"]).run.resume == "auto"
    assert "run.resume is 'nope'" in refusal(["--resume", "nope"])
    assert parse_config(["--overwrite"]).run.overwrite
    assert parse_config(["--overwrite", "--batch.pairs", "8"]) == parse_config(
        ["--batch.pairs=8", "--run.overwrite=true"]
    )
    assert not parse_config(["--overwrite", "false"]).run.overwrite


def test_columns_are_named_one_by_one_or_in_a_file(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", "data:\n  columns: {prompt: question, chosen: good}\n")
    assert load_config(path, ["data.columns.chosen=best"]).data.columns == {"prompt": "question", "chosen": "best"}
    assert parse_config(["--data.columns.prompt", "question"]).data.columns == {"prompt": "question"}
    assert parse_config(["--data.ignore_columns", "[context, notes]"]).data.ignore_columns == ("context", "notes")
    with pytest.raises(ValueError, match=r"unknown configuration key 'data.column.prompt'"):
        parse_config(["--data.column.prompt", "question"])


def test_what_is_dumped_is_read_back(tmp_path):
    changes = [
        "data.columns.prompt=question",
        "data.ignore_columns=[context]",
        "contrast.group=16",
        "contrast.temperature=0.75",
        "optim.learning_rate=5e-7",
        "model.path=a b: c",
    ]
    config = load_config(None, changes)
    assert load_config(write_yaml(tmp_path / "a.yaml", dump_config(config))) == config
    assert load_config(write_yaml(tmp_path / "b.yaml", dump_config(Config()))) == Config()


def test_known_keys_are_the_dumped_ones():
    dumped = yaml.safe_load(dump_config(Config()))
    assert known_keys() == {f"{section}.{key}": v for section, values in dumped.items() for key, v in values.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_preset_loads_and_says_what_to_expect(path):
    resolve(load_config(path))
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = "\n".join(comment)
    assert f"configs/{path.name}" in text, "the comment on top names the command"
    assert "python -m rpo_jax." in text
    assert "TBD" not in text
    for word in ("Hardware:", "Result:"):
        assert any(line.startswith(word) and len(line) > len(word) + 3 for line in comment), f"{word} is missing"


def test_there_are_presets():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_command_in_a_preset_is_one_that_runs(path, monkeypatch):
    """The variants that a header names (SFT, unpaired) must stay valid, not the file alone."""
    monkeypatch.chdir(path.parents[1])
    comment = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line for line in "\n".join(comment).replace("\\\n", " ").splitlines() if "-m rpo_jax.train" in line]
    assert commands
    for command in commands:
        resolve(parse_config(shlex.split(command)[3:]))


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.name.startswith("paper_")], ids=lambda path: path.name
)
def test_the_papers_presets_hold_its_table_5(path):
    config = load_config(path)
    assert (config.batch.pairs, config.contrast.group) == (64, 8)
    assert (config.contrast.temperature, resolve(config).perplexity) == (0.5, None)
    assert (config.objective.name, config.objective.beta) == ("rpo", 0.1)
    assert (config.data.max_prompt_tokens, config.data.max_tokens) == (256, 512)
    optim = config.optim
    assert (optim.name, optim.learning_rate, optim.warmup_steps, optim.schedule) == ("rmsprop", 5e-7, 150, "constant")
    assert (optim.decay, optim.eps, optim.max_grad_norm, config.train.epochs) == (0.99, 1e-8, 10.0, 1)
    assert config.embedding.encoder.endswith("all-MiniLM-L6-v2")
