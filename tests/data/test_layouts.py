"""Each layout: what its data sets hold becomes the example that they mean, and what it must refuse is refused."""

import itertools

import pytest

from rpo_jax.core.records import Message, Row
from rpo_jax.data.examples import LAYOUTS, detect_layout, make_examples

from .ragged import text_of


def rows_of(*records):
    return [Row(record, "rows.jsonl", line) for line, record in enumerate(records, start=1)]


def parts(example):
    return example.prompt, text_of(example, "chosen"), text_of(example, "rejected")


def parts_of(record, layout="auto"):
    (example,) = make_examples(rows_of(record), layout).examples
    return parts(example)


def reason_of(record, layout):
    """Why a layout refuses a record, beside one good record of its own."""
    good = rows_of(*GOOD[layout])
    result = make_examples([*good, Row(record, "rows.jsonl", 99)], layout, "skip")
    (bad,) = result.faults.rows
    assert bad.row_id == "rows.jsonl:99"
    return bad.reason


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def said(*turns):
    return tuple(itertools.starmap(Message, turns))


REDDIT = {"id": "t3", "subreddit": "cats", "title": "My cat", "post": "It sits.", "site": None, "article": None}
SUMMARIES = [{"text": " It stands.", "policy": "a"}, {"text": "It sits.\n", "policy": "b"}]


def oasst(key, parent, role, text, rank=None, **more):
    return {"message_id": key, "parent_id": parent, "text": text, "role": role, "rank": rank, **more}


TREE = [
    oasst("root", None, "prompter", "Hi", lang="en"),
    oasst("r1", "root", "assistant", "worst", 2),
    oasst("r0", "root", "assistant", "best", 0.0),
    oasst("r2", "root", "assistant", "middle", 1),
    oasst("next", "r0", "prompter", "And?"),
    oasst("n1", "next", "assistant", "lesser", 1),
    oasst("n0", "next", "assistant", "better", 0),
    oasst("unranked", "next", "assistant", "no rank", float("nan")),
    oasst("gone", "next", "assistant", "deleted", 2, deleted=True),
    oasst("lone", "n0", "prompter", "One reply only"),
    oasst("only", "lone", "assistant", "single", 0),
]

# One or more records per layout that give at least one example.
GOOD = {
    "preference": [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
    "unpaired": [{"prompt": "Why?", "completion": " So.", "label": True}],
    "ranked": [{"prompt": "Why?", "responses": ["So.", "No.", "Hm."], "scores": [3, 1, 2]}],
    "hh_rlhf": [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}],
    "summarize_from_feedback": [{"info": REDDIT, "summaries": SUMMARIES, "choice": 1}],
    "ultrafeedback_binarized": [
        {
            "prompt": "Why?",
            "prompt_id": "0a",
            "chosen": [user("Why?"), assistant("So.")],
            "rejected": [user("Why?"), assistant("No.")],
            "messages": [user("Why?"), assistant("So.")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        }
    ],
    "prompt_completion": [{"prompt": "Why?", "completion": "So."}],
    "shp": [{"history": "Why?", "human_ref_A": "No.", "human_ref_B": "So.", "labels": 0, "score_ratio": 2.0}],
    "oasst1": TREE,
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "So."},
            "rejected": {"from": "gpt", "value": "No."},
        }
    ],
}


