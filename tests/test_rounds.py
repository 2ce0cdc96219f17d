"""Rounds of sampling and training: what they leave behind, exact resumes, extrapolation, and what is refused."""

import contextlib
import json
import re
import signal

import jax
import numpy as np
import pytest

import rpo_jax
from rpo_jax import doctor, export, models, report, train
from rpo_jax.core.jsonl import GrowingFile, read_jsonl
from rpo_jax.hosts import processes
from rpo_jax.runs.checkpoints import Checkpoints
from rpo_jax.runs.folder import CHECKPOINTS
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.policy import restored
from rpo_jax.tools.sampling.rounds import AnswerRater
from rpo_jax.tools.sampling.sample import Choice
from rpo_jax.tools.sampling.scorers import make_scorer
from rpo_jax.training import rounds
from rpo_jax.training.hooks.samples import SAMPLES
from rpo_jax.training.hooks.saving import Saving
from rpo_jax.training.optimizer import Anchor, extrapolated
from rpo_jax.training.rounds import drawn
from rpo_jax.training.step import TrainState
from tests.judge_server import completion, failure, serving
from tests.runs import configured, metric_lines, preference_rows, settings, without_timings, write_rows
from tests.test_train import assert_same_params

RULE = """
def vowels(prompt, response):
    return sum(letter in "aeiou" for letter in response)

def half(prompt, response):
    return len(response) / (len(response) % 2)

def same(prompt, response):
    return 3

def words(prompt, response):
    return "many"
"""
LOOP = {
    "train.rounds": 2,
    "rounds.prompts": 6,
    "rounds.steps": 2,
    "rounds.samples": 3,
    "rounds.max_tokens": 8,
    "rounds.keep_unfinished": True,
    "rounds.eval_prompts": 4,
    "data.eval_rows": 8,
    "batch.pairs": 8,
    "objective.name": "dpo",
    "tracking.tensorboard": False,
}


