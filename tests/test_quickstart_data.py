"""The bundled preference pairs: what the generator writes, and what the quickstart's claims rest on."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.tasks import quickstart

ROOT = Path(__file__).resolve().parents[1]
FILES = ("quickstart_train.jsonl", "quickstart_eval.jsonl")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "configs" / "data" / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def write_pairs() -> Callable[[list[str]], None]:
    return runpy.run_path(str(ROOT / "scripts" / "make_quickstart_data.py"))["main"]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return read(FILES[0])


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return read(FILES[1])


@pytest.fixture(scope="module")
def rows(train, held_out) -> list[dict]:
    return train + held_out


def test_committed_files_are_what_the_generator_writes(write_pairs, tmp_path):
    write_pairs(["--out", str(tmp_path)])
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "configs" / "data" / name).read_bytes()


def test_another_seed_writes_other_pairs(write_pairs, tmp_path):
    write_pairs(["--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / FILES[0]).read_bytes() != (ROOT / "configs" / "data" / FILES[0]).read_bytes()


def test_enough_pairs_over_enough_topics(train, held_out):
    assert len(train) >= 1_500
    assert len(held_out) >= 200
    assert {row["topic"] for row in train} == {row["topic"] for row in held_out}
    assert len({row["topic"] for row in train}) >= 50


def test_no_prompt_occurs_twice(rows):
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_every_prompt_names_its_topic_and_no_other(rows):
    assert all(quickstart.find_topic(row["prompt"]).name == row["topic"] for row in rows)


def test_gold_prefers_the_chosen_answer_and_is_what_the_row_says(rows):
    for row in rows:
        chosen = quickstart.gold_score(row["prompt"], row["chosen"])
        rejected = quickstart.gold_score(row["prompt"], row["rejected"])
        assert 0 <= rejected < chosen <= 1
        assert (chosen, rejected) == (row["gold_chosen"], row["gold_rejected"])


def test_the_rejected_answer_is_better_in_nothing(rows):
    for row in rows:
        chosen, rejected = (quickstart.criteria_met(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert all(chosen[name] >= rejected[name] for name in quickstart.CRITERIA)


def test_each_criterion_is_met_by_about_half_of_the_chosen_answers(train):
    met = [quickstart.criteria_met(row["prompt"], row["chosen"]) for row in train]
    for name in quickstart.CRITERIA:
        assert sum(one[name] for one in met) / len(met) == pytest.approx(0.53, abs=0.05)


def test_length_does_not_tell_chosen_from_rejected(train):
    chosen, rejected = (sum(len(row[side].split()) for row in train) for side in ("chosen", "rejected"))
    assert chosen == pytest.approx(rejected, rel=0.02)


def test_good_and_bad_wording_have_the_same_number_of_words():
    pairs = [tuple(advice) for topic in quickstart.TOPICS for advice in topic.tips + topic.cautions]
    pairs += zip(quickstart.COURTEOUS_OPENERS, quickstart.CURT_OPENERS, strict=True)
    pairs += zip(quickstart.DEFINITE_TIMES, quickstart.VAGUE_TIMES, strict=True)
    for good, bad in pairs:
        assert good != bad
        assert len(good.split()) == len(bad.split())


PROMPT = "What should I know about growing tomatoes on a balcony?"
BEST = (
    "Happy to help here. Water the soil early each day. Always wash your hands after digging. "
    "Next, check the soil tomorrow at noon."
)


@pytest.mark.parametrize(
    ("criterion", "response"),
    [
        ("courtesy", BEST.replace("Happy to help here", "Just look it up")),
        ("advice", BEST.replace("the soil early", "the leaves early")),
        ("advice", BEST.replace("Water the soil early each day", "Bake the loaf in a hot oven")),
        ("advice", BEST.replace("each day.", "each day. Water the leaves early each day.")),
        ("caution", BEST.replace("Always", "Never")),
        ("next_step", BEST.replace("tomorrow at noon", "at some point")),
        ("next_step", BEST.replace("check the soil", "pack a bag")),
        ("next_step", BEST + " Good luck with this."),
    ],
)
def test_one_flaw_costs_one_criterion(criterion, response):
    assert quickstart.gold_score(PROMPT, BEST) == 1
    missed = [name for name, met in quickstart.criteria_met(PROMPT, response).items() if not met]
    assert missed == [criterion]


def test_capitals_and_spacing_do_not_matter():
    assert quickstart.gold_score(PROMPT.upper(), BEST.lower().replace(". ", ".\n ")) == 1


@pytest.mark.parametrize("response", ["", "   ", "...", "?!", "\x00", "Tomatoes tomatoes tomatoes"])
def test_an_answer_that_says_nothing_scores_zero(response):
    assert quickstart.gold_score(PROMPT, response) == 0


def test_a_prompt_without_a_topic_scores_zero():
    assert quickstart.find_topic("Who won the match?") is None
    assert quickstart.gold_score("Who won the match?", BEST) == 0


@settings(deadline=None)
@given(prompt=st.one_of(st.text(), st.just(PROMPT)), response=st.text())
def test_any_text_has_a_score(prompt, response):
    assert 0 <= quickstart.gold_score(prompt, response) <= 1