def test_every_layout_has_a_record_here_a_description_and_a_side():
    assert set(GOOD) == set(LAYOUTS)
    assert all(layout.description for layout in LAYOUTS.values())
    assert {name for name, layout in LAYOUTS.items() if layout.truncation_side == "keep_start"} == {
        "summarize_from_feedback",
        "shp",
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_detected_by_its_columns(name):
    rows = rows_of(*GOOD[name])
    assert detect_layout(rows) == name
    assert make_examples(rows) == make_examples(rows, name)


# Not read, but part of what tells a layout from others; a reply may have no rank.
UNREAD = {
    ("ultrafeedback_binarized", "prompt"),
    ("ultrafeedback_binarized", "prompt_id"),
    ("oasst1", "rank"),
}


@pytest.mark.parametrize(
    ("name", "column"),
    [(name, column) for name in LAYOUTS for column in LAYOUTS[name].columns if (name, column) not in UNREAD],
)
def test_a_missing_null_or_mistyped_column_is_named(name, column):
    (record,) = GOOD[name][-1:]
    missing = {key: value for key, value in record.items() if key != column}
    assert f"column '{column}' is missing: the row has " in reason_of(missing, name)
    assert f"column '{column}'" in reason_of(record | {column: 2.5}, name)
    if column != "parent_id":  # null at a tree's root
        assert reason_of(record | {column: None}, name) == f"column '{column}' is null"


# preference


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": " Why? ", "chosen": " So.\n", "rejected": "No."}, (" Why? ", " So.\n", "No.")),
        (
            {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
            (said(("user", "Why?")), "So.", "No."),
        ),
        (
            {"prompt": [user("Why?")], "chosen": "So.", "rejected": assistant("No.")},
            (said(("user", "Why?")), "So.", "No."),
        ),
        (
            {"prompt": "Why?", "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
            (said(("user", "Why?")), "So.", "No."),
        ),
        (
            {
                "chosen": [{"role": "system", "content": "Be brief."}, user("Why?"), assistant("So.")],
                "rejected": [{"role": "system", "content": "Be brief."}, user("Why?"), assistant("No.")],
            },
            (said(("system", "Be brief."), ("user", "Why?")), "So.", "No."),
        ),
        (
            {
                "prompt": "Why?",
                "chosen": [user("Why?"), assistant("So.")],
                "rejected": [user("Why?"), assistant("No.")],
            },
            (said(("user", "Why?")), "So.", "No."),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            ("The sky is", " blue.", " black."),
        ),
        ({"chosen": "Sky is\tblue", "rejected": "Sky is grey"}, ("Sky is", "\tblue", " grey")),
        ({"chosen": "Is it? Yes.", "rejected": "Is it? Yes. No."}, ("Is it?", " Yes.", " Yes. No.")),
        # A template that was rendered before: its line break belongs to the prompt.
        (
            {"chosen": "Hi<e>\n<b>bot\nSo.<e>", "rejected": "Hi<e>\n<b>bot\nNo.<e>"},
            ("Hi<e>\n<b>bot\n", "So.<e>", "No.<e>"),
        ),
        ({"chosen": "<b>bot\nSo.", "rejected": "<b>bot\n\nSo."}, ("<b>bot\n", "So.", "\nSo.")),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Wh", "y?")]}],
                "chosen": "So.",
                "rejected": "No.",
            },
            (said(("user", "Why?")), "So.", "No."),
        ),
    ],
)
def test_preference_reads_explicit_and_implicit_prompts(record, expected):
    assert parts_of(record) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "blue sky", "rejected": "blank sky"}, "no shared prompt: chosen and rejected"),
        ({"chosen": [assistant("So.")], "rejected": [assistant("No.")]}, "no shared prompt: the conversations"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "no shared prompt: the conversations differ",
        ),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("d")]},
            "column 'chosen' does not end with an assistant turn",
        ),
        (
            {"prompt": "b", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
            "no shared prompt: the column 'prompt'",
        ),
        (
            {"prompt": [user("q")], "chosen": [user("a")], "rejected": [assistant("d")]},
            "column 'chosen' is not one assistant turn: its roles are user",
        ),
        (
            {"prompt": [user("q")], "chosen": "a", "rejected": []},
            "column 'rejected' is not one assistant turn: its roles are none",
        ),
        (
            {"prompt": [{"role": "system", "content": "s"}], "chosen": "a", "rejected": "b"},
            "prompt does not end with a user turn: it ends with system",
        ),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt does not end with a user turn"),
        ({"prompt": [user(" ")], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, "column 'prompt' does not hold messages: got str"),
        (
            {"prompt": [{"role": "moderator", "content": "x"}], "chosen": "a", "rejected": "b"},
            "column 'prompt' has an unknown role: 'moderator'",
        ),
        ({"prompt": [user(None)], "chosen": "a", "rejected": "b"}, "column 'prompt' has a message without text"),
        (
            {"prompt": [user([{"type": "image"}])], "chosen": "a", "rejected": "b"},
            "column 'prompt' has a message part that is not text: 'image'",
        ),
        ({"prompt": "\n ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty chosen response"),
        ({"prompt": "q", "chosen": "a", "rejected": " \t"}, "empty rejected response"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "not valid unicode text: lone surrogate U+D83D"),
        ({"prompt": [user("\udc00")], "chosen": "a", "rejected": "b"}, "not valid unicode text"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "column 'prompt' is null"),
    ],
)
def test_preference_refuses_with_a_reason(record, reason):
    assert reason_of(record, "preference").startswith(reason)


# unpaired


@pytest.mark.parametrize("label", [True, False, 1, 0])
@pytest.mark.parametrize("conversational", [True, False])
def test_unpaired_rows_are_chosen_or_rejected_by_their_label(label, conversational):
    record = {"prompt": "Why?", "completion": " So.", "label": label}
    expected_prompt = "Why?"
    if conversational:
        record |= {"prompt": [user("Why?")], "completion": [assistant(" So.")]}
        expected_prompt = said(("user", "Why?"))
    assert parts_of(record) == (expected_prompt, *((" So.", None) if label else (None, " So.")))


def test_unpaired_refuses_what_it_cannot_tell():
    record = GOOD["unpaired"][0]
    assert reason_of(record | {"label": 2}, "unpaired") == "column 'label' is neither true nor false: got 2"
    assert reason_of(record | {"label": "no"}, "unpaired").endswith("got 'no'")
    assert reason_of(record | {"completion": " "}, "unpaired") == "empty chosen response"
    assert reason_of(record | {"completion": "", "label": 0}, "unpaired") == "empty rejected response"


# hh_rlhf


def transcripts(prompt, chosen, rejected):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_hh_prompt_is_the_common_prefix_up_to_the_last_assistant_mark():
    prompt = "\n\nHuman: Hi \n\nAssistant: I say: Human: ok\n\nmore\n\nHuman: And?\n\nAssistant:"
    expected = said(("user", "Hi"), ("assistant", "I say: Human: ok\n\nmore"), ("user", "And?"))
    # Both responses begin alike, so the common prefix reaches into them.
    record = transcripts(prompt, " I think so. ", " I think not.\n")
    assert parts_of(record) == (expected, "I think so.", "I think not.")


def test_hh_turns_of_one_speaker_are_joined():
    record = transcripts(
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:", " f", " g"
    )
    assert parts_of(record)[0] == said(("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "no shared prompt: the texts do not begin",
        ),
        (transcripts("Human: a\n\nAssistant:", " b", " c"), "no shared prompt: the texts do not begin"),
        (transcripts("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", " c", " d"), "prompt does not end with a user"),
        (transcripts("\n\nHuman: a\n\nAssistant:", " ", " b"), "empty chosen response"),
        (transcripts("\n\nHuman: a\n\nAssistant:", " b", ""), "empty rejected response"),
        (transcripts("\n\nHuman: a\n\nAssistant:", " b", " b  "), "chosen equals rejected"),
        (transcripts("\n\nHuman:  \n\nAssistant:", " b", " c"), "empty prompt"),
    ],
)
def test_hh_refuses_with_a_reason(record, reason):
    assert reason_of(record, "hh_rlhf").startswith(reason)