class World:
    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        data = write_rows(folder / "pairs.jsonl")
        changes = {"objective.name": "sft", "train.steps": 6, "tracking.tensorboard": False}
        sft = rpo_jax.run(configured(data, folder / "sft", self.cache, changes)).run_dir
        export.main(["--run", str(sft), "--out", str(folder / "hf")])
        self.prompts = write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in preference_rows()])
        (folder / "rules.py").write_text(RULE, encoding="utf-8")

    def settings(self, name, changes=None):
        own = {"model.path": self.folder / "hf", "rounds.score": f"rule:{self.folder / 'rules.py'}:vowels"}
        return settings(self.prompts, self.folder / name, self.cache, {**LOOP, **own, **(changes or {})})

    def run(self, name, changes=None, hooks=()):
        return rpo_jax.run(rpo_jax.load_config(None, self.settings(name, changes)), hooks=hooks)

    def main(self, name, changes=None):
        return train.main([f"--{argument}" for argument in self.settings(name, changes)])

    def steps(self, name):
        checkpoints = Checkpoints(self.folder / name / CHECKPOINTS, read_only=True)
        steps = checkpoints.steps()
        checkpoints.close()
        return steps

    def params(self, name, step):
        return restored(self.folder / name, step, models.Policy(models.read_config(self.folder / name / "model")))

    def files(self, name):
        """What the rounds sampled and chose; answers come in any order."""
        folder = self.folder / name / "rounds"
        return {file.name: sorted(file.read_text("utf-8").splitlines()) for file in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_prompts_come_again_only_when_all_have_had_their_turn():
    rounds_of_five = [drawn(3, number, 5, 12) for number in range(12)]
    flat = [index for one in rounds_of_five for index in one]
    turns = [flat[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(turn) == list(range(12)) for turn in turns)
    for count, size in ((5, 12), (5, 7), (7, 7), (4, 5)):
        assert all(len({*drawn(seed, number, count, size)}) == count for seed in range(4) for number in range(12))
    assert turns[0] != turns[1], "shuffled anew"
    assert drawn(3, 7, 5, 12) == rounds_of_five[7]
    assert drawn(4, 7, 5, 12) != rounds_of_five[7]


def test_extrapolation_is_that_of_the_numbers():
    """theta = theta' + alpha (theta' - anchor), and what is gone on from next is theta', not theta."""
    now, before = np.array([1.0, -2.0, 0.5]), np.array([0.8, -1.0, 0.5])
    kept = {"running": {"mean": np.float32(0.2), "count": np.float32(8)}}  # no weights
    anchor = Anchor({"w": before, "running": {"mean": np.float32(0.1), "count": np.float32(4)}})
    state = extrapolated(TrainState(7, {"w": now, **kept}, (anchor, "moments")), 0.3)  # pyright: ignore
    np.testing.assert_allclose(state.params["w"], [1.06, -2.3, 0.5], rtol=1e-12)
    assert state.opt_state[0].params["w"] is now
    assert state.params["running"] == kept["running"]
    assert state.opt_state[1] == "moments"
    assert state.step == 7


@pytest.fixture(scope="module")
def grouped(world):
    """RPO on all answers, one step a round: every good answer of a round against every bad one."""
    changes = {
        "train.rounds": 3,
        "rounds.steps": 1,
        "rounds.select": "all",
        "data.pairing": "grouped",
        "objective.name": "rpo",
        "contrast.weights": "uniform",
        "optim.learning_rate": 3e-3,
        "optim.warmup_steps": 0,
    }
    return world.run("grouped", changes)


def test_a_run_shows_its_rounds(world, grouped):
    lines = metric_lines(grouped.run_dir)
    of_rounds = [line for line in lines if "round" in line]
    assert [(line["step"], line["round"]) for line in of_rounds] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    for line in of_rounds[:3]:
        assert {"reward", "reward_std", "completions/mean_length", "rounds/rows", "rounds/distinct"} <= line.keys()
        assert line["rounds/distinct"] <= 18
    assert [line["eval_kl"] == 0 for line in of_rounds] == [True, False, False, False], "the start is itself"
    assert all(np.isfinite(line["eval_reward"]) for line in of_rounds)
    assert grouped.metrics["eval_kl"] == of_rounds[-1]["eval_kl"]
    assert grouped.initial_metrics["eval_reward"] == of_rounds[0]["eval_reward"]
    log_ratios = [line for line in lines if "loss" in line]
    assert log_ratios[0]["loss"] == pytest.approx(np.log(2), rel=1e-4), "its own reference"


def test_a_round_s_files_are_the_data_that_it_trains_on(world, grouped):
    files = world.files("grouped")
    assert list(files) == [f"000{n}{kind}.jsonl" for n in range(3) for kind in (".answers", "")]
    prompts = []
    for number in range(3):
        answers = [json.loads(line) for line in files[f"000{number}.answers.jsonl"]]
        assert len(answers) == 18
        rows = [json.loads(line) for line in files[f"000{number}.jsonl"]]
        texts = {answer["text"] for answer in answers}
        for row in rows:
            assert set(row["responses"]) <= texts
            assert row["scores"] == [sum(letter in "aeiou" for letter in text) for text in row["responses"]]
        prompts += [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts), "of 24 prompts 18 are drawn, none twice"
    held_out = [row["prompt"] for row in preference_rows()][-8:]
    assert not set(prompts) & set(held_out)


def test_report_and_doctor_know_rounds(world, grouped, capsys):
    out = world.folder / "report.html"
    assert report.main(["--run", str(grouped.run_dir), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "Reward of answers" in page
    assert "The run samples its data in rounds; its folder has them" in page
    assert "The run samples its data in rounds: the rewards of its answers are among the curves" in page
    assert "is done: the reward of its answers to held-out prompts" in page
    doctor.main([f"--{setting}" for setting in world.settings("new")])
    assert "24 prompts (train)" in " ".join(capsys.readouterr().out.split())


ACCELERATED = {"rounds.reference": "last", "rounds.extrapolation": 0.3, "train.save_every": 2, "train.rounds": 3}


class Trained(rpo_jax.Hook):
    """What every round has trained, before it is taken further."""

    def __init__(self):
        self.params = {}

    def at_pause(self, run):
        self.params[run.step] = jax.device_get(run.state.params)


@pytest.fixture(scope="module")
def whole(world):
    hook = Trained()
    world.run("whole", ACCELERATED, [hook])
    return hook.params


@pytest.mark.slow
def test_a_round_but_the_last_is_taken_further_by_its_way_since_the_one_before(world, whole):
    expected = jax.tree.map(lambda now, before: now + 0.3 * (now - before), whole[4], whole[2])
    found = world.params("whole", 4)
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=1e-7), found, expected)
    assert_same_params(world.params("whole", 6), whole[6])
    moved = jax.tree.map(lambda got, before: np.abs(got - before).max(), found, whole[4])
    assert max(jax.tree.leaves(moved)) > 1e-5


class Killed(BaseException):
    pass


def at_answers(monkeypatch, file, act):
    """Do something when a file of answers has got its first ones, eight of them sampled at a time."""
    add, done = GrowingFile.add, []

    def acting(self, *rows):
        add(self, *rows)
        if self._path.name == file and not done:
            done.append(True)
            act()

    monkeypatch.setattr(rounds, "BATCH_ANSWERS", 8)
    monkeypatch.setattr(GrowingFile, "add", acting)


def kill():
    raise Killed


def test_stopped_at_any_instant_it_goes_on_bit_for_bit(world, whole, monkeypatch, capsys):
    name = "stopped"

    def start(file=None, act=None):
        """One start of the run, interrupted when a file of answers is begun; the step that the next one resumes."""
        more = {"train.save_every": 3, "run.resume": "auto"}
        with monkeypatch.context() as patch:
            if file is not None:
                at_answers(patch, file, act)
                if act is kill and file != "0000.answers.jsonl":
                    patch.setattr(Saving, "keep", lambda *_: None)  # a process that is killed saves nothing
            try:
                world.run(name, {**ACCELERATED, **more})
            except Killed:
                assert act is kill
        if file is not None:
            assert 0 < len((world.folder / name / "rounds" / file).read_text().splitlines()) < 18
        return world.steps(name)[-1]

    assert start("0000.answers.jsonl", kill) == 0
    assert start("0001.answers.jsonl", lambda: signal.raise_signal(signal.SIGTERM)) == 2
    assert start("0002.answers.jsonl", kill) == 3, "in the middle of a round, whose sampling policy is gone"
    others = {"rounds.steps": 3, "rounds.select": "first_round"}
    assert world.main(name, {**ACCELERATED, **others, "run.resume": "auto"}) == 2
    assert "was trained with rounds of 2 steps, not 3; resume with its own" in capsys.readouterr().err
    assert world.main(name, {**ACCELERATED, "rounds.select": "first_round", "run.resume": "auto"}) == 2
    told = "rounds.select=best_worst, not first_round, in the round that step 3 is in"
    assert told in capsys.readouterr().err
    (world.folder / name / "rounds" / ".0002.json.0a.tmp").touch()  # as a kill in the middle of a write leaves it
    assert start() == 6
    assert world.files(name) == world.files("whole")
    lines = [without_timings(metric_lines(world.folder / run)) for run in (name, "whole")]
    assert lines[0] == lines[1]
    assert_same_params(world.params(name, 6), whole[6])

    assert world.main(name, {**ACCELERATED, "rounds.extrapolation": 0.0, "run.resume": "auto"}) == 2
    assert "was trained with rounds.extrapolation=0.3, not 0.0; resume with its own" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_trained_in_rounds(world):
    changes = {"lora.rank": 2, "reference.mode": "adapter", "train.rounds": 2, "rounds.steps": 1}
    changes |= {"optim.learning_rate": 1e-2, "optim.warmup_steps": 0, "train.sample_prompts": 2}
    result = world.run("adapters", changes)
    samples = read_jsonl(result.run_dir / SAMPLES)
    assert [row["row_id"].rpartition(":")[2] for row in samples] == ["25", "26"] * 2, "of 32 the last 8 are held out"
    kl = [line["eval_kl"] for line in metric_lines(result.run_dir) if "round" in line]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[-1]) > 1e-4


def judged(settings, **endpoint):
    """Rounds with a judge that is not there."""
    endpoint = json.dumps({"base_url": "http://127.0.0.1:9/v1", **endpoint})
    return {"rounds.score": "judge:openai:judge", "rounds.judge": f"{{endpoint: {endpoint}, {settings}}}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds.score": "null"}, "train.rounds=2 has nothing to score answers by; set rounds.score"),
        ({"model.path": "null"}, "train.rounds samples from a model that can answer already"),
        ({"train.steps": 4}, "train.steps=4 would not be read with train.rounds; set rounds.steps"),
        ({"train.rounds": 0}, "means nothing without rounds; set train.rounds, or leave it out"),
        ({"rounds.samples": 1}, "rounds.samples=1 answers to a prompt make no pair"),
        ({"rounds.score": "rule:nowhere.py:x"}, "there is no file nowhere.py"),
        ({"rounds.score": "rule:nowhere.py:x"}, "error: rounds.score rule:nowhere.py:x: there is no file"),
        ({"rounds.score": "reward:nowhere"}, "reward:nowhere is no model folder"),
        (judged(""), "nobody is here to agree to the cost: give rounds.judge.yes, or rounds.judge.max_cost DOLLARS"),
        (judged("max_cost: 1"), "rounds.judge.max_cost needs a price: give rounds.judge.price_in and rounds.judge"),
        (judged("yes: true, price_in: 1"), "rounds.judge.price_in and rounds.judge.price_out, dollars per million"),
        (judged("yes: true, tasks: dialogue"), "rounds.judge.tasks is unknown; there are task, "),
        (judged("yes: 1"), "rounds.judge.yes is 1, and must be true or false"),
        (judged("yes: true, task: chat"), "rounds.judge.task is 'chat', and must be dialogue or summarization"),
        (judged("yes: true", retries="many"), "rounds.judge.endpoint.retries is 'many', and must be a whole number"),
        (judged("yes: true", retries=-1), "rounds.judge.endpoint.retries -1 must not be negative"),
        ({"rounds.judge": "{yes: true}"}, "rounds.judge would not be read with rounds.score=rule:"),
        ({"rounds.reference": "last", "reference.mode": "live"}, "rounds.reference=last is computed at the start"),
        ({"objective.name": "nca", "data.pairing": "grouped"}, "rounds.select=best_worst makes pairs of them"),
        ({"data.max_prompt_tokens": 2}, "no prompt has at most data.max_prompt_tokens=2 tokens"),
        ({"data.eval_rows": 32}, "data.eval_rows=32 leaves nothing to train on"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_sampled(world, capsys, changes, message):
    assert world.main("refused", changes) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (world.folder / "refused").exists()


@pytest.mark.slow
def test_a_judge_may_cost_so_much_in_all_rounds_together(world, capsys, monkeypatch):
    """A dollar a verdict: the first round's are within the limit, the second's would not be, at any resume."""
    once = {"train.rounds": 2, "rounds.steps": 1, "rounds.select": "first_round", "rounds.prompts": 2}
    with serving(lambda body, number: completion("Response 1 is more helpful.")) as server:
        prices = {"price_in": 0, "price_out": 1e5, "max_cost": 8, "cache": str(world.folder / "judge.sqlite")}
        endpoint = {"base_url": server.url, "answer_tokens": 10}
        judge = json.dumps({**prices, "endpoint": endpoint})
        changes = {**once, "rounds.score": "judge:openai:judge", "rounds.judge": judge}
        assert world.main("judged", changes) == 2
        asked = len(server.requests)
        assert 2 < asked <= 6
        error = capsys.readouterr().err.strip()
        left = f"beside the ${asked}.00 that are spent, more than rounds.judge.max_cost 8; raise it, or lower rounds."
        assert "round 1 (after step 1): this may cost" in error
        assert left in error
        assert "\n" not in error
        assert world.main("judged", {**changes, "run.resume": "auto"}) == 2
        assert left in capsys.readouterr().err
        server.behave = lambda body, number: failure(401, "no")
        changes["rounds.judge"] = json.dumps({**prices, "max_cost": 100, "endpoint": endpoint})
        assert world.main("judged", {**changes, "run.resume": "auto"}) == 2
        error = capsys.readouterr().err.strip()
        assert "round 1 (after step 1): http" in error
        assert "\n" not in error


def test_a_fault_of_ours_in_a_round_is_not_told_as_the_user_s(world, monkeypatch):
    def fails(*_):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(rounds, "compute_log_probs", fails)
    with pytest.raises(RuntimeError, match="training stopped: shapes do not match") as found:
        world.run("fault", {"train.rounds": 1})
    assert isinstance(found.value.__cause__, ValueError)


@pytest.mark.slow
def test_a_round_that_is_made_but_not_begun_is_made_anew_by_other_settings(world, monkeypatch):
    """Killed after the round's rows were chosen and before a checkpoint was saved on them."""
    with monkeypatch.context() as patch:
        patch.setattr(rounds.RoundBatches, "batch_at", lambda self, step: kill())
        with pytest.raises(Killed):
            world.run("anew", {"train.rounds": 1})
    rows, answered = (world.files("anew")[f"0000{kind}.jsonl"] for kind in ("", ".answers"))
    again = {"train.rounds": 1, "rounds.steps": 1, "rounds.select": "tournament", "run.resume": "auto"}
    world.run("anew", again)
    assert world.files("anew")["0000.answers.jsonl"] == answered
    assert len(world.files("anew")["0000.jsonl"]) > len(rows), "two matches of three answers"


def test_several_processes_are_refused_before_anything_is_read(world, monkeypatch):
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    with pytest.raises(ValueError, match=r"train\.rounds=2 samples on one process only, and there are 2; start one"):
        world.run("refused")
    assert not (world.folder / "refused").exists()


@pytest.mark.slow
def test_a_round_without_a_preference_ends_the_run_which_can_go_on(world, capsys):
    score = f"rule:{world.folder / 'rules.py'}:same"
    assert world.main("no preference", {"rounds.score": score}) == 2
    error = capsys.readouterr().err.strip()
    assert "round 0 (after step 0): no answer is better than another" in error
    assert "\n" not in error
    # At another temperature others are sampled, or the message's advice would lead nowhere.
    first = world.files("no preference")["0000.answers.jsonl"]
    warmer = {"run.resume": "auto", "rounds.temperature": 3.0}
    assert world.main("no preference", {**warmer, "rounds.score": score}) == 2
    before = world.files("no preference")["0000.answers.jsonl"]
    assert len(before) == len(first)
    assert not set(before) & set(first)
    # With a scorer that tells answers apart the same answers are used; it has nothing to say of the held-out ones.
    rule = f"""
HELD_OUT = {[row["prompt"] for row in preference_rows()][-8:]}

def some(prompt, response):
    return sum(letter in "aeiou" for letter in response) / (prompt not in HELD_OUT)
"""
    (world.folder / "some.py").write_text(rule, encoding="utf-8")
    some = {"rounds.score": f"rule:{world.folder / 'some.py'}:some", "train.rounds": 1, "rounds.steps": 1}
    assert world.main("no preference", {**warmer, **some}) == 0
    assert world.files("no preference")["0000.answers.jsonl"] == before
    last = metric_lines(world.folder / "no preference")[-1]
    assert "eval_kl" in last
    assert "eval_reward" not in last


def rater(world, rule):
    own = {"score": f"rule:{world.folder / 'rules.py'}:{rule}", "select": "best_worst", "accept": 8, "beta": 0.5}
    choice = Choice(**own, keep_unfinished=False, seed=0, option=lambda name: f"rounds.{name}")
    with contextlib.ExitStack() as stack:
        return AnswerRater(choice, make_scorer(choice.score, {}, Reporter(), stack), Reporter())


def answers(*texts, reason="eos"):
    return [
        {
            "row_id": f"x:{1 + i // 4}",
            "prompt": f"Why {i // 4}?",
            "response": text,
            "finish_reason": reason,
            "tokens": 2,
        }
        for i, text in enumerate(texts)
    ]


def test_prompts_whose_answers_score_the_same_are_left_out(world):
    given = answers("aa", "bab", "b", "aeb", "bbb", "c", "dd", "fff")
    rows, metrics = rater(world, "vowels").rows(given)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("aa", "b")]
    assert (metrics["rounds/rows"], metrics["rounds/distinct"], metrics["completions/mean_length"]) == (1, 8, 2)
    assert metrics["reward"] == pytest.approx(5 / 8)


def test_answers_that_a_scorer_fails_on_are_left_out_and_told(world, capsys):
    """Of even length; those that are empty, or all the same, or unfinished were left out before."""
    rows, metrics = rater(world, "half").rows(answers("a", "bbb", "ccccc", "dd", "", " ", "e", "e"))
    assert [(row["score_chosen"], row["score_rejected"]) for row in rows] == [(5, 1)]
    assert metrics["rounds/distinct"] == 3
    assert "1 answers have no score and are left out; the first: x:1: " in capsys.readouterr().out
    assert rater(world, "half").scores(answers("a", "bb")) == [1]


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        ("same", answers("a", "b"), "no answer is better than another"),
        ("words", answers("a", "b"), "rules.py:words fails: ValueError: could not convert string to float: 'many'"),
        ("vowels", answers("a", "a", "", ""), "no prompt has two answers that differ"),
        (
            "vowels",
            answers("a", "b", reason="length"),
            "2 unfinished, 1 prompts, 1 prompts with fewer than two answers;",
        ),
    ],
)
def test_a_round_of_which_nothing_is_left_says_why(world, rule, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rater(world, rule).rows(given)
