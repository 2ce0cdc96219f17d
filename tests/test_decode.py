"""Sampling with a cache: transformers' greedy tokens, exact distributions, and answers that no neighbour changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rpo_jax import models
from rpo_jax.config import LoraConfig, MeshConfig
from rpo_jax.hosts import sharding
from rpo_jax.models import lora
from rpo_jax.sampling import engine, kv_cache
from rpo_jax.sampling.engine import (
    SLICE_TOKENS,
    SMALLEST_CACHE,
    Engine,
    Sampling,
    aligned_logits,
    bucket,
    cache_blocks,
    choose,
)
from tests.models.conftest import CASES, SIZES, torch_model
from tests.worlds import VOCAB, quantized, small_model

NEW_TOKENS = SLICE_TOKENS + 8  # over the end of a slice, and far over every window of the cases
MODEL = small_model()
PARAMS = functools.cache(lambda: on_host(models.init_params(MODEL, jax.random.key(0))))
WARM = Sampling(temperature=1.0)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def mesh_of(*shape):
    sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(shape))])


def ragged(lengths, vocab=VOCAB, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab, length).astype(np.int32) for length in lengths]


@functools.cache
def decoder(sampling=WARM, shape=(1, 1, 1), end_ids=()):
    return Engine(MODEL, mesh_of(*shape), sampling=sampling, end_ids=end_ids)


def answers(prompts, seeds, limit=NEW_TOKENS, *, rows=8, stopped=None, params=None, **which):
    made = decoder(**which)
    limits = [limit] * len(prompts) if isinstance(limit, int) else limit
    with jax.set_mesh(made.mesh):
        params = kv_cache.to_decode_layout(PARAMS() if params is None else params, "float32", "cpu")
        return in_order(made.answers(params, prompts, seeds, limits, rows, stopped))


def in_order(ended):
    """Answers by the numbers of their prompts, each of which has one."""
    found = sorted(pair for some in ended for pair in some)
    assert [number for number, _ in found] == list(range(len(found)))
    return [ids for _, ids in found]


# Compiling takes seconds each. Those that bring a part of which the sampler has its own code always run: a scaled rope,
# a window, norms of heads, caps of scores and logits, several ropes and none, a part of a head rotated, a divisor of
# logits, sinks.
ALWAYS = ("llama3", "mistral", "qwen3", "gemma2", "gemma3", "phi4 mini", "smollm3", "granite", "gpt_oss")
SAMPLED = [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in CASES]


@pytest.mark.parametrize("name", SAMPLED)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    model_config, params = models.load_pretrained(tmp_path)
    eos = model_config.eos_token_id
    ends = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    new_tokens = (
        SMALLEST_CACHE * kv_cache.BLOCK if name == "mistral" else NEW_TOKENS
    )  # once so many that the cache has to grow
    prompts = ragged((24, 15, 9, 30), SIZES["vocab_size"])
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        made = Engine(model_config, mesh, sampling=Sampling(), end_ids=ends)
        readable = kv_cache.to_decode_layout(params, "float32", "cpu")
        found = in_order(made.answers(readable, prompts, range(4), [new_tokens] * 4, 4))
    for prompt, ids in zip(prompts, found, strict=True):
        asked = torch.tensor(prompt[None], dtype=torch.long)
        expected = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        assert ids == expected[0, len(prompt) :].tolist()
    assert max(map(len, found)) == new_tokens, "no answer went over the end of a slice"


@pytest.mark.parametrize("sampling", [WARM, Sampling(temperature=0.8, top_k=20, top_p=0.9)])
def test_an_answer_does_not_depend_on_its_batch(sampling):
    """Twice as many prompts as rows, short and long ones, which end at different times and make room for others."""
    prompts, seeds = ragged(range(5, 101, 6)), list(range(100, 116))
    limits = [NEW_TOKENS + 40 * (i % 3) for i in range(16)]
    together = answers(prompts, seeds, limits, sampling=sampling)
    assert [len(ids) for ids in together] == limits
    assert len({tuple(ids) for ids in together}) == 16
    order = np.random.default_rng(1).permutation(16)
    shuffled = {}
    for few in np.array_split(order, 5):  # three or four in a batch of eight, in other rows, beside other prompts
        found = answers(*([values[i] for i in few] for values in (prompts, seeds, limits)), sampling=sampling)
        shuffled |= dict(zip(few.tolist(), found, strict=True))
    assert [shuffled[i] for i in range(16)] == together


def test_the_seed_and_nothing_else_tells_answers_to_a_prompt_apart():
    prompt = ragged([20])[0]
    first, second, again = answers([prompt] * 3, [7, 8, 7])
    assert first == again != second


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2), (1, 2, 4)])
def test_any_mesh_samples_the_tokens_of_one_device(shape):
    prompts, seeds = ragged(range(20, 28)), range(8)
    base = LoraConfig(rank=4, alpha=16.0)
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, lora.init_adapters(MODEL, base, jax.random.key(1)))
    adapted = lora.combine(quantized(MODEL, PARAMS()), on_host(adapters), base)
    for params in (None, adapted):
        one, many = (answers(prompts, seeds, params=params, shape=which) for which in ((1, 1, 1), shape))
        assert one == many


def test_few_programs_serve_every_length():
    made = Engine(MODEL, mesh_of(1, 1, 1), sampling=Sampling(), end_ids=())
    with jax.set_mesh(made.mesh):
        params = kv_cache.to_decode_layout(PARAMS(), "float32", "cpu")
        for length in (3, 17, 32, 20, 31):
            for limit in (1, 5, SMALLEST_CACHE * kv_cache.BLOCK):
                in_order(made.answers(params, ragged([length]), [0], [limit], 4))
    assert made.read._cache_size() == 1
    assert made.go_on._cache_size() == 2  # one per size of the cache
    assert [bucket(n) for n in (1, 32, 33, 65, 97, 129, 193, 257)] == [32, 32, 64, 96, 128, 192, 256, 384]
    assert [cache_blocks(slices) for slices in (1, 4, 5, 9)] == [2, 2, 4, 8]


def test_a_row_ends_at_its_limit_at_an_end_token_or_when_told():
    prompts, seeds = ragged([20, 21, 22]), [1, 2, 3]
    free = answers(prompts, seeds)
    assert [len(ids) for ids in free] == [NEW_TOKENS] * 3
    end = free[0][5]
    ended = answers(prompts, seeds, end_ids=(end,))
    for ids, without in zip(ended, free, strict=True):
        assert ids == (without[: without.index(end) + 1] if end in without else without)
    assert [len(ids) for ids in answers(prompts, seeds, limit=1)] == [1, 1, 1]
    assert answers(prompts, seeds, limit=[0, 2, 0]) == [[], free[1][:2], []]
    told = answers(prompts, seeds, stopped=lambda ids: ids[0] == free[1][0] and len(ids) > 1)
    assert told[0] == free[0]
    assert told[1] == free[1][: 1 + SLICE_TOKENS]


@pytest.mark.parametrize("vocabulary", [1, 97, 96, 256, 1000, 1024])
def test_greedy_takes_the_first_of_the_likeliest_tokens(vocabulary):
    logits = np.random.default_rng(0).integers(-9, 0, (64, vocabulary)).astype(np.float32)  # many tie
    nothing = jnp.zeros(64, jnp.int32)
    chosen = choose(jnp.array(logits), nothing.astype(jnp.uint32), nothing, Sampling())
    np.testing.assert_array_equal(chosen, np.argmax(logits, axis=-1))


def test_logits_of_a_vocabulary_in_shards_stay_where_they_are():
    mesh = mesh_of(2, 1, 4)
    logits = jax.device_put(
        np.zeros((8, 1280), np.float32), jax.NamedSharding(mesh, jax.P(sharding.row_axes(mesh), "tensor"))
    )
    nothing = jnp.zeros(8, jnp.int32)
    lowered = jax.jit(choose, static_argnums=3).lower(logits, nothing.astype(jnp.uint32), nothing, Sampling())
    compiled = lowered.compile().as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled


# Letters: 3 seeds times 4096 draws are enough to tell 0.30 from 0.33.
DRAWS = 4096
LOGITS = np.log(np.array([0.05, 0.30, 0.20, 0.05, 0.25, 0.15], np.float32))


def drawn(sampling) -> np.ndarray:
    seeds = jnp.arange(DRAWS, dtype=jnp.uint32)
    chosen = choose(jnp.tile(LOGITS, (DRAWS, 1)), seeds, jnp.full(DRAWS, 3), sampling)
    return np.bincount(np.asarray(chosen), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept", "power"),
    [
        (WARM, range(6), 1.0),
        (Sampling(temperature=2.0), range(6), 0.5),
        (Sampling(temperature=1.0, top_k=2), (1, 4), 1.0),
        (Sampling(temperature=1.0, top_k=5), range(6), 1.0),  # the fifth and the sixth tie
        (Sampling(temperature=1.0, top_k=99), range(6), 1.0),
        (Sampling(temperature=1.0, top_p=0.7), (1, 2, 4), 1.0),
        (Sampling(temperature=1.0, top_p=0.2), (1,), 1.0),
        (Sampling(temperature=1.0, top_p=1.0), range(6), 1.0),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), (1, 4), 1.0),  # of the three 0.40 and 0.33 are enough
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(sampling, kept, power):
    expected = np.where(np.isin(np.arange(6), list(kept)), np.exp(LOGITS) ** power, 0)
    expected /= expected.sum()
    found = drawn(sampling)
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / DRAWS**0.5)


def test_no_token_without_probability_is_drawn_where_the_sum_goes_up_and_down(monkeypatch):
    """Sums of float32 in XLA's order are not monotone: between two tokens of a large vocabulary they move."""
    rng = np.random.default_rng(0)
    probabilities = np.zeros((8, 49152), np.float32)
    for row in probabilities:
        row[rng.choice(49152, 50, replace=False)] = rng.dirichlet(np.ones(50))
    sums = np.asarray(jnp.cumsum(probabilities, axis=-1))
    rises = np.maximum.accumulate(sums, axis=-1)
    rows, tokens = np.nonzero((probabilities[:, 1:] == 0) & (rises[:, 1:] > rises[:, :-1]))
    assert len(rows), "there is none to be drawn"
    for row, token in list(zip(rows, tokens + 1, strict=True))[:8]:
        share = np.float32(rises[row, token - 1] / sums[row, -1])
        monkeypatch.setattr(jax.random, "uniform", lambda key, share=share: jnp.float32(share))
        drawn = engine._drawn(jnp.asarray(probabilities[row : row + 1]), jnp.zeros(1, jnp.uint32), jnp.zeros(1, int))
        assert probabilities[row, int(drawn[0])] > 0