def test_a_transcript_beside_a_prompt_column_is_an_ordinary_response():
    record = transcripts("\n\nHuman: a\n\nAssistant:", " b", " c")
    assert detect_layout(rows_of(record)) == "hh_rlhf"
    assert detect_layout(rows_of(record | {"prompt": "Continue"})) == "preference"


# summarize_from_feedback


@pytest.mark.parametrize("choice", [0, 1])
def test_summaries_follow_the_prompt_after_one_space(choice):
    prompt, chosen, rejected = parts_of({"info": REDDIT, "summaries": SUMMARIES, "choice": choice})
    assert prompt == "SUBREDDIT: r/cats\nTITLE: My cat\nPOST: It sits.\nTL;DR:"
    responses = (" It stands.", " It sits.")
    assert (chosen, rejected) == (responses[choice], responses[1 - choice])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"info": REDDIT | {"subreddit": None, "post": None, "article": "News"}}, "not a Reddit post: 'info'"),
        ({"info": REDDIT | {"post": " "}}, "empty prompt"),
        ({"info": REDDIT | {"title": None}}, "column 'title' is null"),
        ({"choice": 2}, "column 'choice' is neither 0 nor 1: got 2"),
        ({"summaries": SUMMARIES[:1]}, "column 'summaries' does not hold two objects"),
        ({"summaries": ["a", "b"]}, "column 'summaries' does not hold two objects"),
        ({"summaries": [{"text": " "}, {"text": "b"}]}, "empty rejected response"),
    ],
)
def test_summaries_refused_with_a_reason(change, reason):
    record = GOOD["summarize_from_feedback"][0] | change
    assert reason_of(record, "summarize_from_feedback").startswith(reason)


# ultrafeedback_binarized, shp, sharegpt


def test_ultrafeedback_takes_the_prompt_from_the_conversations():
    earlier = [user("Hi"), assistant("Hello")]
    record = GOOD["ultrafeedback_binarized"][0] | {
        "chosen": [*earlier, user("Why?"), assistant("So.")],
        "rejected": [*earlier, user("Why?"), assistant("No.")],
    }
    assert parts_of(record) == (said(("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")), "So.", "No.")


