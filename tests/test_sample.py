"""A model's own answers as preference data: the rules that choose, the command, and what is refused."""

import json
import re

import numpy as np
import pytest

import rpo_jax
from rpo_jax import sample
from rpo_jax.core.records import Row
from rpo_jax.data.examples import make_examples
from rpo_jax.data.sources import read_rows
from rpo_jax.tools.sampling.selection import RULES, accepted, rso
from tests.judge_server import completion, failure, serving
from tests.runs import configured, preference_rows, write_rows

# Of shared numbers: six rewards and the random numbers that their draws take.
REWARDS = (0.3, 1.2, -0.5, 0.9, 1.2, 0.0)
UNIFORM = (0.9, 0.1, 0.5, 0.6, 0.3, 0.2, 0.7, 0.05, 0.95, 0.4, 0.8, 0.15)


@pytest.mark.parametrize(
    ("beta", "n", "expected", "draws"),
    [(0.5, 3, "bec", 8), (0.05, 2, "be", 5), (1e9, 4, "abcd", 4), (1e-9, 1, "b", 2)],
)
def test_rejection_sampling_is_that_of_algorithm_1(beta, n, expected, draws):
    numbers = iter(UNIFORM)
    found = accepted(REWARDS, n, beta, lambda: next(numbers))
    assert "".join("abcdef"[number] for number in found) == expected
    assert len(UNIFORM) - len(list(numbers)) == draws


def test_rejection_sampling_ends_with_what_there_is():
    random = np.random.default_rng(0)
    assert sorted(accepted((0.1, 0.2, 0.3), 8, 0.5, random.random)) == [0, 1, 2]
    drawn = [accepted((0.0, 1.0), 1, 1.0, random.random)[0] for _ in range(4000)]
    share = np.exp(0) / (np.exp(0) + np.exp(1))  # of the softmax, and its standard error
    # The first that is accepted of a pass in order: a with e^-1, else b; so a's chance is e^-1, not the softmax's.
    assert np.mean(np.array(drawn) == 0) == pytest.approx(np.exp(-1), abs=0.04)
    assert share < np.exp(-1)


@pytest.mark.parametrize(("name", "pairs"), [("best_worst", 1), ("first_round", 4), ("tournament", 7)])
def test_a_rule_makes_so_many_pairs_of_eight_answers_the_better_one_first(name, pairs):
    scores = [0.5, 3.0, -1.0, 2.0, 0.0, 4.0, 1.0, -2.0]
    found = RULES[name](scores, np.random.default_rng(3))
    assert len(found) == len(set(found)) == pairs
    assert all(scores[better] > scores[worse] for better, worse in found)
    if name == "tournament":
        assert sorted(worse for _, worse in found) == [0, 1, 2, 3, 4, 6, 7], "all but the best lose once"
    assert RULES[name](scores, np.random.default_rng(3)) == found
    assert RULES[name]([1.0] * 8, np.random.default_rng(3)) == [], "ties are no preferences"


def test_rso_pairs_what_it_accepts():
    scores = [float(number) for number in range(16)]
    pairs = rso(4, 1e-6)(scores, np.random.default_rng(0))
    assert sorted(number for pair in pairs for number in pair) == [12, 13, 14, 15]


