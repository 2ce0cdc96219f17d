import dataclasses
import logging

import numpy as np
import pytest

from rpo_jax import reference
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.reference import cached_log_probs, data_fingerprint, folder_fingerprint, read_cache, write_cache
from rpo_jax.step import LogProbs
from rpo_jax.types import RESPONSES, PreferenceData
from tests.worlds import random_data

SETTINGS = ("weights of a", "float32")
BOTH = ("chosen", "rejected")


def batches_of(data: PreferenceData, responses=BOTH) -> PreferenceBatches:
    return PreferenceBatches(data, pairs=8, responses=responses, order="sequential", seed=0, row_tokens=64)


def slot_values(batch) -> LogProbs:
    """Log-probs that say which example and response a slot holds; invalid slots hold what must not be stored."""
    sides = [getattr(batch, name) for name in RESPONSES]
    values = [np.where(side.valid, -100.0 * k - side.example_index, 9e9) for k, side in enumerate(sides)]
    return LogProbs(np.concatenate(values).astype(np.float32), np.ones(sum(map(len, values)), np.int32))


def refuse(_batch):
    raise AssertionError("the reference was asked, although the cache has everything")


def ignore(_done, _metrics):
    pass


def cached(folder, data, *, responses=BOTH, settings=SETTINGS, log_probs=slot_values):
    return cached_log_probs(data, batches_of(data, responses), settings, folder, log_probs, ignore)


@pytest.fixture
def data():
    return random_data(20, mismatched=True)


def test_every_response_gets_its_own_log_prob(tmp_path, data):
    filled, found = cached(tmp_path, data)
    assert not found
    index = np.arange(20)
    expected = np.stack([-index, -100.0 - index, np.full(20, np.nan)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(filled.reference_log_probs, expected)
    assert filled.examples is data.examples


def test_the_cache_gives_back_what_was_computed(tmp_path, data):
    first, _ = cached(tmp_path, data)
    again, found = cached(tmp_path, data, log_probs=refuse)
    assert found
    np.testing.assert_array_equal(again.reference_log_probs, first.reference_log_probs)


def test_progress_counts_batches(tmp_path, data):
    seen = []
    cached_log_probs(data, batches_of(data), SETTINGS, tmp_path, slot_values, lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]


def with_example(data: PreferenceData, index: int, **changes) -> PreferenceData:
    examples = list(data.examples)
    examples[index] = dataclasses.replace(examples[index], **changes)
    return dataclasses.replace(data, examples=examples)


def one_more(ids: np.ndarray) -> np.ndarray:
    return np.append(ids[:-1], ids[-1] + 1).astype(np.int32)


CHANGES = {
    "a prompt token": lambda d: with_example(d, 3, prompt_ids=one_more(d.examples[3].prompt_ids)),
    "a chosen token": lambda d: with_example(d, 3, chosen_ids=one_more(d.examples[3].chosen_ids)),
    "a rejected token": lambda d: with_example(d, 3, rejected_ids=one_more(d.examples[3].rejected_ids)),
    "a token moved from prompt to response": lambda d: with_example(
        d,
        3,
        prompt_ids=d.examples[3].prompt_ids[:-1],
        chosen_ids=np.concatenate([d.examples[3].prompt_ids[-1:], d.examples[3].chosen_ids]),
    ),
    "the order": lambda d: dataclasses.replace(d, examples=list(d.examples[::-1])),
    "the number": lambda d: random_data(19, mismatched=True),
    "a response that is missing": lambda d: with_example(d, 3, rejected_ids=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_has_another_fingerprint(data, change):
    assert data_fingerprint(CHANGES[change](data), BOTH) != data_fingerprint(data, BOTH)


def test_what_is_not_scored_is_not_in_the_fingerprint(data):
    other = with_example(data, 3, mismatched_ids=one_more(data.examples[3].mismatched_ids), row_id="elsewhere:1")
    assert data_fingerprint(other, BOTH) == data_fingerprint(data, BOTH)
    assert data_fingerprint(other, RESPONSES) != data_fingerprint(data, RESPONSES)


@pytest.mark.parametrize("settings", [("weights of b", "float32"), ("weights of a", "bfloat16")])
def test_other_weights_or_another_dtype_are_computed_anew(tmp_path, data, settings):
    cached(tmp_path, data)
    _, found = cached(tmp_path, data, settings=settings)
    assert not found
    assert cached(tmp_path, data, log_probs=refuse)[1], "the first is still there"


def test_other_responses_are_computed_anew(tmp_path, data):
    cached(tmp_path, data)
    filled, found = cached(tmp_path, data, responses=RESPONSES)
    assert not found
    np.testing.assert_array_equal(filled.reference_log_probs[:, 2], -200.0 - np.arange(20))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def of_another_run(path):
    write_cache(path, "another fingerprint", np.zeros((20, 3), np.float32))


def of_fewer_examples(path):
    write_cache(path, path.stem, np.zeros((19, 3), np.float32))


def of_another_program(path):
    path.write_text("not safetensors at all", encoding="utf-8")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, of_another_run, of_fewer_examples, of_another_program, empty])
def test_a_file_that_is_not_what_it_should_be_is_computed_again(tmp_path, data, damage, caplog):
    first, _ = cached(tmp_path, data)
    (path,) = (tmp_path / "reference_log_probs").iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again, found = cached(tmp_path, data)
    assert not found
    assert str(path) in caplog.text
    assert "computed again" in caplog.text
    np.testing.assert_array_equal(again.reference_log_probs, first.reference_log_probs)
    assert cached(tmp_path, data, log_probs=refuse)[1], "and is whole after that"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_space(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_cache(tmp_path / "cache" / "a.safetensors", "a", np.zeros((1, 3), np.float32))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_not_there_is_no_warning(tmp_path, caplog):
    assert read_cache(tmp_path / "a.safetensors", "a", 1) is None
    assert caplog.text == ""


def test_a_folder_s_fingerprint_is_of_weights_and_architecture(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = folder_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words", encoding="utf-8")
    assert folder_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    second = folder_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert len({first, second, folder_fingerprint(tmp_path)}) == 3


def test_parameters_in_memory_are_told_apart():
    params = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(4, np.float32)}}
    same = {"b": {"c": np.ones(4, np.float32)}, "a": np.zeros((2, 3), np.float32)}
    changed = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.array([1, 1, 1, 2], np.float32)}}
    assert reference.params_fingerprint(params) == reference.params_fingerprint(same)
    assert reference.params_fingerprint(params) != reference.params_fingerprint(changed)