@pytest.mark.parametrize("sides", [("So.", "No."), ([assistant("So.")], [assistant("No.")])])
def test_pairs_of_answers_whose_prompt_has_an_id_are_no_ultrafeedback(sides):
    record = {"prompt": "Why?", "prompt_id": "0a", "chosen": sides[0], "rejected": sides[1]}
    assert detect_layout(rows_of(record)) == "preference"
    assert parts_of(record)[1:] == ("So.", "No.")


@pytest.mark.parametrize(("label", "chosen", "rejected"), [(1, "No.", "So."), (0, "So.", "No.")])
def test_shp_label_one_prefers_the_first_comment(label, chosen, rejected):
    record = GOOD["shp"][0] | {"labels": label}
    assert parts_of(record) == (said(("user", "Why?")), chosen, rejected)


def test_shp_refuses_another_label():
    reason = reason_of(GOOD["shp"][0] | {"labels": -1}, "shp")
    assert reason == "column 'labels' is neither 1 (A preferred) nor 0 (B preferred): got -1"


def test_sharegpt_reads_roles_and_the_system_column():
    record = GOOD["sharegpt"][0]
    assert parts_of(record) == (said(("user", "Why?")), "So.", "No.")
    with_system = record | {"system": "Be brief."}
    assert parts_of(with_system)[0] == said(("system", "Be brief."), ("user", "Why?"))
    assert parts_of(record | {"system": ""}) == parts_of(record | {"system": None}) == parts_of(record)
    twice = with_system | {"conversations": [{"from": "system", "value": "x"}, *record["conversations"]]}
    assert reason_of(twice, "sharegpt").startswith("two system prompts")


def test_sharegpt_refuses_a_conversation_that_waits_for_no_answer():
    record = GOOD["sharegpt"][0]
    ended = record | {"conversations": [*record["conversations"], {"from": "gpt", "value": "So."}]}
    assert reason_of(ended, "sharegpt").startswith("prompt does not end with a user turn")
    other = record | {"chosen": {"from": "human", "value": "x"}}
    assert reason_of(other, "sharegpt").startswith("column 'chosen' is not one assistant turn")


# oasst1


def test_oasst_pairs_the_best_reply_with_every_other_ranked_one():
    result = make_examples(rows_of(*TREE))
    root = said(("user", "Hi"))
    path = said(("user", "Hi"), ("assistant", "best"), ("user", "And?"))
    assert [parts(example) for example in result.examples] == [
        (root, "best", "middle"),
        (root, "best", "worst"),
        (path, "better", "lesser"),
    ]
    assert [example.row_id for example in result.examples] == [f"rows.jsonl:{line}" for line in (4, 2, 6)]


def test_oasst_does_not_depend_on_the_order_of_rows():
    expected = sorted(parts(example) for example in make_examples(rows_of(*TREE)).examples)
    for order in (TREE[::-1], TREE[5:] + TREE[:5]):
        assert sorted(parts(example) for example in make_examples(rows_of(*order)).examples) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (oasst("root", None, "prompter", "again"), "the message_id occurs twice"),
        (oasst("x", "root", "moderator", "x"), "column 'role' has an unknown role: 'moderator'"),
        (oasst("x", "root", "assistant", "x", "first"), "column 'rank' does not hold a number: got str"),
        (oasst("x", "root", "assistant", "x", 0), "the reply shares the best rank with another"),
        (oasst("x", "root", "assistant", " ", 7), "empty rejected response"),
        (oasst("x", "root", "assistant", "best", 7), "chosen equals rejected"),
    ],
)
def test_oasst_refuses_with_a_reason(record, reason):
    assert reason_of(record, "oasst1") == reason


def test_oasst_refuses_replies_whose_tree_is_broken():
    replies = [oasst("b", "a", "assistant", "good", 0), oasst("c", "a", "assistant", "bad", 1)]
    for first, reason in (
        (oasst("a", "nowhere", "prompter", "Hi"), "no shared prompt: an earlier message of the tree is missing"),
        (oasst("a", "a", "prompter", "Hi"), "no shared prompt: the messages' parents form a circle"),
        (oasst("a", None, "assistant", "Hi"), "prompt does not end with a user turn: it ends with assistant"),
    ):
        (bad,) = make_examples(rows_of(*TREE, first, *replies), on_bad_row="skip").faults.rows
        assert bad == (f"rows.jsonl:{len(TREE) + 3}", reason)
