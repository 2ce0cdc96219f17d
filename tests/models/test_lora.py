"""Adapters against merged weights, int8 against its own rounding, and folders against peft."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from rpo_jax import models
from rpo_jax.config import LoraConfig, MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.models.projection import Quantized, project
from rpo_jax.models.quantization import ROUNDED
from tests.worlds import quantized, small_model

# peft asks transformers for a name that it has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Of patterns that it makes itself for experts' adapters, which are parameters, no modules: it does use them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

LORA = LoraConfig(rank=3, alpha=12.0)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9))
LORA_TARGETS = tuple(models.FAMILIES["llama"].lora_targets)
FAMILIES = ("llama3", "mistral", "qwen2 tied", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "qwen3 moe", "gpt_oss")


def random_adapters(model_config, config=LORA, seed=1):
    """Adapters whose b is not zero either."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    shapes = lora.abstract_adapters(model_config, config)
    return jax.tree.map(lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), shapes)


def loss(model_config, params):
    """Nonlinear in every logit."""
    return jnp.sum(jnp.tanh(models.apply(model_config, params, TOKENS)))


def host(params):
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def world(request):
    """An architecture, its weights, and adapters on all targets."""
    model_config = small_model(family=request.param)
    return model_config, models.init_params(model_config, jax.random.key(0)), random_adapters(model_config)


def test_adapters_beside_the_base_are_the_merged_weights(world):
    model_config, base, adapters = world
    merged = lora.merge(model_config, base, adapters, LORA)
    got = models.apply(model_config, lora.combine(base, adapters, LORA), TOKENS)
    np.testing.assert_allclose(got, models.apply(model_config, merged, TOKENS), rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(got - models.apply(model_config, base, TOKENS))) > 0.05


def test_their_gradient_is_the_chain_rule_on_the_merged_weights(world):
    """d/db = s a^T G and d/da = s G b^T, with G the gradient by W' = W + s a b."""
    model_config, base, adapters = world
    merged = lora.merge(model_config, base, adapters, LORA)
    full = flatten_dict(jax.grad(functools.partial(loss, model_config))(merged))
    got = flatten_dict(jax.grad(lambda x: loss(model_config, lora.combine(base, x, LORA)))(adapters))
    pairs, scale = flatten_dict(adapters), LORA.alpha / LORA.rank
    for path, _, layers, inputs, outputs in lora.projections(model_config).values():
        a, b = pairs[(*path[:-1], "lora_a")], pairs[(*path[:-1], "lora_b")]
        sizes = layers["layers"], int(np.prod(list(inputs.values()))), int(np.prod(list(outputs.values())))
        by_weight = full[path].reshape(sizes)
        a2, b2 = a.reshape(sizes[0], sizes[1], -1), b.reshape(sizes[0], -1, sizes[2])
        for name, expected in (
            ("lora_a", scale * jnp.einsum("lio,lro->lir", by_weight, b2).reshape(a.shape)),
            ("lora_b", scale * jnp.einsum("lir,lio->lro", a2, by_weight).reshape(b.shape)),
        ):
            found = got[(*path[:-1], name)]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(expected))))
            assert float(jnp.max(jnp.abs(expected))) > 1e-3
    assert len(got) == 2 * len(LORA_TARGETS)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "int8", "nf4"])
def test_new_adapters_are_the_base_exactly(base_dtype):
    model_config = small_model(hidden_size=64, intermediate_size=128)
    params = models.init_params(model_config, jax.random.key(0))
    base = quantized(model_config, params, base_dtype) if base_dtype in ROUNDED else _cast(params, base_dtype)
    new = lora.init_adapters(model_config, LORA, jax.random.key(2))
    off, on = (models.apply(model_config, tree, TOKENS) for tree in (base, lora.combine(base, new, LORA)))
    np.testing.assert_array_equal(off, on)


def _cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def test_new_adapters_are_distributed_as_peft_s():
    model_config = small_model()
    new = flatten_dict(lora.init_adapters(model_config, LoraConfig(rank=64), jax.random.key(0)))
    layer = torch.nn.Linear(48, 64, bias=False)
    torch.nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
    ours = np.asarray(new[("layers", "mlp", "down", "lora_a")])
    bound = 48**-0.5
    for values in (ours, layer.weight.detach().numpy()):
        assert 0.98 * bound < np.max(np.abs(values)) <= bound
        assert np.std(values) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not np.array_equal(ours[0], ours[1]), "layers differ"
    assert all(not leaf.any() for path, leaf in new.items() if path[-1] == "lora_b")