RULE = "def length(prompt, response):\n    return len(response)\n"


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        data = write_rows(folder / "pairs.jsonl")
        changes = {"objective.name": "sft", "train.steps": 4, "tracking.tensorboard": False}
        self.run = rpo_jax.run(configured(data, folder / "sft", self.cache, changes)).run_dir
        rows = [{"prompt": row["prompt"]} for row in preference_rows(6)]
        self.prompts = write_rows(folder / "prompts.jsonl", rows)
        (folder / "rules.py").write_text(RULE, encoding="utf-8")

    def arguments(self, out, **changes):
        options = {
            "model": self.run,
            "prompts": self.prompts,
            "out": out,
            "score": f"rule:{self.folder / 'rules.py'}:length",
            "n": 4,
            "temperature": 1.5,
            "max-tokens": 12,
            "cache-dir": self.cache,
            "keep-unfinished": None,
        }
        options |= changes
        return [str(part) for name, value in options.items() for part in (f"--{name}", value) if part is not None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(capsys, arguments):
    status = sample.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_answers_become_pairs_that_training_reads(world, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    status, printed, error = run(capsys, world.arguments(out))
    assert (status, error) == (0, "")
    rows, answers = rows_of(out), rows_of(tmp_path / "pairs.answers.jsonl")
    assert [(row["row_id"], row["sample"]) for row in answers] == [
        (f"{world.prompts}:{line}", number) for line in range(1, 7) for number in range(4)
    ]
    assert len({row["seed"] for row in answers}) == 24
    for row in rows:
        texts = {one["response"] for one in answers if one["prompt"] == row["prompt"]}
        lengths = sorted(len(text) for text in texts if text.strip() and "\0" not in text)
        assert (row["score_chosen"], row["score_rejected"]) == (lengths[-1], lengths[0])
        assert {row["chosen"], row["rejected"]} <= texts
    assert f"{out}: {len(rows)} rows of " in printed
    statistics = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert statistics["answers"] == 24
    assert sum(statistics["histogram"]["counts"]) == statistics["distinct"]
    assert statistics["mean_score_chosen"] > statistics["mean_score_rejected"]
    page = (tmp_path / "pairs.html").read_text(encoding="utf-8")
    assert page.count("<rect ") == 20
    assert "<h1>Samples: pairs.jsonl</h1>" in page
    (verdict,) = re.findall(r'<p class="verdict">(.*)</p>', page)
    made = f"{len(rows)} pairs of {statistics['distinct']} different answers to 6 prompts: chosen ones score "
    assert verdict.startswith(f"{made}{statistics['mean_score_chosen']:.3g} (")
    examples = make_examples(
        (row for row in read_rows(out) if isinstance(row, Row)),
        scores={"chosen": "score_chosen", "rejected": "score_rejected"},
    ).examples
    assert [example.first("chosen").score for example in examples] == [row["score_chosen"] for row in rows]
    # Again: nothing is sampled, and everything is as it was.
    before = out.read_bytes()
    status, printed, _ = run(capsys, world.arguments(out))
    assert status == 0
    assert "has 24 of 24 answers already" in printed
    assert out.read_bytes() == before
    # More of them: those that are there stay.
    assert run(capsys, world.arguments(out, n=6))[0] == 0
    more = rows_of(tmp_path / "pairs.answers.jsonl")
    assert [row for row in more if row["sample"] < 4] == answers
    assert len(more) == 36


def test_all_answers_of_a_prompt_are_kept_with_their_scores(world, tmp_path, capsys):
    out = tmp_path / "ranked.jsonl"
    assert run(capsys, world.arguments(out, select="all"))[0] == 0
    rows = rows_of(out)
    assert rows
    for row in rows:
        assert len(set(row["responses"])) == len(row["responses"]) == len(row["scores"]) > 1
        assert row["scores"] == [len(text) for text in row["responses"]]
    found = make_examples(read_rows(out))
    assert found.layout == "ranked"
    assert [len(example.responses) for example in found.examples] == [len(row["responses"]) for row in rows]


def test_answers_that_a_scorer_fails_on_are_left_out_and_told(world, tmp_path, capsys):
    rule = tmp_path / "half.py"
    rule.write_text("seen = []\ndef half(p, r):\n    seen.append(r)\n    return len(seen) / (len(seen) % 3)\n", "utf-8")
    status, printed, _ = run(capsys, world.arguments(tmp_path / "half.jsonl", score=f"rule:{rule}:half"))
    assert status == 0
    assert "answers have no score and are left out; the first: " in printed
    assert "half.py:half fails: ZeroDivisionError" in printed
    statistics = json.loads((tmp_path / "half.json").read_text(encoding="utf-8"))
    assert statistics["without a score"] > 0


def test_a_judge_scores_by_how_often_it_prefers(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    common = {"n": 3, "yes": None, "cache": tmp_path / "judge.sqlite"}
    with serving(lambda body, number: completion("Response 1 is more helpful.")) as server:
        arguments = world.arguments(tmp_path / "judged.jsonl", score="judge:openai:model", **common)
        status, _, error = run(capsys, [*arguments, "--base-url", server.url])
        assert (status, error) == (0, "")
        server.behave = lambda body, number: failure(401, "no")
        arguments = world.arguments(tmp_path / "failed.jsonl", score="judge:openai:other", **common)
        assert run(capsys, [*arguments, "--base-url", server.url])[0] == sample.ENDPOINT_FAILED
    for row in rows_of(tmp_path / "judged.jsonl"):
        assert 0 <= row["score_rejected"] < row["score_chosen"] <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "rule:nowhere.py:length"}, "there is no file nowhere.py"),
        ({"score": "rewards:x"}, "--score rewards:x is unknown; use rule:MODULE.py:FUNCTION, reward:HF_DIR"),
        ({"score": "reward:nowhere"}, "reward:nowhere is no model folder"),
        ({"n": 1}, "--n 1 answers to a prompt make no pair"),
        ({"temperature": 0}, "samples=4 greedy answers are all the same; give a --temperature"),
        ({"out": "pairs.json"}, "--out pairs.json must end in .jsonl"),
        ({"beta": 0, "select": "rso"}, "--beta 0.0 must be greater than 0"),
        ({"accept": 1, "select": "rso"}, "--accept 1 answers make no pair"),
        ({"accept": 4}, "--accept would not be read: --select best_worst is not rso"),
        ({"max-cost": 1}, "--max-cost would not be read: --score rule:"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(world, tmp_path, capsys, changes, said):
    status, _, error = run(capsys, world.arguments(**{"out": tmp_path / "x.jsonl"} | changes))
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("x*"))


def test_files_that_are_not_of_an_earlier_start_stay(world, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(world.prompts.read_bytes())
    listed = tmp_path / "q.json"
    listed.write_text(json.dumps(rows_of(prompts)), encoding="utf-8")
    for own, out in ((prompts, prompts), (listed, tmp_path / "q.jsonl")):
        before = own.read_bytes()
        status, _, error = run(capsys, world.arguments(out, prompts=own))
        assert status == 2
        assert "holds the prompts and would be replaced" in error
        assert own.read_bytes() == before
    (tmp_path / "mine.html").write_text("mine", encoding="utf-8")
    status, _, error = run(capsys, world.arguments(tmp_path / "mine.jsonl"))
    assert status == 2
    assert "mine.html exists and is not of an earlier start" in error


def test_a_rule_that_likes_all_answers_alike_is_told(world, tmp_path, capsys):
    (tmp_path / "same.py").write_text("def same(prompt, response):\n    return 1\n", encoding="utf-8")
    status, _, error = run(capsys, world.arguments(tmp_path / "x.jsonl", score=f"rule:{tmp_path / 'same.py'}:same"))
    assert status == 2
    assert "no answer is better than another" in error
    assert not (tmp_path / "x.jsonl").exists()
