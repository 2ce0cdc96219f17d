import dataclasses
import logging

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rpo_jax.core.records import PreferenceData
from rpo_jax.data.reference_pass import ReferencePass
from rpo_jax.models.huggingface.folders import folder_fingerprint
from rpo_jax.training import reference
from rpo_jax.training.micro_batches import LogProbs
from rpo_jax.training.reference import cached_log_probs, compute_log_probs, read_cache, tokens_fingerprint, write_cache
from tests.data.ragged import RESPONSES, changed, ids_of, table_of
from tests.worlds import random_data

PARTS = {
    "slot": "train data, /a/file.jsonl",
    "weights": "weights of a",
    "architecture": "a llama",
    "compute_dtype": "float32",
    "data": "texts of a",
    "tokenizer": "vocabulary of a",
    "template": "auto",
    "truncation": "max_prompt_tokens=256 max_tokens=512 keep_end",
}
BOTH = ("chosen", "rejected")


def made_up(data, names):
    """Log-probs that say which example and response they are of."""
    values = np.full(data.num_responses, np.nan, np.float32)
    for name in names:
        values[data.of_kind(name)] = -100.0 * RESPONSES.index(name) - data.example_index[data.of_kind(name)]
    return values


def refuse(_missing):
    raise AssertionError("the reference was asked, although the cache has everything")


class Cache:
    """A cache folder, and what has been asked and said."""

    def __init__(self, folder):
        self.folder = folder / reference.FOLDER
        self.parent, self.said = folder, []

    def get(self, examples, responses=BOTH, compute=None, **changes):
        parts = {**PARTS, **changes}
        compute = compute or (lambda missing: made_up(examples, missing))
        return cached_log_probs(examples, responses, parts, self.parent, compute, self.said.append)

    def files(self):
        return sorted(self.folder.iterdir())


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def data():
    return random_data(20, mismatched=True)


def test_the_cache_gives_back_what_was_computed(cache, data):
    first, computed = cache.get(data)
    assert computed == BOTH
    np.testing.assert_array_equal(first.reference_log_probs, made_up(data, BOTH))
    assert first.examples is data.examples
    again, computed = cache.get(data, compute=refuse)
    assert computed == ()
    np.testing.assert_array_equal(again.reference_log_probs, first.reference_log_probs)
    assert cache.said == []


def test_files_are_mapped_not_read(cache, data):
    cache.get(data)
    header = {**PARTS, "format": reference.FORMAT, "response": "chosen", "tokens": tokens_fingerprint(data, "chosen")}
    found = [read_cache(path, header, 20) for path in cache.files()]
    (values,) = [values for values in found if values is not None]
    assert isinstance(values, np.memmap)
    np.testing.assert_array_equal(values, -np.arange(20))


def test_another_objective_computes_only_the_responses_it_adds(cache, data):
    cache.get(data)
    filled, computed = cache.get(data, RESPONSES)
    assert computed == ("mismatched",)
    np.testing.assert_array_equal(filled.reference_log_probs, made_up(data, RESPONSES))
    assert cache.get(data, RESPONSES, refuse)[1] == cache.get(data, BOTH, refuse)[1] == ()
    assert cache.said == []


def slot_values(batch) -> LogProbs:
    """For each slot the first token of its response; slots without one hold what must not be stored."""
    values = np.full(len(batch.sides["chosen"].valid), 9e9, np.float32)
    rows, columns = np.nonzero(batch.response_ids >= 0)
    for row, column in zip(rows[::-1], columns[::-1], strict=True):
        values[batch.response_ids[row, column]] = batch.tokens[row, column]
    return LogProbs(values, np.ones(len(values), np.int32))


@pytest.mark.parametrize("responses", [("chosen",), BOTH, RESPONSES])
def test_every_response_gets_its_own_log_prob(data, responses):
    seen = []
    sweep = ReferencePass(data, responses, batch_pairs=4, row_tokens=64)
    table = table_of(data, compute_log_probs(sweep, slot_values, lambda done, _: seen.append(done)))
    for name in RESPONSES:
        expected = [ids_of(e, name)[0] if name in responses else np.nan for e in data.examples]
        np.testing.assert_array_equal(table[:, RESPONSES.index(name)], expected)
    assert seen == list(range(1, len(sweep) + 1))
    assert len(sweep) > 2