def test_only_the_targets_get_adapters():
    model_config = small_model()
    config = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    paths = {path[1:] for path in flatten_dict(lora.abstract_adapters(model_config, config))}
    assert paths == {(*place, f"lora_{x}") for place in (("attention", "query"), ("mlp", "down")) for x in "ab"}
    assert tuple(lora.projections(model_config)) == LORA_TARGETS == LoraConfig().targets


def test_int8_rounds_to_the_nearest_step_of_its_channel(tmp_path):
    model_config = small_model()
    params = host(models.init_params(model_config, jax.random.key(0)))
    params["layers"]["mlp"]["down"]["kernel"] = np.array(params["layers"]["mlp"]["down"]["kernel"])
    params["layers"]["mlp"]["down"]["kernel"][1, :, 5] = 0.0
    params["layers"]["mlp"]["down"]["kernel"][0, :, 7] *= 1e4  # an outlier in one channel leaves the others alone
    models.save_pretrained(tmp_path / "base", model_config, params)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: here, lora.abstract_base(model_config, "int8"))
    base = flatten_dict(host(models.load_sharded(tmp_path / "base", places, "int8")))
    for path, _, layers, inputs, outputs in lora.projections(model_config).values():
        kernel, (values, scale) = flatten_dict(params)[path], base[path]
        assert values.dtype == np.int8
        assert scale.dtype == np.float32
        assert scale.shape == tuple((layers | outputs).values())
        step = scale.reshape(scale.shape[:1] + (1,) * len(inputs) + scale.shape[1:])
        assert np.all(np.abs(values * step - kernel) <= 0.5001 * step)
        assert np.all(np.max(np.abs(values), axis=tuple(range(1, 1 + len(inputs)))) >= 127 * (scale != 1))
    assert not base[("layers", "mlp", "down", "kernel")].values[1, :, 5].any()
    assert base[("embed",)].dtype == base[("head",)].dtype == np.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_an_int8_product_is_that_of_the_rounded_weights(dtype, tolerance):
    rng = np.random.default_rng(0)
    kernel = Quantized(rng.integers(-127, 128, (4, 8, 16)).astype(np.int8), rng.random(16, np.float32) / 100)
    x = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), dtype)
    wide = jnp.asarray(kernel.values * kernel.scale, jnp.float32)

    def narrow(x):
        return project(x, kernel, 2).astype(jnp.float32)

    expected, expected_vjp = jax.vjp(lambda x: jnp.tensordot(x.astype(jnp.float32), wide, axes=2), x)
    got, vjp = jax.vjp(narrow, x)
    np.testing.assert_allclose(got, expected, atol=tolerance * float(jnp.max(jnp.abs(expected))))
    for found, wanted in zip(vjp(expected), expected_vjp(expected), strict=True):
        wanted = wanted.astype(jnp.float32)
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=tolerance * float(jnp.max(jnp.abs(wanted))))


