"""What a user can get wrong: one line that says what, where and how to mend it, before anything compiles."""

import json
import shutil

import jax
import numpy as np
import pytest

from rpo_jax import models, train
from rpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rpo_jax.sampling.policy import find_policy
from rpo_jax.tools.judging.local import RewardJudge
from rpo_jax.tools.planning.workload import planned_model
from rpo_jax.training.prepare import look_alike
from tests.runs import configured, preference_rows, settings, write_rows
from tests.worlds import small_model

COMPILATIONS: list[str] = []


def _note(event: str, *_args, **_details) -> None:
    if "backend_compile" in event:
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


class Place:
    """Files and model folders, sound and broken, and runs to come."""

    def __init__(self, folder):
        self.folder = folder
        self.data = write_rows(folder / "pairs.jsonl")
        self.run_dir = folder / "run"

    def file(self, name, text):
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def copy_of_model(self, name):
        target = self.folder / name
        return shutil.copytree(self.model, target)

    @property
    def model(self):
        return self.folder / "model"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("bad"))
    texts = [text for row in preference_rows() for text in row.values()]
    train_tokenizer(texts, 300, made.folder / "tokenizer")
    model_config = small_model(vocab_size=320)
    params = models.init_params(model_config, jax.random.key(0))
    models.save_pretrained(made.model, model_config, params, tokenizer=made.folder / "tokenizer")
    return made


@pytest.fixture(scope="module")
def finished(place):
    """A run of one step."""
    config = configured(place.data, place.folder / "finished", place.folder / "cache", {**QUICK, "train.steps": 1})
    return train.run(config).run_dir


QUICK = {"contrast.weights": "uniform", "tracking.tensorboard": False, "data.eval_rows": 0}


@pytest.fixture
def refused(place, capsys):
    """refused(changes) -> the one line that the command ends with; nothing was compiled, nothing made."""

    def run(changes, run_dir=None, *, flags=()):
        run_dir = run_dir or place.run_dir
        before, compiled = sorted(place.folder.rglob("*")), len(COMPILATIONS)
        options = settings(place.data, run_dir, place.folder / "cache", {**QUICK, **changes})
        status = train.main([*(f"--{option}" for option in options), *flags])
        error = capsys.readouterr().err
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert len(COMPILATIONS) == compiled, "something was compiled"
        assert sorted(place.folder.rglob("*")) == before, "something was written"
        return error

    return run


def test_compilations_are_counted():
    before = len(COMPILATIONS)
    jax.jit(lambda x: x * 3 + len(COMPILATIONS))(1.0)
    assert len(COMPILATIONS) > before


def test_a_missing_file(refused, place):
    assert str(place.folder / "no.jsonl") in refused({"data.path": place.folder / "no.jsonl"})
    assert "data.path is not set" in refused({"data.path": "null"})


def test_an_empty_file(refused, place):
    path = place.file("empty.jsonl", "")
    error = refused({"data.path": path})
    assert str(path) in error
    assert "empty" in error


def test_a_broken_line(refused, place):
    good = json.dumps(preference_rows(1)[0])
    path = place.file("broken.jsonl", f'{good}\n{{"prompt": "a", \n{good}\n')
    error = refused({"data.path": path})
    assert f"{path}:2: broken JSON" in error
    assert "data.on_bad_row: skip" in error


def test_wrong_columns(refused, place):
    path = place.file("columns.jsonl", '{"question": "a", "good": "b", "bad": "c"}\n')
    error = refused({"data.path": path})
    assert "question, good, bad" in error
    assert "data.layout" in error


def test_broken_held_out_data(refused, place):
    path = place.file("broken_eval.jsonl", "not json\n")
    assert f"{path}:1" in refused({"data.eval_path": path})