def test_the_filters_are_those_of_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    from rpo_jax.sampling.engine import _likeliest

    logits = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32) * 3
    probabilities = jax.nn.softmax(logits, axis=-1)
    for k in (1, 7, 512):
        ours = _likeliest(probabilities, jnp.ones_like(probabilities), jnp.full(16, float(k))) > 0
        theirs = TopKLogitsWarper(k)(torch.zeros(0), torch.tensor(logits)) > -torch.inf
        np.testing.assert_array_equal(ours, theirs)
    for p in (0.1, 0.5, 0.9, 0.99):
        ours = _likeliest(probabilities, probabilities, p * jnp.sum(probabilities, axis=-1)) > 0
        theirs = TopPLogitsWarper(p)(torch.zeros(0), torch.tensor(logits)) > -torch.inf
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.9}, "temperature=0"),
        ({"principle_weight": -1.0}, "principle_weight=-1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**values)


WITH, WITHOUT = np.array([2.0, 1.0, 0.5, -1.0]), np.array([1.5, 1.4, 0.2, -0.5])


def test_linear_alignment_has_the_numbers_of_its_source():
    found = aligned_logits(WITH, WITHOUT, 2.0)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found, [3, 0.2, 1.1, -2], rtol=1e-12)
    expected = np.exp(found / 0.5) / np.exp(found / 0.5).sum()
    np.testing.assert_allclose(expected, [0.974550552279, 0.00360375512715, 0.0218014480673, 4.42445e-5], rtol=1e-6)
    both = jnp.asarray(np.repeat([WITH, WITHOUT], DRAWS, axis=0), jnp.float32)
    seeds, count = jnp.tile(jnp.arange(DRAWS, dtype=jnp.uint32), 2), jnp.zeros(2 * DRAWS, jnp.int32)
    for top_p, wanted in ((None, expected), (0.8, [1, 0, 0, 0])):
        tokens = choose(both, seeds, count, Sampling(temperature=0.5, top_p=top_p, principle_weight=2.0))
        np.testing.assert_array_equal(tokens[:DRAWS], tokens[DRAWS:], err_msg="both go on with the same token")
        shares = np.bincount(tokens[:DRAWS], minlength=4) / DRAWS
        np.testing.assert_allclose(shares, wanted, atol=4 * 0.5 / DRAWS**0.5)


