"""Scored responses to a prompt: read, chosen or rejected by a rule, and refused or left out in one clear line."""

import numpy as np
import pytest

from rpo_jax.config import ConfigError, DataConfig
from rpo_jax.core.records import Message, Row
from rpo_jax.data.examples import make_examples
from rpo_jax.data.layouts.ranked import RULES, Rule

ROW = {"prompt": "Why?", "responses": ["a", "b", "c", "d"], "scores": [9, 6, 7.5, 2]}


def rows_of(*records):
    return [Row(record, "rows.jsonl", line) for line, record in enumerate(records, start=1)]


def example_of(record, rule="above_mean", threshold=None):
    (example,) = make_examples(rows_of(record), rule=Rule(rule, threshold)).examples
    return example


def sides(record, *rule):
    """Texts of the chosen and of the rejected responses, as they are ordered."""
    found = example_of(record, *rule).responses
    return tuple("".join(one.text for one in found if one.kind == kind) for kind in ("chosen", "rejected"))


def reason_of(record, rule="above_mean", threshold=None):
    with pytest.raises(ValueError, match=r"^rows\.jsonl:1: ") as caught:
        make_examples(rows_of(record), "ranked", rule=Rule(rule, threshold))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("rows.jsonl:1: ").partition(". 1 of ")[0]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([9, 6, 7.5, 2], {"above_mean": ("ac", "db"), "best": ("a", "dbc"), "top_half": ("ac", "db")}),
        ([5, 5, 5, 1], {"above_mean": ("abc", "d"), "best": ("abc", "d"), "top_half": ("abc", "d")}),
        ([5, 3, 3, 3], {"above_mean": ("a", "bcd"), "best": ("a", "bcd"), "top_half": ("a", "bcd")}),
        ([1, 2, 3], {"above_mean": ("c", "ab"), "best": ("c", "ab"), "top_half": ("c", "ab")}),
        ([-1e308, 1e38, 0], None),
        ([0.1, 0.1, 0.2], {"above_mean": ("c", "ab"), "best": ("c", "ab"), "top_half": ("c", "ab")}),
    ],
)
def test_a_rule_parts_the_best_from_the_rest_each_with_its_surest_in_front(scores, expected):
    record = {**ROW, "responses": list("abcd")[: len(scores)], "scores": scores}
    if expected is None:
        assert "does not hold a finite number" in reason_of(record)
        return
    assert {rule: sides(record, rule) for rule in RULES} == expected


def test_a_threshold_needs_no_other_response():
    assert sides(ROW, "threshold", 6.0) == ("acb", "d")
    assert sides(ROW, "threshold", 10.0) == ("", "dbca")
    assert sides({"prompt": "Why?", "responses": ["a"], "scores": [3]}, "threshold", 3.0) == ("a", "")
    assert sides({**ROW, "scores": [1, 1, 1, 1]}, "threshold", 0.5) == ("abcd", "")


def test_scores_go_with_their_responses():
    found = example_of(ROW).responses
    assert [(one.text, one.kind, one.score) for one in found] == [
        ("a", "chosen", 9.0),
        ("c", "chosen", 7.5),
        ("d", "rejected", 2.0),
        ("b", "rejected", 6.0),
    ]


def test_equal_responses_are_one_with_their_mean_score():
    found = example_of({"prompt": "Why?", "responses": ["a", "b", "a"], "scores": [1, 4, 9]}).responses
    assert [(one.text, one.kind, one.score) for one in found] == [("a", "chosen", 5.0), ("b", "rejected", 4.0)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ASKED = (Message("user", "Why?"),)
OBJECTS = [{"response": "a", "overall_score": 9}, {"response": "b", "overall_score": 2}]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (
            {
                "instruction": "Why?",
                "completions": [{"response": "a", "overall_score": 9}, {"response": "b", "overall_score": 2}],
                "models": ["x", "y"],
            },
            ASKED,
        ),
        ({"prompt": "Why?", "completions": [{"text": "a", "rating": 5}, {"text": "b", "rating": 1}]}, "Why?"),
        ({"prompt": "Why?", "generations": ["a", "b"], "ratings": [5, 1]}, "Why?"),
        ({"prompt": [user("Why?")], "responses": [[assistant("a")], assistant("b")], "scores": [2, 1]}, ASKED),
        ({"responses": [[user("Why?"), assistant("a")], [user("Why?"), assistant("b")]], "scores": [2, 1]}, ASKED),
        ({"prompt": "Why?", "responses": [{"content": "a"}, {"content": "b"}], "scores": [2, 1]}, "Why?"),
    ],
)
def test_the_forms_that_files_have(record, prompt):
    found = make_examples(rows_of(record))
    assert found.layout == "ranked"
    (example,) = found.examples
    assert example.prompt == prompt
    assert [(one.kind, one.text) for one in example.responses] == [("chosen", "a"), ("rejected", "b")]