def with_example(data: PreferenceData, index: int, **changes) -> PreferenceData:
    examples = list(data.examples)
    examples[index] = changed(examples[index], **changes)
    return PreferenceData(examples)


def one_more(ids: np.ndarray) -> np.ndarray:
    return np.append(ids[:-1], ids[-1] + 1).astype(np.int32)


CHANGES = {
    "a prompt token": lambda d: with_example(d, 3, prompt=one_more(d.examples[3].prompt_ids)),
    "a chosen token": lambda d: with_example(d, 3, chosen=one_more(ids_of(d.examples[3], "chosen"))),
    "a rejected token": lambda d: with_example(d, 3, rejected=one_more(ids_of(d.examples[3], "rejected"))),
    "a token moved from prompt to response": lambda d: with_example(
        d,
        3,
        prompt=d.examples[3].prompt_ids[:-1],
        chosen=np.concatenate([d.examples[3].prompt_ids[-1:], ids_of(d.examples[3], "chosen")]),
    ),
    "the order": lambda d: dataclasses.replace(d, examples=list(d.examples[::-1])),
    "the number": lambda d: random_data(19, mismatched=True),
    "a response that is missing": lambda d: with_example(d, 3, rejected=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_has_another_fingerprint(data, change):
    before, after = ([tokens_fingerprint(d, response) for response in BOTH] for d in (data, CHANGES[change](data)))
    assert before != after


def test_what_is_not_scored_is_not_in_the_fingerprint(data):
    other = with_example(data, 3, mismatched=one_more(ids_of(data.examples[3], "mismatched")))
    other.examples[3] = dataclasses.replace(other.examples[3], row_id="elsewhere:1")
    for response in BOTH:
        assert tokens_fingerprint(other, response) == tokens_fingerprint(data, response)
    assert tokens_fingerprint(other, "mismatched") != tokens_fingerprint(data, "mismatched")


OTHER_TOKENS = CHANGES["a prompt token"]
SHORTER = "max_prompt_tokens=128 max_tokens=512 keep_end"
# What is different in the second run, whether its token ids are, and what it says.
REASONS = {
    "weights": ({"weights": "weights of b"}, False, "the weights"),
    "architecture": ({"architecture": "a mistral"}, False, "the architecture"),
    "compute dtype": ({"compute_dtype": "bfloat16"}, False, "the compute dtype (float32 before, bfloat16 now)"),
    "data": ({"data": "texts of b"}, True, "the data"),
    "tokenizer": ({"tokenizer": "vocabulary of b"}, True, "the tokenizer"),
    "template": ({"template": "chat"}, True, "the template (auto before, chat now)"),
    "truncation": ({"truncation": SHORTER}, True, f"the truncation ({PARTS['truncation']} before, {SHORTER} now)"),
    "two of them": ({"weights": "weights of b", "data": "texts of b"}, True, "the weights, the data"),
    "token ids alone": ({}, True, "the token ids"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_changed_fingerprint_recomputes_and_says_why(cache, data, reason):
    changes, other_tokens, words = REASONS[reason]
    cache.get(data)
    assert cache.said == [], "the first time there is nothing to say"
    other = OTHER_TOKENS(data) if other_tokens else data
    assert cache.get(other, **changes)[1] == BOTH
    assert cache.said == [f"reference log-probs of {PARTS['slot']} are computed again: {words} changed"]
    assert cache.get(data, compute=refuse)[1] == (), "the first is still there"
    assert cache.get(other, compute=refuse, **changes)[1] == ()


def test_a_changed_format_is_computed_again(cache, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reference, "FORMAT", "rpo_jax.reference_log_probs.1")
        cache.get(data)
    assert cache.get(data)[1] == BOTH
    assert "the cache's format changed" in cache.said[0]


@pytest.mark.parametrize("part", ["data", "tokenizer", "template", "truncation"])
def test_what_changes_no_token_changes_nothing(cache, data, part):
    cache.get(data)
    assert cache.get(data, compute=refuse, **{part: "another"})[1] == ()


def test_the_nearest_file_is_the_one_compared_with(cache, data):
    cache.get(data, compute_dtype="bfloat16", weights="weights of b")
    cache.get(data)
    cache.get(data, slot="train data, /another/file.jsonl", weights="weights of c")
    assert len(cache.said) == 1, "another file has no history"
    cache.get(data, weights="weights of b")
    assert cache.said[1].endswith("computed again: the weights changed")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def of_another_run(path):
    write_cache(path, {**PARTS, "response": "chosen", "format": "x", "tokens": "y"}, np.zeros(20, np.float32))


def with_one_value_less(path):
    """Whole in itself, checksum and all."""
    with safe_open(path, "np") as file:
        header, values = file.metadata(), file.get_tensor("log_probs")
    header.pop("sha256")
    write_cache(path, header, values[1:])


def of_another_program(path):
    path.write_text("not safetensors at all", encoding="utf-8")


def empty(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip_a_bit, of_another_run, with_one_value_less, of_another_program, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_it_should_be_is_computed_again(cache, data, damage, caplog):
    first, _ = cache.get(data, ("chosen",))
    (path,) = cache.files()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again, computed = cache.get(data, ("chosen",))
    assert computed == ("chosen",)
    assert str(path) in caplog.text
    assert "computed again" in caplog.text
    np.testing.assert_array_equal(again.reference_log_probs, first.reference_log_probs)
    assert cache.get(data, ("chosen",), refuse)[1] == (), "and is whole after that"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_does_not_stop_another_run(cache, data, damage):
    cache.get(data, ("chosen",))
    damage(cache.files()[0])
    assert cache.get(data, ("chosen",), weights="weights of b")[1] == ("chosen",)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_space(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_cache(tmp_path / "cache" / "a.safetensors", PARTS, np.zeros(1, np.float32))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_not_there_is_no_warning(tmp_path, caplog):
    assert read_cache(tmp_path / "a.safetensors", PARTS, 1) is None
    assert caplog.text == ""


def test_a_folder_s_fingerprint_is_of_its_weights(tmp_path):
    def written(value: float) -> str:
        save_file({"w": np.full(3, value, np.float32)}, tmp_path / "model.safetensors")
        return folder_fingerprint(tmp_path)

    first = written(1.0)
    # What is beside the weights does not decide the values, or is compared by itself.
    (tmp_path / "config.json").write_text('{"transformers_version": "6"}', encoding="utf-8")
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    assert folder_fingerprint(tmp_path) == first
    assert written(2.0) != first
    assert written(1.0) == first


def test_a_cache_folder_that_cannot_be_written_to_is_told_before_anything_is_computed_and_done_without(tmp_path, data):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    said = []

    def compute(missing):
        assert len(said) == 1, "told first"
        return made_up(data, missing)

    filled, computed = cached_log_probs(data, ("chosen",), PARTS, tmp_path / "file", compute, said.append)
    assert computed == ("chosen",)
    assert np.isfinite(filled.reference_log_probs[data.of_kind("chosen")]).all()
    assert said[0].startswith(f"run.cache_dir: {tmp_path / 'file'} cannot be written: Not a directory")


def test_a_log_prob_that_is_no_number_is_refused_and_not_kept(tmp_path, data):
    values = np.zeros(data.num_responses, np.float32)
    values[data.of_kind("chosen")[2]] = np.nan
    with pytest.raises(ValueError, match=r"made.jsonl:3 a chosen log-prob of nan"):
        cached_log_probs(data, ("chosen",), PARTS, tmp_path, lambda _: values, print)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_parameters_in_memory_are_told_apart():
    params = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(4, np.float32)}}
    same = {"b": {"c": np.ones(4, np.float32)}, "a": np.zeros((2, 3), np.float32)}
    changed = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.array([1, 1, 1, 2], np.float32)}}
    assert reference.params_fingerprint(params) == reference.params_fingerprint(same)
    assert reference.params_fingerprint(params) != reference.params_fingerprint(changed)


def test_a_cache_file_that_vanishes_while_it_is_looked_at_is_passed_over(tmp_path):
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert reference.what_changed(tmp_path, PARTS) == []
