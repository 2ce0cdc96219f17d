"""Configurations translate both ways, older keys load, and what is not supported is refused by name."""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rpo_jax import models
from rpo_jax.models.huggingface.configuration import to_transformers
from rpo_jax.tools.planning.arithmetic import StepSizes, step_flops

from .conftest import CASES, LLAMA3_ROPE, torch_model
from .public_configs import PUBLIC

OLDEST = {"llama", "mistral", "qwen2", "qwen3"}  # their folders have been read since the first day
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def _write(folder, **changes):
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_configuration_survives_both_ways(name, hf_folder, tmp_path):
    config = models.read_config(hf_folder(name))
    to_transformers(config, "float32").save_pretrained(tmp_path)
    assert models.read_config(tmp_path) == config
    assert hash(config) == hash(models.read_config(tmp_path))


def test_every_family_is_among_the_cases():
    assert {torch_model(name).config.model_type for name in CASES} == set(models.FAMILIES)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_read(name, tmp_path):
    """Every family's rules, on what a published model's config.json says."""
    public = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(public.config))
    model = models.read_config(tmp_path)
    found = {key: getattr(model, key) for key in public.expected}
    assert found == public.expected
    assert {key: getattr(model.parts, key) for key in public.parts} == public.parts
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(to_transformers(model, "bfloat16"))
    assert models.count_params(model) == sum(parameter.numel() for parameter in theirs.parameters())


def test_every_family_has_a_public_configuration():
    missing = set(models.FAMILIES) - {public.family for public in PUBLIC.values()}
    assert missing == {"exaone4", "hyperclovax", "ministral", "vaultgemma", *OLDEST}, "none was found of these"


def test_a_record_of_llama_knows_nothing_of_what_others_differ_in():
    """Architectures stand in checkpoints: those of runs before there were other families must stay equal."""
    assert _new().variant is None
    assert _new() == dataclasses.replace(_new(), variant=models.Variant())
    assert _new(family="gemma").variant is not None


def test_older_rope_keys_mean_the_same(tmp_path):
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = models.read_config(_write(tmp_path / "old", rope_theta=500_000.0, rope_scaling=scaling))
    new = models.read_config(_write(tmp_path / "new", rope_parameters=LLAMA3_ROPE))
    assert old == new
    assert old.rope.theta == 500_000.0
    assert dict(old.rope.scaling)["factor"] == 8.0
    legacy = models.read_config(_write(tmp_path / "old", rope_scaling={"type": "linear", "factor": 2.0}))
    assert legacy.rope == models.Rope(theta=10_000.0, kind="linear", scaling=(("factor", 2.0),))