def test_a_folder_of_others_that_holds_a_config_yaml_is_no_run(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    (tmp_path / "notes.txt").write_text("mine")
    for changes in ({}, {"run.resume": "auto"}, {"run.overwrite": True}):
        assert "is not empty and holds no run" in refused({"run.dir": tmp_path} | changes)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_layout(refused):
    error = refused({"data.layout": "preferance"})
    assert "did you mean 'preference'?" in error


def test_a_prompt_limit_that_leaves_nothing_for_a_response(refused):
    error = refused({"data.max_prompt_tokens": 120, "data.max_tokens": 120})
    assert "data.max_prompt_tokens=120" in error
    assert "data.max_tokens=120" in error


def test_a_row_that_is_too_short_for_the_data(refused):
    error = refused({"batch.row_tokens": 8})
    assert "batch.row_tokens=8" in error
    assert "pairs.jsonl:" in error


def test_a_vocabulary_that_cannot_hold_all_bytes(refused):
    assert "vocab_size=100" in refused({"model.vocab_size": 100})


def test_held_out_rows_that_leave_nothing_to_train_on(refused):
    error = refused({"data.eval_rows": 32})
    assert "data.eval_rows=32" in error
    assert "32 usable examples" in error


def test_a_batch_that_the_mesh_does_not_divide(refused):
    error = refused({"batch.pairs": 12})
    assert "batch.pairs=12" in error
    assert "use a multiple of 8" in error
    assert "batch.micro_rows=4" in refused({"batch.micro_rows": 4})


def test_a_mesh_that_does_not_multiply_out(refused):
    error = refused({"mesh.data": 3})
    assert "mesh.data=3" in error
    assert "8 devices" in error
    assert "mesh.tensor=3" in refused({"mesh.tensor": 3})
    assert "mesh.expert=2 shares the experts of a layer, and the llama model has none" in refused({"mesh.expert": 2})
    assert "router_aux_loss_coef=0.1 weighs" in refused({"model.router_aux_loss_coef": 0.1})


def test_a_group_that_does_not_divide_the_batch(refused):
    error = refused({"contrast.group": 3})
    assert "contrast.group=3" in error
    assert "1, 2, 4, 8 or 'global'" in error


@pytest.mark.parametrize("weights", ["diagonal", "pair"])
def test_weights_that_need_pairs_with_unpaired_data(refused, weights):
    error = refused({"contrast.weights": weights, "data.pairing": "unpaired"})
    assert f"contrast.weights={weights}" in error
    assert "data.pairing=paired" in error


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo", "slic", "aot"])
def test_an_objective_that_needs_pairs_with_unpaired_data(refused, name):
    error = refused({"objective.name": name, "contrast.weights": "null", "data.pairing": "unpaired"})
    assert f"objective.name={name}" in error
    assert "data.pairing" in error


def test_pairs_from_data_without_them(refused, place):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in preference_rows()]
    path = write_rows(place.folder / "only_good.jsonl", rows)
    assert "data.pairing: unpaired" in refused({"data.path": path})
    assert "rejected" in refused({"data.path": path, "data.pairing": "unpaired"})


def test_an_unknown_objective(refused):
    assert "did you mean 'kto'?" in refused({"objective.name": "ktoo"})


def test_an_override_that_the_objective_has_no_place_for(refused):
    assert "'kto' takes no weights" in refused({"objective.name": "kto"})


@pytest.mark.parametrize(
    "settings",
    [
        {"objective.name": "rpo_nce", "contrast.weights_on": "loss"},
        {"objective.name": "rpo_nce", "contrast.weights": "diagonal", "contrast.diagonal_on": "loss"},
        {"objective.name": "kto", "contrast.weights": "null", "contrast.weights_on": "loss"},
    ],
)
def test_weights_on_losses_that_no_entry_has(refused, settings):
    key = next(key for key, value in settings.items() if value == "loss")
    assert f"{key}=loss weights the losses of entries" in refused(settings)


def test_an_unknown_key(refused):
    assert "did you mean contrast.temperature?" in refused({"contrast.temprature": 0.5})


def test_a_value_of_the_wrong_type(refused):
    assert "batch.pairs" in refused({"batch.pairs": "many"})


def test_a_configuration_that_is_not_there(capsys, tmp_path):
    assert train.main(["--config", str(tmp_path / "no.yaml")]) == 2
    assert str(tmp_path / "no.yaml") in capsys.readouterr().err


def test_a_model_folder_that_is_not_there(refused, place):
    assert str(place.folder / "nowhere") in refused({"model.path": place.folder / "nowhere"})