def test_the_backward_pass_keeps_no_wide_copy_of_narrow_weights():
    """Few tokens, so that the weights of all layers would show in the memory that a gradient takes."""
    model_config = small_model(num_layers=16, hidden_size=64, intermediate_size=256)
    adapters = lora.abstract_adapters(model_config, LORA)
    gradient = jax.jit(jax.grad(lambda x, base: loss(model_config, lora.combine(base, x, LORA))))
    bases = {dtype: lora.abstract_base(model_config, dtype) for dtype in ("float32", "bfloat16", "int8", "nf4")}
    kept = {dtype: "f32[16,64,256]" in str(jax.make_jaxpr(gradient)(adapters, base)) for dtype, base in bases.items()}
    assert kept == {dtype: dtype == "float32" for dtype in bases}, "the wide base itself is what is kept"

    def temporary(dtype):
        return gradient.lower(adapters, bases[dtype]).compile().memory_analysis().temp_size_in_bytes

    # Not bfloat16's: on CPUs, which do not compute with it, XLA widens all of it ahead of the scan.
    layers_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(bases["float32"]["layers"]))
    for dtype in ("int8", "nf4"):
        assert temporary(dtype) - temporary("float32") < 0.25 * layers_bytes, dtype


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "int8"])
def test_a_base_is_loaded_as_it_is_described_and_split(base_dtype, hf_folder):
    folder = hf_folder("qwen3")
    model_config = models.check_pretrained(folder)
    shapes, axes = (f(model_config, base_dtype) for f in (lora.abstract_base, lora.base_axes))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    base = models.load_sharded(folder, sharding.parameter_shardings(mesh, axes, shapes), base_dtype)
    described = jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), base) == described
    kernel = flatten_dict(base)[("layers", "mlp", "up", "kernel")]
    for leaf, spec in zip(jax.tree.leaves(kernel), ((None, "fsdp", "tensor"), (None, "tensor")), strict=False):
        assert tuple(leaf.sharding.spec) == spec
    assert len(jax.tree.leaves(kernel)) == (2 if base_dtype == "int8" else 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers import models as vocabularies

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {f"t{i}": i for i in range(97)}
    made = Tokenizer(vocabularies.WordLevel(vocabulary, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("every", [None, 3], ids=["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_folder_with_equal_logits_and_merging_gives_them_too(
    family, every, hf_folder, tokenizer, tmp_path
):
    folder = hf_folder(family)
    model_config, params = models.load_pretrained(folder)
    config = LoraConfig(rank=3, alpha=4.5, targets=tuple(lora.projections(model_config))[::every])
    adapters = host(random_adapters(model_config, config))
    expected = models.apply(model_config, lora.combine(params, adapters, config), TOKENS)

    saved = lora.save_adapter(
        tmp_path / "adapter", model_config, adapters, config, base=str(folder), tokenizer=tokenizer
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = torch_logits(base)
    np.testing.assert_allclose(torch_logits(peft.PeftModel.from_pretrained(base, saved)), expected, atol=1e-4)

    merged = models.save_pretrained(
        tmp_path / "merged", model_config, lora.merge(model_config, params, adapters, config), tokenizer=tokenizer
    )
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    np.testing.assert_allclose(torch_logits(whole), expected, atol=1e-4)
    assert np.max(np.abs(plain - expected)) > 0.05


def test_an_adapter_folder_says_what_peft_would_and_is_written_whole(hf_folder, tokenizer, tmp_path, monkeypatch):
    folder = hf_folder("llama3")
    model_config = models.check_pretrained(folder)
    adapters = host(random_adapters(model_config))
    write = functools.partial(lora.save_adapter, model_config=model_config, adapters=adapters, lora=LORA)
    saved = write(tmp_path / "a", base=str(folder), tokenizer=tokenizer, dtype="bfloat16")
    ours = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = peft.LoraConfig(r=3, lora_alpha=12, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM").to_dict()
    assert {key: theirs[key] for key in ours.keys() - {"base_model_name_or_path", "target_modules"}} == {
        **{key: ours[key] for key in ours.keys() - {"base_model_name_or_path", "target_modules"}},
        "inference_mode": False,
    }
    assert set(ours["target_modules"]) == set(LORA_TARGETS)
    alone = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)  # finds its base itself
    expected = models.apply(
        model_config,
        lora.combine(models.load_pretrained(folder)[1], _cast(_cast(adapters, "bfloat16"), "float32"), LORA),
        TOKENS,
    )
    np.testing.assert_allclose(torch_logits(alone), expected, atol=1e-4)
    assert (saved / "tokenizer.json").is_file()

    with pytest.raises(ValueError, match="exists"):
        write(tmp_path / "a", base=str(folder), tokenizer=tokenizer)
    monkeypatch.setattr("safetensors.numpy.save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "b", base=str(folder), tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_adapters_that_peft_cannot_join_are_refused(hf_folder, tokenizer, tmp_path):
    model_config, config = models.check_pretrained(hf_folder("mixtral")), LoraConfig(rank=2, targets=("q_proj", "w1"))
    adapters = host(random_adapters(model_config, config))
    with pytest.raises(ValueError, match=r"PEFT joins the adapters of an expert's w1 and w3, and here only w1 has one"):
        lora.save_adapter(tmp_path / "out", model_config, adapters, config, base="base", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
