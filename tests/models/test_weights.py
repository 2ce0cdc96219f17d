"""Folders in and out: equal bytes, equal logits in torch, and every key used exactly once."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from rpo_jax import models
from rpo_jax.config import LoraConfig
from rpo_jax.data.tokenizer import train_tokenizer
from rpo_jax.models import lora
from rpo_jax.tools.exporting import within

from .conftest import CASES, torch_model

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as stored:  # unlike load_file, it reads bfloat16
            tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (not a dict)
    return tensors


def _assert_same_bytes(a: Path, b: Path) -> None:
    first, second = _tensors(a), _tensors(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value.dtype, value.shape) == (second[key].dtype, second[key].shape), key
        assert value.tobytes() == second[key].tobytes(), key


@pytest.mark.parametrize("name", CASES)
def test_load_then_save_gives_equal_bytes_and_torch_gives_equal_logits(name, hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder(name))
    saved = models.save_pretrained(tmp_path / "out", config, params)
    _assert_same_bytes(hf_folder(name), saved)
    again = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch_model(name)(torch.tensor(TOKENS)).logits
        torch.testing.assert_close(again(torch.tensor(TOKENS)).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shard", [None, "30KB", "1KB"])  # of 1 KB many a tensor is more
def test_half_precision_and_shards_survive(dtype, shard, tmp_path):
    half = type(torch_model("qwen3"))(torch_model("qwen3").config).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "in", **({"max_shard_size": shard} if shard else {}))
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == 1 or shard
    config, params = models.load_pretrained(tmp_path / "in")
    assert config.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    limit = {None: 5_000_000_000, "30KB": 30_000, "1KB": 1_000}[shard]
    saved = models.save_pretrained(tmp_path / "out", config, params, max_shard_bytes=limit)
    _assert_same_bytes(tmp_path / "in", saved)
    assert json.loads((saved / "config.json").read_text())["dtype"] == dtype
    if shard:
        files = list(saved.glob("model-*-of-*.safetensors"))
        index = json.loads((saved / "model.safetensors.index.json").read_text())
        assert len(files) > 2
        assert {file.name for file in files} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in _tensors(saved).values())
    reloaded = AutoModelForCausalLM.from_pretrained(saved)
    for key, value in half.state_dict().items():
        torch.testing.assert_close(reloaded.state_dict()[key], value, rtol=0, atol=0)


def test_parameters_in_the_asked_dtype_and_file_in_another(hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder("llama2"), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert config.dtype == "float32"  # that of the folder
    saved = models.save_pretrained(tmp_path / "out", config, params, dtype="float16")
    assert {value.dtype for value in _tensors(saved).values()} == {np.dtype("float16")}


def test_a_new_architecture_on_devices_reaches_torch_with_its_logits(tmp_path):
    config = models.new_config(
        family="qwen3",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=True,
        rope_theta=10_000.0,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    rng = np.random.default_rng(0)
    shapes = models.abstract_params(config)
    params = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape) / 8, jnp.float32), shapes)
    saved = models.save_pretrained(tmp_path / "out", config, params)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(saved)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(models.apply(config, params, jnp.array(TOKENS)), expected, atol=1e-5)


def _with_eyes(family):
    """A tiny model that also sees, whose language model is a text family's."""
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if family == "gemma3":
        # transformers' model with eyes caps no logits, whatever its configuration says; published ones say nothing.
        text = torch_model("gemma3").config.to_dict() | {"model_type": "gemma3_text", "final_logit_softcapping": None}
        vision |= {"image_size": 28, "patch_size": 14}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=[5, 6])
        )
    text = torch_model("mistral").config.to_dict()
    vision |= {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize("named", ["now", "before"])
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_of_a_folder_that_also_sees_the_text_is_used_and_that_is_said(family, named, tmp_path, caplog):
    whole = _with_eyes(family).eval()
    whole.save_pretrained(tmp_path / "in")
    names = load_file(tmp_path / "in" / "model.safetensors")
    if named == "before":  # as transformers 4 wrote them
        names = {re.sub(r"^model\.language_model\.", "language_model.model.", key): x for key, x in names.items()}
        names = {re.sub(r"^model\.", "", key): x for key, x in names.items()}
        names = {re.sub(r"^lm_head", "language_model.lm_head", key): x for key, x in names.items()}
        save_file(names, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    config = models.check_pretrained(tmp_path / "in")
    assert "its text part is used; " in caplog.text
    assert re.search(r"\d\d tensors of its other parts are left out", caplog.text)
    _, params = models.load_pretrained(tmp_path / "in")
    with torch.no_grad():
        expected = whole(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(models.apply(config, params, jnp.array(TOKENS)), expected, atol=1e-4)
    saved = models.save_pretrained(tmp_path / "out", config, params, config=tmp_path / "in")
    alone = AutoModelForCausalLM.from_pretrained(saved)
    assert type(alone).__name__ == models.FAMILIES[config.family].architecture
    with torch.no_grad():
        np.testing.assert_allclose(alone(torch.tensor(TOKENS)).logits.numpy(), expected, atol=1e-4)
    assert models.check_pretrained(saved) == config


# peft asks transformers for a name that it has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_adapters_of_a_folder_that_also_sees_are_of_its_language_model(family, tmp_path):
    whole = _with_eyes(family).eval()
    whole.save_pretrained(tmp_path / "in")
    config, params = models.load_pretrained(tmp_path / "in")
    settings = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    shapes, rng = lora.abstract_adapters(config, settings), np.random.default_rng(1)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 8, shapes)
    expected = np.asarray(models.apply(config, lora.merge(config, params, adapters, settings), jnp.array(TOKENS)))
    train_tokenizer(["a"], 300, tmp_path / "tokenizer")
    saved = models.Policy(config, settings).save_adapter(
        tmp_path / "out", adapters, base=str(tmp_path / "in"), within=within(config, str(tmp_path / "in")),
        tokenizer=tmp_path / "tokenizer",
    )  # fmt: skip
    with torch.no_grad():
        plain = whole(torch.tensor(TOKENS)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(whole, saved)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(adapted, expected, atol=1e-4)
    assert np.max(np.abs(plain - expected)) > 0.05
    alone = models.save_pretrained(tmp_path / "text", config, params)
    assert within(config, str(alone)) is None
    # Where nobody else needs the base, it is changed where it lies.
    merged = lora.merge(config, params, adapters, settings, in_place=True)
    assert all(map(np.shares_memory, jax.tree.leaves(merged), jax.tree.leaves(params)))
    np.testing.assert_allclose(models.apply(config, merged, jnp.array(TOKENS)), expected, atol=1e-5)


def _rewrite(source: Path, target: Path, change) -> Path:
    """A copy of a folder whose tensors `change` has edited."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "llama2",
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"do not fit its config.json .llama, 3 layers.: the folder lacks model.layers.1.mlp.up_proj.weight\.",
        ),
        (
            "llama2",
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"]}),
            "holds model.layers.3.mlp.up_proj.weight, which nothing uses",
        ),
        (
            "llama2",
            lambda t: t.update({"model.embed": t.pop("model.embed_tokens.weight")}),
            "lacks model.embed_tokens.weight and holds model.embed, which",
        ),
        ("llama2", lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            "qwen3",
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((64, 63), np.float32)}),
            r"k_proj.weight in .* has shape \(64, 63\); .*config.json implies \(64, 64\)",
        ),
        (
            "llama2",
            lambda t: t.update({"model.norm.weight": np.zeros(64, np.int8)}),
            "model.norm.weight in .* has dtype I8; supported are F32, BF16, F16",
        ),
        (
            "qwen2 tied",
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from model.embed_tokens.weight; set tie_word_embeddings to false",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_key(case, change, message, hf_folder, tmp_path):
    folder = _rewrite(hf_folder(case), tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(folder)


def test_the_check_alone_finds_what_does_not_fit(hf_folder, tmp_path):
    assert models.check_pretrained(hf_folder("llama2")) == models.load_pretrained(hf_folder("llama2"))[0]
    folder = _rewrite(hf_folder("llama2"), tmp_path / "changed", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        models.check_pretrained(folder)


def test_derived_buffers_and_an_equal_tied_head_are_tolerated(hf_folder, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    folder = _rewrite(hf_folder("qwen2 tied"), tmp_path / "changed", change)
    _, params = models.load_pretrained(folder)
    _, expected = models.load_pretrained(hf_folder("qwen2 tied"))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_mixed_dtypes_are_saved_without_loss(hf_folder, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    config, _ = models.load_pretrained(_rewrite(hf_folder("llama2"), tmp_path / "changed", change))
    assert config.dtype == "float32"


def test_parameters_of_another_architecture_and_unknown_dtypes_are_refused(hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder("llama2"))
    with pytest.raises(ValueError, match=r"Parameter embed has shape \(5, 64\); .* implies \(97, 64\)"):
        models.save_pretrained(tmp_path / "out", config, params | {"embed": np.zeros((5, 64))})
    with pytest.raises(ValueError, match="dtype='int8' is not known; use one of float32, bfloat16, float16"):
        models.save_pretrained(tmp_path / "out", config, params, dtype="int8")
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        models.load_pretrained(hf_folder("llama2"), dtype="int8")
    assert not list(tmp_path.iterdir())


def test_generation_config_is_derived_given_or_copied(hf_folder, tmp_path):
    config, params = models.load_pretrained(hf_folder("llama3"))

    def written(name, **arguments):
        saved = models.save_pretrained(tmp_path / name, config, params, **arguments)
        return json.loads((saved / "generation_config.json").read_text())

    assert written("derived")["eos_token_id"] == [2, 3]
    assert written("given", generation_config={"max_new_tokens": 7})["max_new_tokens"] == 7
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "generation_config.json").write_text('{"top_k": 3}')
    assert written("copied", generation_config=tmp_path / "source") == {"top_k": 3, "eos_token_id": [2, 3]}
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [5, 3, 2]}')
    assert written("more", generation_config=tmp_path / "source", end_ids={5, 4}) == {"eos_token_id": [5, 3, 2, 4]}
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be a token's number or a list"):
        written("named", generation_config=tmp_path / "source")