def test_pairs_with_lists_beside_are_pairs():
    record = {"prompt": "Why?", "chosen": "a", "rejected": "b", "completions": ["a", "b"], "ratings": [2, 1]}
    assert make_examples(rows_of(record)).layout == "preference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [9, "high", 7, 2]}, "column 'scores' does not hold a number: got str (response 2)"),
        ({"scores": [9, None, 7, 2]}, "column 'scores' is null (response 2)"),
        ({"scores": [9, float("nan"), 7, 2]}, "column 'scores' does not hold a finite number: got nan (response 2)"),
        ({"scores": [True, 1, 2, 3]}, "column 'scores' does not hold a number: got bool (response 1)"),
        ({"scores": [9, 6, 7]}, "4 responses have 3 scores: each needs its own"),
        ({"scores": 9}, "column 'scores' does not hold a list: got int"),
        ({"responses": [], "scores": []}, "no responses: column 'responses' is empty"),
        ({"responses": ["a", " \n", "c", "d"]}, "empty response: number 2"),
        ({"responses": ["a", 3, "c", "d"]}, "column 'responses' does not hold messages: got int"),
        (
            {"responses": ["a", None, "c", "d"]},
            "column 'responses' does not hold texts or messages alone: got",
        ),
        (
            {"responses": ["a", {"model": "x"}, "c", "d"]},
            "column 'responses' has an object without a text: it has",
        ),
        ({"responses": ["a"], "scores": [1]}, "one response: data.ranked_rule=above_mean compares several"),
        ({"prompt": " "}, "empty prompt"),
    ],
)
def test_bad_rows_are_refused_with_a_reason(change, reason):
    assert reason_of({**ROW, **change}).startswith(reason)


def test_objects_without_a_score_are_refused():
    record = {"prompt": "Why?", "completions": [{"text": "a", "rating": 5}, {"text": "b", "model": "x"}]}
    assert reason_of(record).startswith("column 'scores' is missing: response 2 has none of overall_score, score")


def test_rows_whose_scores_are_all_equal_are_left_out_and_told():
    """They are no faults: the default refuses data with an unusable row."""
    found = make_examples(rows_of(ROW, {**ROW, "scores": [3, 3, 3, 3]}, ROW))
    assert [example.row_id for example in found.examples] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert not found.faults
    assert found.left_out.report() == "  1  all scores are equal, first rows.jsonl:2"
    with pytest.raises(ValueError, match=r"data\.ranked_rule=best leaves out 1 of 1 rows \(all scores are equal: 1\)"):
        make_examples(rows_of({**ROW, "scores": [3, 3, 3, 3]}), rule=Rule("best"))


def test_the_threshold_and_its_rule_go_together():
    DataConfig(ranked_rule="threshold", ranked_threshold=0.0)
    for rule, threshold in (("threshold", None), ("best", 3.0)):
        with pytest.raises(ConfigError, match=r"data\.ranked_threshold=.* and data\.ranked_rule=.* do not go together"):
            DataConfig(ranked_rule=rule, ranked_threshold=threshold)


def test_the_default_rule_never_leaves_a_side_empty():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(0, 3, rng.integers(2, 6)).tolist()
        if len(set(scores)) > 1:
            record = {"prompt": "Why?", "responses": [f"r{k}" for k in range(len(scores))], "scores": scores}
            assert all(all(sides(record, rule)) for rule in RULES)