def test_rope_keys_that_transformers_ignores_are_ignored_and_named(tmp_path, caplog):
    """As in DeepSeek-R1-0528-Qwen3-8B, whose yarn has an attn_factor."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    plain = models.read_config(_write(tmp_path, rope_scaling=yarn))
    assert "ignored" not in caplog.text
    assert models.read_config(_write(tmp_path, rope_scaling={**yarn, "attn_factor": 0.87})) == plain
    assert "rope type yarn has no attn_factor: ignored." in caplog.text


def test_another_name_of_an_activation(tmp_path):
    assert models.read_config(_write(tmp_path, hidden_act="swish")).parts.activation == "silu"


def test_mistral_with_types_of_layers_is_ministral(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 4}
    mistral |= {"sliding_window": 7}
    layer_types = ["sliding_attention", "full_attention"]
    config = models.read_config(_write(tmp_path, **mistral, layer_types=layer_types))
    assert config.sliding_windows == (7, None)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.layer_types) == (config.family, layer_types)


def test_older_dtype_key_and_absent_sizes_have_transformers_meaning(tmp_path):
    config = models.read_config(_write(tmp_path, torch_dtype="bfloat16"))
    assert config.dtype == "bfloat16"
    assert (config.num_kv_heads, config.head_dim) == (4, 8)


def test_max_window_layers_places_the_sliding_layers(tmp_path):
    qwen = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
    }
    window = {"sliding_window": 7, "max_window_layers": 3}
    config = models.read_config(_write(tmp_path, **qwen, **window, use_sliding_window=True))
    assert config.sliding_windows == (None, None, None, 7)
    config = models.read_config(_write(tmp_path, **qwen, **window, use_sliding_window=False))
    assert config.sliding_windows == (None,) * 4
    layer_types = ["sliding_attention", "full_attention"] * 2
    config = models.read_config(_write(tmp_path, **qwen, **window, use_sliding_window=True, layer_types=layer_types))
    assert config.sliding_windows == (7, None, 7, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel' in .*config.json is not supported; known families: .* llama, .* qwen3",
        ),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification; only LlamaForCausalLM"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "config.json: rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3.*high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported; known ones: silu, gelu, gelu_pytorch_tanh"),
        (
            {"quantization_config": {"bits": 4}},
            "quantized weights are not supported; use the folder of the unquantized",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantized weights are not supported .awq.; use the folder of the unquantized",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantized weights are not supported .mxfp4.; use the folder of the unquantized",
        ),
        (
            {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "swiglu_limit": 0.0},
            "config.json: clamp must be a number greater than 0, got 0.0",
        ),
        (
            {"model_type": "gemma3n", "architectures": ["Gemma3nForCausalLM"]},
            "'Gemma3nForCausalLM' in .*is not supported: its layers have embeddings of their own; known families",
        ),
        (
            {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True},
            "config.json: use_bidirectional_attention=True is not supported; models of this family have False",
        ),
        (
            {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0},
            "config.json: attn_logit_softcapping=50.0 is not supported; models of this family have None",
        ),
        (
            {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 0.0},
            "config.json: logit_divisor must be a number greater than 0, got 0.0",
        ),
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": -1.0},
            "config.json: logit_softcap must be a number greater than 0, got -1.0",
        ),
        (
            {
                "model_type": "smollm3",
                "architectures": ["SmolLM3ForCausalLM"],
                "layer_types": ["full_attention"] * 2,
                "no_rope_layers": [1],
            },
            "no_rope_layers has 1 entries for 2 layers",
        ),
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.4},
            "rotated_dim=3 must be even and at least 2",
        ),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]},
            r"config.json: mlp_only_layers=\[0\] is not supported; models of this family have \[\]",
        ),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9},
            "config.json: a token cannot use 9 of 8 experts",
        ),
        ({"num_attention_heads": 5}, "hidden size .32. is not a multiple"),
        ({"hidden_size": "wide"}, "hidden_size must be an integer from 1 to 16,777,216, got wide"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4,096, got 1000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, got nan"),
        ({"eos_token_id": [[2]]}, r"eos_token_id"),
        ({"rope_theta": 0.0}, "frequencies that are not finite"),
        ({"architectures": {"a": 1}}, "architectures must be a list of names"),
        ({"num_key_value_heads": 3}, "num_heads=4 of a llama model must be a multiple of num_kv_heads=3"),
    ],
)
def test_unsupported_configurations_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        models.read_config(_write(tmp_path, **changes))


def test_missing_and_broken_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        models.read_config(tmp_path)


def _new(**changes):
    sizes = {
        "family": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_embeddings": True,
        "rope_theta": 5_000.0,
        "max_position_embeddings": 64,
    }
    return models.new_config(**(sizes | changes))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_new_config_has_the_sizes_it_was_given(family):
    config = _new(family=family, eos_token_id=3)
    assert (config.family, config.head_dim, config.num_kv_heads, config.eos_token_id) == (family, 8, 2, 3)
    assert config.rope == models.Rope(theta=5_000.0)
    assert config.tie_embeddings
    normed = ("exaone4", "gemma3_text", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe")
    assert config.qk_norm == (family in normed)
    assert config.qkv_bias == (family in ("gpt_oss", "qwen2", "seed_oss"))
    local = {"gemma3_text": models.Rope(theta=10_000.0)}.get(family)
    assert config.parts.local_rope == local


def test_new_config_refuses_unknown_family_and_impossible_sizes():
    with pytest.raises(ValueError, match=r"family=gpt2 is not supported; known families: .* llama, "):
        _new(family="gpt2")
    with pytest.raises(ValueError, match="hidden_size=30 must be a multiple of num_heads=4"):
        _new(hidden_size=30)
    with pytest.raises(ValueError, match=r"(?s)transformers does not accept it: .*head_dim`=9"):
        _new(hidden_size=36)


def test_an_architecture_that_transformers_cannot_express_is_refused():
    config = dataclasses.replace(_new(), qk_norm=True)
    with pytest.raises(ValueError, match="LlamaConfig cannot express this architecture"):
        to_transformers(config, "float32")


def _products(jaxpr):
    """Operations of all matrix products of a traced program: a loop's as often as it turns."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "ragged_dot_general":
            left, right = (value.aval.shape for value in equation.invars[:2])
            rows, inner = left
            # Of x W by groups: the product, or the gradient of W, whose right side has a row for each of the left.
            total += 2 * rows * inner * right[-1] if len(right) == 2 else 2 * rows * math.prod(right[1:])
        elif name == "cond":  # by the platform that it is compiled for, the last for all others
            total += _products(parameters["branches"][-1].jaxpr)
        else:
            inner = [x for value in parameters.values() for x in (value if isinstance(value, tuple) else (value,))]
            inner = [getattr(one, "jaxpr", one) for one in inner if hasattr(getattr(one, "jaxpr", one), "eqns")]
            total += sum(map(_products, inner)) * (parameters["length"] if name == "scan" else 1)
    return total


@pytest.mark.parametrize("name", {prefix: name for name, (prefix, _) in CASES.items()}.values())
def test_a_plan_counts_the_operations_of_forward_and_backward(name, hf_folder):
    model = models.read_config(hf_folder(name))
    rows, tokens = 2, 24
    ids = np.zeros((rows, tokens), np.int32)

    def total(params, remat):
        return jnp.sum(models.hidden_states(model, params, ids, attention="dense", remat=remat))

    experts = model.parts.experts
    routers = 0 if experts is None else 3 * 2 * rows * tokens * model.hidden_size * experts.count * model.num_layers
    for remat in ("none",) if experts is None else ("none", "dots"):
        step = StepSizes(
            rows=rows, row_tokens=tokens, scored_tokens=0, seen_pairs=rows * tokens**2, micro_batches=1, remat=remat,
            fused_attention=False,
        )  # fmt: skip
        traced = jax.make_jaxpr(jax.grad(partial(total, remat=remat)))(models.abstract_params(model))
        assert _products(traced.jaxpr) - routers == pytest.approx(
            step_flops(model, step), rel=0.01 if remat == "none" else 0.02
        )
