"""Which folders can be read, what a hub name does without a hub, and that nothing is written by halves."""

import shutil

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rpo_jax import models
from rpo_jax.core.files import atomic_directory
from rpo_jax.models.huggingface.folders import WEIGHTS_INDEX, some


@pytest.fixture
def tokenizer():
    backend = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    return fast


def test_a_local_folder_is_itself(tmp_path):
    assert models.resolve_folder(tmp_path) == tmp_path
    assert models.resolve_folder(str(tmp_path)) == tmp_path


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no model folder .*/absent; give an existing folder or a hub name"):
        models.resolve_folder(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give the folder that holds"):
        models.resolve_folder(tmp_path / "file")


def test_a_hub_name_without_a_hub_says_to_use_a_local_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no folder org/model, and the Hugging Face hub .* Give a local folder"):
        models.resolve_folder("org/model")


def test_weights_are_fetched_once(monkeypatch, tmp_path):
    """Of repositories as gpt-oss's and Mistral's, which have them in their makers' format too."""
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    others = ["consolidated.safetensors", "original/model.safetensors", "metal/model.bin", "pytorch_model.bin"]
    fetched = []

    def download(name, allow_patterns, ignore_patterns, local_files_only):
        kept = filter_repo_objects([*wanted, *others], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.extend(kept)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("rpo_jax.data.hub.is_reachable", lambda: True)
    models.resolve_folder("org/model")
    assert fetched == wanted


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_to_convert_them(name, hf_folder, tmp_path):
    shutil.copy(hf_folder("llama2") / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(ValueError, match=f"pickled weights .{name}.*AutoModelForCausalLM.*save_pretrained"):
        models.load_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(hf_folder, tmp_path):
    shutil.copy(hf_folder("llama2") / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        models.load_pretrained(tmp_path)


def test_a_truncated_file_is_refused(hf_folder, tmp_path):
    shutil.copy(hf_folder("llama2") / "config.json", tmp_path)
    content = (hf_folder("llama2") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file .*; copy it again"):
        models.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "names 2.safetensors, which is not there"),
        ('{"weight_map": {"a": "1.safetensors", "c": "1.safetensors"}}', "names c, which its files do not hold"),
        ('{"weight_map": {"c": "1.safetensors"}}', "1.safetensors holds 'a', which .* places in None"),
        ('{"weights": {}}', "is not a safetensors index: KeyError: 'weight_map'"),
        ("{", "is not a safetensors index"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(index, message, hf_folder, tmp_path):
    shutil.copy(hf_folder("llama2") / "config.json", tmp_path)
    save_file({"a": np.zeros(2)}, tmp_path / "1.safetensors")
    (tmp_path / WEIGHTS_INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(tmp_path)


@pytest.mark.parametrize("as_folder", [True, False])
def test_tokenizer_and_chat_template_go_along(as_folder, tokenizer, hf_folder, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config, params = models.load_pretrained(hf_folder("llama2"))
    given = tmp_path / "tokenizer" if as_folder else tokenizer
    saved = models.save_pretrained(tmp_path / "out", config, params, tokenizer=given)
    again = AutoTokenizer.from_pretrained(saved)
    assert again("yes no")["input_ids"] == [1, 2]
    assert again.chat_template == tokenizer.chat_template


def test_a_folder_without_tokenizer_is_refused_and_nothing_is_left(hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder("llama2"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        models.save_pretrained(tmp_path / "out", config, params, tokenizer=hf_folder("llama2"))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_overwrite_is_asked(hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder("llama2"))
    target = tmp_path / "out"
    target.mkdir()
    models.save_pretrained(target, config, params)  # an empty folder is as good as none
    (target / "mine").touch()
    with pytest.raises(ValueError, match="out exists; give another folder, or ask to overwrite it"):
        models.save_pretrained(target, config, params)
    assert (target / "mine").exists()
    models.save_pretrained(target, config, params, overwrite=True)
    assert not (target / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_while_writing_keeps_what_was_there(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").touch()

    def fail():
        with atomic_directory(target, overwrite=True) as folder:
            (folder / "half").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_long_lists_of_names_are_shortened():
    assert some(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"
    assert some(["a"]) == "a"
