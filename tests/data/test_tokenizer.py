import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpo_jax.data.tokenizer import (
    DEFAULT_CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    load_tokenizer,
    padding_id,
    tokenizer_fingerprint,
    train_tokenizer,
)

from .conftest import TEXTS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello {{ there }}"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "More\n"},
]
RENDERED = "<|system|>\nBe brief.\n<|user|>\nHello {{ there }}\n<|assistant|>\nHi.\n<|user|>\nMore\n\n<|assistant|>\n"


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_one_token_each(tokenizer):
    assert tokenizer("".join(SPECIAL_TOKENS), add_special_tokens=False)["input_ids"] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_padding_token_without_a_row_pads_nothing(tokenizer):
    assert padding_id(tokenizer, len(tokenizer)) == tokenizer.pad_token_id
    assert padding_id(tokenizer, tokenizer.pad_token_id) == tokenizer.eos_token_id


def test_other_programs_see_what_training_saw(tokenizer):
    """Text gets BOS by default, and so does a rendered conversation, to which they add no special tokens."""
    hello = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer("Hello")["input_ids"] == [tokenizer.bos_token_id, *hello]
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == "<s>" + RENDERED
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_same_texts_give_the_same_files(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        train_tokenizer(iter(TEXTS), 320, folder)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert sorted(tmp_path.iterdir()) == folders


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.chat_template == DEFAULT_CHAT_TEMPLATE
    assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def test_the_fingerprint_sees_what_changes_ids_and_nothing_else(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    copy = load_tokenizer(tmp_path / "saved")
    fingerprint = tokenizer_fingerprint(copy)
    copy(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(copy) == fingerprint

    copy.chat_template = "{{ messages }}"
    other_template = tokenizer_fingerprint(copy)
    copy.chat_template = DEFAULT_CHAT_TEMPLATE
    copy.eos_token = "<pad>"
    other_eos = tokenizer_fingerprint(copy)
    other_vocabulary = tokenizer_fingerprint(train_tokenizer(TEXTS, 300, tmp_path / "other"))
    assert len({fingerprint, other_template, other_eos, other_vocabulary}) == 4


def test_a_vocabulary_too_small_for_all_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=100 .* use 262 or more"):
        train_tokenizer(TEXTS, 100, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"holds no tokenizer \(none of tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'nobody/nothing' is neither a local folder nor in the local hub cache"):
        load_tokenizer("nobody/nothing")


def test_the_local_hub_cache_is_used(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--something"
    tokenizer.save_pretrained(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert tokenizer_fingerprint(load_tokenizer("someone/something")) == tokenizer_fingerprint(tokenizer)
    shutil.rmtree(repository)
    with pytest.raises(ValueError, match="neither a local folder"):
        load_tokenizer("someone/something")