def test_a_prompt_is_read_with_its_principle_and_without_it():
    """Each greedy token is the likeliest by the logits of both whole sequences, whatever lies beside it."""
    without = ragged((5, 9, 40, 3))
    principles = ragged((4, 30, 2, 7), seed=1)
    prompts = [np.concatenate(both) for both in zip(principles, without, strict=True)]
    made = Engine(MODEL, mesh_of(2, 1, 1), sampling=Sampling(principle_weight=1.5), end_ids=())
    with jax.set_mesh(made.mesh):
        ready = kv_cache.to_decode_layout(PARAMS(), "float32", "cpu")
        found = in_order(made.answers(ready, prompts, [0] * 4, [6] * 4, 2, without=without))

    @jax.jit
    def logits(tokens):  # what is behind a token does not change it
        return models.apply(MODEL, PARAMS(), tokens[None], segment_ids=jnp.ones_like(tokens)[None])[0]

    def predictions(prompt, ids):
        whole = np.concatenate([prompt, ids])
        padded = np.pad(whole, (0, MODEL.positions - len(whole)))
        return logits(padded)[len(prompt) - 1 : len(whole) - 1]

    for number, ids in enumerate(found):
        both = (predictions(prompt[number], ids) for prompt in (prompts, without))
        assert ids == jnp.argmax(aligned_logits(*both, 1.5), axis=-1).tolist()