def test_a_model_folder_without_a_tokenizer(refused, place):
    folder = place.copy_of_model("no_tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    error = refused({"model.path": folder})
    assert str(folder) in error
    assert "no tokenizer" in error


def test_a_tokenizer_that_is_not_there(refused, place):
    assert str(place.folder / "nowhere") in refused({"model.tokenizer": place.folder / "nowhere"})


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")


def test_an_unknown_architecture(refused, place):
    folder = place.copy_of_model("unknown_architecture")
    change_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    error = refused({"model.path": folder})
    assert "GPT2LMHeadModel" in error
    assert "known families: " in error
    assert " llama, " in error
    assert "model.family=gpt2" in refused({"model.family": "gpt2"})


def test_pickled_weights(refused, place):
    folder = place.copy_of_model("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused({"model.path": folder})
    assert "pytorch_model.bin" in error
    assert "save_pretrained" in error


def test_weights_of_another_size(refused, place):
    folder = place.copy_of_model("another_size")
    change_config(folder, intermediate_size=64)
    error = refused({"model.path": folder})
    assert "has shape" in error
    assert str(folder) in error


def test_weights_cut_short(refused, place):
    folder = place.copy_of_model("cut_short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a complete safetensors file" in refused({"model.path": folder})


def test_a_tokenizer_that_is_larger_than_its_model(refused, place):
    folder = place.folder / "small_vocabulary"
    model_config = small_model(vocab_size=64)
    params = models.init_params(model_config, jax.random.key(0))
    models.save_pretrained(folder, model_config, params, tokenizer=place.folder / "tokenizer")
    error = refused({"model.path": folder})
    assert "300 tokens" in error
    assert "64" in error


def test_a_special_token_for_which_the_model_has_no_row(refused, place, tmp_path):
    """As the one for images, id 262144, beside the 262144 rows of Gemma 3 1B."""
    folder = place.copy_of_model("one_more_token")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<image{number}>" for number in range(21)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert max(load_tokenizer(folder).get_vocab().values()) == models.check_pretrained(folder).vocab_size == 320
    find_policy(str(folder))
    rows = preference_rows(8)
    fine, used = (write_rows(tmp_path / name, rows) for name in ("fine.jsonl", "used.jsonl"))
    rows[5]["prompt"] += " <image20>"
    used = write_rows(tmp_path / "used.jsonl", rows)
    error = refused({"model.path": folder, "data.path": used})
    assert f"error: {used}:6: the text has '<image20>', token 320, and the model has no more than 320; mend" in error
    # What a template writes stands in every prompt.
    tokenizer.chat_template = "<image20>" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    assert "has 321 tokens, its model only 320" in refused({"model.path": folder, "data.path": fine})


def test_a_tokenizer_without_its_model_s_special_tokens(refused, place):
    folder = place.copy_of_model("other_special_tokens")
    change_config(folder, eos_token_id=[2, 310])
    error = refused({"model.path": folder})
    assert f"The tokenizer in {folder} has no token 310, which config.json there gives as eos_token_id" in error
    with pytest.raises(ValueError, match="has no token 310"):
        find_policy(str(folder))
    change_config(folder, eos_token_id=2, bos_token_id=-1, pad_token_id=310)
    assert find_policy(str(folder)).end_ids == {2}


def test_gguf_is_named_with_the_command_that_converts_it(refused, place):
    """As a file of whatever name, or as a folder of such files, wherever a model is given."""
    folder = place.folder / "quantized"
    folder.mkdir(exist_ok=True)
    file = folder / "tea.Q4_0.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    named = place.folder / "blob"
    named.write_bytes(file.read_bytes())
    described = place.copy_of_model("described")  # config.json and tokenizer, the weights as GGUF
    (described / "model.safetensors").rename(described / "model.gguf")
    for given in (folder, file, named, described):
        for key in ("model.path", "reference.path", "model.tokenizer"):
            if (given, key) == (described, "model.tokenizer"):
                continue
            error = refused({key: given})
            assert "is GGUF, llama.cpp's format" in error
            assert "gguf_file=" in error
        with pytest.raises(ValueError, match=r"is GGUF.*python -c \"from transformers import"):
            find_policy(str(given))
    for name in (str(file), str(folder)):
        with pytest.raises(ValueError, match="is GGUF"):
            planned_model(configured(place.data, place.run_dir, place.folder, {"model.path": name}), None)
        with pytest.raises(ValueError, match="is GGUF"):
            RewardJudge(name)
    assert f"save_pretrained('{folder}/tea.Q4_0')" in refused({"model.path": file})


def test_an_adapter_and_a_run_are_no_models_yet(refused, place, finished):
    adapter = place.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "is an adapter without its base; merge it first, by peft's AutoPeft" in refused({"model.path": adapter})
    assert f"is a run; first python -m rpo_jax.export --run {finished} --out" in refused({"model.path": finished})


def test_held_out_rows_of_a_sorted_file(refused, place):
    rows = [{"prompt": f"p{i}", "completion": "a", "label": i > 2} for i in range(10)]
    file = place.file("sorted.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    kto = {"objective.name": "kto", "contrast.weights": "null", "data.pairing": "unpaired"}
    error = refused({**kto, "data.path": file, "data.eval_rows": 4})
    assert "Held-out data (the last data.eval_rows=4 of the data; shuffle it, or give data.eval_path): None of" in error


def test_texts_that_an_encoder_cannot_tell_apart():
    same, other = np.array([0.6, 0.8]), np.array([1.0, 0.0])
    assert look_alike(["a", "b", "c", "a"], [same, same + 1e-7, other, same]) == 2
    assert look_alike(["a", "a"], [same, same]) == 0


def test_a_reference_with_a_smaller_vocabulary(refused, place):
    folder = place.folder / "small_reference"
    model_config = small_model(vocab_size=64)
    models.save_pretrained(folder, model_config, models.init_params(model_config, jax.random.key(0)))
    error = refused({"model.path": place.model, "reference.path": folder})
    assert "reference.path=" in error
    assert "64 tokens" in error


def test_a_reference_with_another_vocabulary(refused, place):
    folder = place.copy_of_model("other_vocabulary")
    train_tokenizer(["Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."] * 9, 300, folder)
    error = refused({"model.path": place.model, "reference.path": folder})
    assert str(folder) in error
    assert "another vocabulary" in error


def test_a_reference_that_is_not_there(refused, place):
    assert str(place.folder / "nowhere") in refused({"reference.path": place.folder / "nowhere"})


def test_an_encoder_that_is_not_there(refused, place):
    error = refused({"contrast.weights": "embedding", "embedding.encoder": place.folder / "nowhere"})
    assert str(place.folder / "nowhere") in error


def test_a_dashboard_that_is_not_installed(refused, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    assert "run `pip install wandb`" in refused({"tracking.wandb": True})


def test_a_run_folder_that_holds_a_run(refused, finished):
    error = refused({}, finished)
    assert str(finished) in error
    assert "--resume auto" in error
    assert "--overwrite" in error


@pytest.mark.parametrize("flags", [(), ("--resume", "auto"), ("--overwrite",)])
def test_a_folder_of_something_else_is_never_touched(refused, place, flags):
    folder = place.folder / "thesis"
    folder.mkdir(exist_ok=True)
    (folder / "chapter1.txt").write_text("years of work", encoding="utf-8")
    assert str(folder) in refused({}, folder, flags=flags)


def test_a_run_folder_that_cannot_be_made(refused, place):
    file = place.file("a_file", "text")
    assert f"{file} is no folder to write to" in refused({}, file)
    assert f"{file} is no folder to write to" in refused({}, file / "run")


def test_a_checkpoint_of_another_architecture(refused, finished):
    error = refused({"model.num_layers": 3}, finished, flags=("--resume", "auto"))
    assert "num_layers is 2 there and 3 in this configuration" in error
    assert str(finished) in error


def test_a_checkpoint_of_another_optimizer(refused, finished):
    error = refused({"optim.name": "adamw"}, finished, flags=("--resume", "auto"))
    assert "optim.name=rmsprop, not of adamw" in error


def test_resume_and_overwrite_at_once(refused, finished):
    assert "contradict" in refused({}, finished, flags=("--resume", "auto", "--overwrite"))


def test_an_input_inside_the_folder_that_is_replaced(refused, finished):
    error = refused({"model.path": finished / "model"}, finished, flags=("--overwrite",))
    assert f"model.path={finished / 'model'} lies in run.dir={finished}" in error
