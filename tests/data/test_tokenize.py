import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.data.chat_template import ChatTemplate
from rpo_jax.data.conversations import Conversation
from rpo_jax.data.faults import Faults
from rpo_jax.data.tokenize import PromptEncoder, TokenLimits, encode_examples, join_encoded, tokenize_examples

from .ragged import ids_of, pair

BOS, EOS = 0, 1


def words_tokenizer(adds_bos=True, **special) -> PreTrainedTokenizerFast:
    """One token per word: w2 is id 2, w3 is id 3, ...; BOS in front where there is one, unless it adds none."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | {f"w{number}": number for number in range(2, 60)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w59"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos and (bos := special.get("bos_token")):
        words.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def words(first, count):
    return " ".join(f"w{number}" for number in range(first, first + count))


def tokenized_with(examples, tokenizer, mismatched=False, **limits):
    return tokenize_examples(examples, tokenizer, TokenLimits(**limits), mismatched=mismatched)


def text_id_of(example, kind):
    return next((response.text_id for response in example.responses if response.kind == kind), -1)


def one(tokenizer, example, **arguments):
    arguments = {"max_prompt_tokens": 4, "max_tokens": 10, "truncation_side": "keep_start", **arguments}
    tokenized, bad_rows = tokenized_with([example], tokenizer, **arguments)
    assert not bad_rows
    return tokenized[0]


# Prompt and response words -> ids, with max_prompt_tokens=4 and max_tokens=10.
CASES = {
    "fits": (2, 3, 2, "keep_start", [2, 3], [20, 21, 22, EOS], [40, 41, EOS]),
    "long prompt that fits stays whole": (7, 1, 1, "keep_start", list(range(2, 9)), [20, EOS], [40, EOS]),
    "just fits": (6, 3, 1, "keep_start", list(range(2, 8)), [20, 21, 22, EOS], [40, EOS]),
    "EOS counts": (6, 4, 1, "keep_start", [2, 3, 4, 5], [20, 21, 22, 23, EOS], [40, EOS]),
    "the rejected response counts": (6, 1, 4, "keep_start", [2, 3, 4, 5], [20, EOS], [40, 41, 42, 43, EOS]),
    "keep_end": (6, 4, 1, "keep_end", [4, 5, 6, 7], [20, 21, 22, 23, EOS], [40, EOS]),
    "response fills what is left": (5, 5, 1, "keep_start", [2, 3, 4, 5], [*range(20, 25), EOS], [40, EOS]),
    "no room for EOS": (5, 6, 1, "keep_start", [2, 3, 4, 5], list(range(20, 26)), [40, EOS]),
    "response cut": (5, 9, 7, "keep_start", [2, 3, 4, 5], list(range(20, 26)), list(range(40, 46))),
    "only the response is long": (3, 9, 1, "keep_start", [2, 3, 4], list(range(20, 27)), [40, EOS]),
    "empty response": (2, 0, 1, "keep_start", [2, 3], [EOS], [40, EOS]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_truncation_without_bos(case):
    num_prompt, num_chosen, num_rejected, side, prompt, chosen, rejected = case
    tokenizer = words_tokenizer(eos_token="</s>")
    example = pair(words(2, num_prompt), words(20, num_chosen), words(40, num_rejected))
    got = one(tokenizer, example, truncation_side=side)
    assert got.prompt_ids.tolist() == prompt
    assert ids_of(got, "chosen").tolist() == chosen
    assert ids_of(got, "rejected").tolist() == rejected


@pytest.mark.parametrize(
    ("num_prompt", "side", "max_prompt_tokens", "prompt"),
    [
        (2, "keep_start", 4, [BOS, 2, 3]),
        (8, "keep_start", 4, [BOS, 2, 3, 4]),
        (8, "keep_end", 4, [BOS, 7, 8, 9]),
        (8, "keep_start", 1, [BOS]),
        (8, "keep_end", 1, [BOS]),
    ],
)
def test_bos_counts_and_survives_truncation(num_prompt, side, max_prompt_tokens, prompt):
    tokenizer = words_tokenizer(bos_token="<s>", eos_token="</s>")
    example = pair(words(2, num_prompt), words(20, 2), words(40, 1))
    got = one(tokenizer, example, truncation_side=side, max_prompt_tokens=max_prompt_tokens)
    assert got.prompt_ids.tolist() == prompt
    assert ids_of(got, "chosen").tolist() == [20, 21, EOS]


@given(sizes=st.tuples(*[st.integers(0, 30)] * 3), side=st.sampled_from(["keep_start", "keep_end"]), bos=st.booleans())
def test_laws_of_truncation(sizes, side, bos):
    tokenizer = words_tokenizer(eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))
    example = pair("w2 " + words(2, sizes[0]), "w3 " + words(20, sizes[1]), "w4 " + words(20, sizes[2]))
    got = one(tokenizer, example, truncation_side=side, max_prompt_tokens=9, max_tokens=20)
    for ids, num_words in ((ids_of(got, "chosen"), 1 + sizes[1]), (ids_of(got, "rejected"), 1 + sizes[2])):
        assert 1 <= len(ids) <= 20 - len(got.prompt_ids)
        cut = len(ids) < num_words + 1
        assert ids.tolist().count(EOS) == (not cut)
        assert not cut or len(got.prompt_ids) + len(ids) == 20, "cut no more than needed"
    assert got.prompt_ids.tolist().count(BOS) == bos
    assert (got.prompt_ids[0] == BOS) == bos
    if bos + 1 + sizes[0] + max(sizes[1:]) + 2 <= 20:
        assert len(got.prompt_ids) == bos + 1 + sizes[0]
    else:
        assert len(got.prompt_ids) == min(9, bos + 1 + sizes[0])


def test_prompt_and_response_are_tokenised_apart(tokenizer):
    """' capital' is one token of the learned vocabulary, but the boundary inside it stays a boundary."""
    assert len(tokenizer(" capital", add_special_tokens=False)["input_ids"]) == 1
    got = one(tokenizer, pair("The cap", "ital", "acity"), max_prompt_tokens=40, max_tokens=50)
    assert tokenizer.decode(got.prompt_ids) == "<s>The cap"
    assert tokenizer.decode(ids_of(got, "chosen")) == "ital</s>"


def test_control_tokens_in_a_text_prompt_count_and_in_a_response_are_text(tokenizer):
    got = one(tokenizer, pair("<s>Hi<s>", "<s>Yes</s> </s>\n", "No"), max_prompt_tokens=40, max_tokens=50)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert got.prompt_ids.tolist() == tokenizer("<s>Hi<s>")["input_ids"]
    assert got.prompt_ids.tolist().count(bos) == 3
    chosen = ids_of(got, "chosen").tolist()
    assert tokenizer.decode(chosen) == "<s>Yes</s>"
    assert bos not in chosen
    assert chosen.count(eos) == 1


def prompts(tokenizer, template="auto"):
    return PromptEncoder(tokenizer, template, {}, None, "keep_end")


def rendered(messages, tokenizer):
    template = ChatTemplate(tokenizer)
    return template.encoder.shown(Conversation(template, messages).text)


def test_bos_stands_in_front_where_the_tokenizer_puts_it():
    tokenizer = words_tokenizer(bos_token="</s>", eos_token="</s>")
    first, second = map(prompts(tokenizer).encode, ["w2 </s> w3", "</s> w2"])
    assert first.tolist() == [EOS, 2, EOS, 3]
    assert second.tolist() == [EOS, EOS, 2]
    assert ids_of(one(tokenizer, pair("w2", "w3", "w4")), "chosen").tolist() == [3, EOS]
    without = words_tokenizer(adds_bos=False, bos_token="<s>", eos_token="</s>")
    assert one(without, pair("w2 w3", "w4", "w5")).prompt_ids.tolist() == [2, 3]


def test_messages_use_the_default_tags_or_the_tokenizers_own_template(tokenizer):
    messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))
    tags = "<|system|>\ns\n<|user|>\nu\n<|assistant|>\na\n<|user|>\nv\n<|assistant|>\n"
    assert rendered(messages, tokenizer) == "<s>" + tags
    assert rendered(messages, words_tokenizer(eos_token="</s>")) == tags
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}[{{ m.role }}]{{ bos_token }}{{ m.content }}{% endfor %}"
    assert rendered(messages, own) == "[system]<s>s[user]<s>u[assistant]<s>a[user]<s>v"
    got = one(own, pair(messages, "yes", "no"), max_prompt_tokens=60, max_tokens=80)
    assert tokenizer.decode(got.prompt_ids) == "[system]<s>s[user]<s>u[assistant]<s>a[user]<s>v"
    assert tokenizer.decode(ids_of(got, "chosen")) == "[assistant]<s>yes</s>"


def test_a_string_prompt_is_a_user_message_only_if_asked(tokenizer):
    text, turn = "<s>hello", rendered((Message("user", "hello"),), tokenizer)
    assert tokenizer.decode(prompts(tokenizer).encode("hello")) == text
    assert tokenizer.decode(prompts(tokenizer, "chat").encode("hello")) == turn
    got = one(tokenizer, pair("hello", "yes", "no"), template="chat", max_prompt_tokens=40, max_tokens=50)
    assert tokenizer.decode(got.prompt_ids) == "<s><|user|>\nhello\n<|assistant|>\n"


def test_rows_that_cannot_be_used_are_reported_and_left_out(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ messages }}"
    )
    good, bad = (Message("user", "u"),), (Message("system", "s"), Message("user", "u"))
    examples = [pair(bad, "a", "b", "file:1"), pair(good, "c", "d", "file:2")]
    tokenized, bad_rows = tokenized_with(
        examples, strict, max_prompt_tokens=99, max_tokens=100, truncation_side="keep_end"
    )
    assert [(e.row_id, e.prompt_id, text_id_of(e, "chosen")) for e in tokenized] == [("file:2", 0, 0)]
    assert [row.row_id for row in bad_rows.rows] == ["file:1"]
    assert "roles system, user: roles must alternate" in bad_rows.first.reason


def test_a_response_of_an_end_token_alone_is_empty(tokenizer):
    for prompt in ("p", (Message("user", "p"),)):
        tokenized, bad_rows = tokenized_with(
            [pair(prompt, f" {tokenizer.eos_token}\n", "b")],
            tokenizer,
            max_prompt_tokens=99,
            max_tokens=100,
            truncation_side="keep_end",
        )
        assert not tokenized
        assert bad_rows.first.reason == "empty chosen response: an end token alone"


def test_an_empty_prompt_needs_a_bos():
    arguments = {"max_prompt_tokens": 4, "max_tokens": 10, "truncation_side": "keep_start"}
    examples = [pair("", "w3", "w4")]
    tokenized, bad_rows = tokenized_with(examples, words_tokenizer(eos_token="</s>"), **arguments)
    assert not tokenized
    assert bad_rows.rows == [("file:1", "the prompt is empty, and the tokenizer has no BOS to stand for it")]
    tokenized, bad_rows = tokenized_with(examples, words_tokenizer(bos_token="<s>", eos_token="</s>"), **arguments)
    assert tokenized[0].prompt_ids.tolist() == [BOS]
    assert not bad_rows


def test_ids_number_distinct_prompts_and_responses():
    tokenizer = words_tokenizer(eos_token="</s>")
    long = words(2, 12)
    examples = [
        pair("w2", "w5", "w6"),
        pair(long, "w6", None),
        pair(long + " w3", None, "w7"),  # cut to the same tokens, and yet another prompt
        pair("w2", "w6", "w5"),
    ]
    tokenized, _ = tokenized_with(examples, tokenizer, max_prompt_tokens=4, max_tokens=10, truncation_side="keep_start")
    assert [example.prompt_id for example in tokenized] == [0, 1, 2, 0]
    assert [text_id_of(example, "chosen") for example in tokenized] == [0, 1, -1, 1]
    assert [text_id_of(example, "rejected") for example in tokenized] == [1, -1, 2, 0]
    assert ids_of(tokenized[1], "rejected") is None
    assert ids_of(tokenized[2], "chosen") is None
    np.testing.assert_array_equal(tokenized[1].prompt_ids, tokenized[2].prompt_ids)
    assert all(ids_of(example, "mismatched") is None for example in tokenized)


def test_mismatched_responses_answer_the_next_other_prompt():
    tokenizer = words_tokenizer(eos_token="</s>")
    examples = [
        pair("w2", "w10", "w20"),
        pair("w2", "w11", "w21"),
        pair("w3", None, words(22, 12)),
        pair("w4 w4 w4", "w13", None),
        pair("w2", "w14", "w24"),
    ]
    tokenized, _ = tokenized_with(
        examples, tokenizer, max_prompt_tokens=4, max_tokens=10, truncation_side="keep_start", mismatched=True
    )
    got = [ids_of(example, "mismatched").tolist() for example in tokenized]
    assert got == [list(range(22, 31)), list(range(22, 31)), [13, EOS], [14, EOS], list(range(22, 31))]


def test_mismatched_responses_need_two_prompts():
    examples = [pair("w2", "w3", "w4")] * 2
    with pytest.raises(ValueError, match="All 2 examples have the same prompt"):
        tokenized_with(
            examples,
            words_tokenizer(eos_token="</s>"),
            max_prompt_tokens=4,
            max_tokens=10,
            truncation_side="keep_start",
            mismatched=True,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_prompt_tokens": 10}, "max_prompt_tokens=10 must .* leave room for a response in max_tokens=10"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0 must be at least 1"),
        ({"truncation_side": "left"}, "truncation_side='left' is unknown; use one of keep_start, keep_end"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        one(words_tokenizer(eos_token="</s>"), pair("w2", "w3", "w4"), **arguments)


def test_an_unknown_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="template='plain' is unknown; use one of auto, chat"):
        prompts(tokenizer, "plain").encode("hello")


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match=r"no EOS token.*tokenizer_config.json"):
        one(words_tokenizer(bos_token="<s>"), pair("w2", "w3", "w4"))


def test_no_examples_give_none(tokenizer):
    arguments = {"max_prompt_tokens": 4, "max_tokens": 10, "truncation_side": "keep_end", "mismatched": True}
    found, faults = tokenized_with([], tokenizer, **arguments)
    assert (list(found), faults) == ([], Faults())


def test_any_number_of_responses_of_one_kind_follow_one_prompt():
    answers = [("chosen", "w10"), ("rejected", "w20"), ("chosen", words(30, 9)), ("chosen", "w10 w11")]
    example = PreferenceExample("file:1", "w2 w3", tuple(Response(*answer) for answer in answers))
    got = one(words_tokenizer(eos_token="</s>"), example)
    assert [(r.kind, r.ids.tolist(), r.text_id) for r in got.responses] == [
        ("chosen", [10, EOS], 0),
        ("rejected", [20, EOS], 1),
        ("chosen", list(range(30, 38)), 2),
        ("chosen", [10, 11, EOS], 3),
    ]


def test_what_an_example_is_in_tokens_does_not_depend_on_what_it_comes_with():
    """So that processes can share the work: parts encoded on their own join to the same."""
    tokenizer, limits = words_tokenizer(eos_token="</s>"), TokenLimits(4, 10, "keep_end")
    examples = [pair(words(2, 1 + i % 7), words(20, i % 9), None if i % 2 else "w50", f"file:{i}") for i in range(30)]
    examples[4] = pair("", "w2", "w3", "file:4")
    parts = [encode_examples(examples[first : first + 7], tokenizer, limits) for first in range(0, 30, 7)]
    joined = join_encoded(examples, [found for part in parts for found in part], limits, mismatched=True)
    whole, faults = tokenize_examples(examples, tokenizer, limits, mismatched=True)
    assert repr((list(joined.examples), joined.faults)) == repr((list(whole), faults))
    assert joined.faults.rows == [("file:4", "the prompt is empty, and the tokenizer has no BOS to stand for it")]
