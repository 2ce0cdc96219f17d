"""The judge command on files, with judges that need no network."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rpo_jax import judge
from rpo_jax.core.locks import one_writer
from rpo_jax.data import chat_template
from rpo_jax.tools.judging.pairs import read_chosen
from tests.runs import preference_rows, write_rows

GOOD = "def length(prompt, response):\n    return len(response)\n"


def responses(path, texts, prompts=None, **fields):
    """A file as `rpo_jax.generate` writes it."""
    prompts = [f"Question {i}?" for i in range(len(texts))] if prompts is None else prompts
    rows = [{"prompt": prompt, "response": text, **fields} for prompt, text in zip(prompts, texts, strict=True)]
    return write_rows(path, rows)


def run(capsys, *arguments):
    status = judge.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def rule(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text(GOOD, encoding="utf-8")
    return f"rule:{file}:length"


@pytest.fixture
def files(tmp_path):
    """Three wins for A, one tie, one loss, if the longer response wins."""
    a = responses(tmp_path / "a.jsonl", ["long answer", "long answer", "long answer", "same", "no"])
    b = responses(tmp_path / "b.jsonl", ["short", "short", "short", "same", "not short"])
    return a, b


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def verdicts_of(folder):
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_rule_decides_and_everything_is_written(files, rule, tmp_path, capsys):
    out = tmp_path / "out"
    status, printed, error = run(
        capsys, "--a", files[0], "--b", files[1], "--task", "dialogue", "--judge", rule, "--out", out
    )
    assert (status, error) == (0, "")
    assert "| win / tie / loss | 3 / 1 / 1 |" in printed
    assert "| win rate, a tie is half a win | 70.0 % |" in printed
    assert (out / "summary.md").read_text(encoding="utf-8") in printed
    page = (out / "summary.html").read_text(encoding="utf-8")
    assert "a.jsonl wins against b.jsonl about as often as not" in page
    assert "win rate where a.jsonl is longer" in page
    assert re.search(r"length-controlled win rate</td><td[^>]*>\d+\.\d % \(\d+\.\d to \d+\.\d %\)<", page)
    summary = summary_of(out)
    assert (summary["win"], summary["tie"], summary["loss"], summary["unparsable"]) == (3, 1, 1, 0)
    assert summary["length"]["a_longer"] == 3
    assert summary["length"]["win_rate_where_a_is_longer"] == 1.0
    assert summary["length_controlled_win_rate"] < 0.7  # length explains it all
    assert summary["usage"]["identical"] == 1
    assert summary["position"] is None  # a score per response knows no order
    lines = verdicts_of(out)
    assert [line["winner"] for line in lines] == ["a", "a", "a", "tie", "b"]
    assert [line["row_id"] for line in lines] == [f"{files[0]}:{i}" for i in range(1, 6)]


def test_other_files_of_the_same_names_are_told_apart(rule, tmp_path, capsys):
    names = [tmp_path / side / "answers.jsonl" for side in ("rpo", "dpo", "ipo")]
    for number, name in enumerate(names):
        name.parent.mkdir()
        responses(name, ["x" * (number + 1), "y" * (number + 2)])
    common = "--task", "dialogue", "--judge", rule
    status, _, error = run(capsys, "--a", names[0], "--b", names[1], *common)
    assert (status, error) == (0, "")
    (out,) = names[0].parent.glob("answers-against-*")
    assert [summary_of(out)[side] for side in "ab"] == ["rpo/answers.jsonl", "dpo/answers.jsonl"]
    status, _, error = run(capsys, "--a", names[0], "--b", names[2], *common)
    assert status == 2
    assert "holds verdicts with b=dpo/answers.jsonl, not ipo/answers.jsonl; name another folder with --out" in error
    status, _, error = run(capsys, "--a", tmp_path / "rpo/answers.jsonl", "--b", names[1], *common)
    assert (status, error) == (0, "")  # the same again
    status, _, error = run(capsys, "--a", names[0], "--b", names[1], *common, "--split", "train")
    assert "--split would not be read: there is no --data" in error


def test_a_file_is_told_from_another_folder_s(rule, tmp_path, capsys):
    a = responses(tmp_path / "mine.jsonl", ["x"])
    one, other = (responses(make(tmp_path / name) / "answers.jsonl", ["yy"]) for name in ("one", "other"))
    common = "--a", a, "--task", "dialogue", "--judge", rule
    assert run(capsys, *common, "--b", one)[0] == 0
    status, _, error = run(capsys, *common, "--b", other)
    assert status == 2
    assert "holds verdicts with files=" in error
    # Folders of one name within folders that tell them apart.
    far = [responses(make(tmp_path / seed / "out") / "answers.jsonl", ["y" * n]) for n, seed in ((1, "s1"), (2, "s2"))]
    assert run(capsys, "--a", far[0], "--b", far[1], *common[2:], "--out", tmp_path / "far")[0] == 0
    assert [summary_of(tmp_path / "far")[side] for side in "ab"] == ["s1/out/answers.jsonl", "s2/out/answers.jsonl"]
    # A project that has moved is the same one.
    project = make(tmp_path / "project")
    for n in (1, 2):
        responses(project / f"{n}.jsonl", ["y" * n])
    assert run(capsys, "--a", project / "1.jsonl", "--b", project / "2.jsonl", *common[2:])[0] == 0
    project.rename(tmp_path / "moved")
    moved = ("--a", tmp_path / "moved/1.jsonl", "--b", tmp_path / "moved/2.jsonl")
    assert run(capsys, *moved, *common[2:])[0] == 0


def make(folder):
    folder.mkdir(parents=True)
    return folder


def test_a_judging_that_was_killed_is_done_again(files, rule, tmp_path, capsys):
    out = make(tmp_path / "out")
    (out / "verdicts.jsonl").write_text("{}\n")
    (out / ".verdicts.jsonl.ab12.tmp").write_text("{")
    common = ("--a", files[0], "--b", files[1], "--task", "dialogue", "--judge", rule, "--out", out)
    assert run(capsys, *common)[0] == 0
    (out / "mine.txt").touch()
    assert run(capsys, *common)[0] == 0  # a note beside verdicts is nobody's harm
    (out / "summary.json").unlink()
    assert "holds something else" in run(capsys, *common)[2]


def test_two_cannot_judge_into_one_folder(files, rule, tmp_path, capsys):
    common = ("--a", files[0], "--b", files[1], "--task", "dialogue", "--judge", rule, "--out", tmp_path / "out")
    with one_writer(tmp_path / "out"):
        status, _, error = run(capsys, *common)
    assert status == 2
    assert error.startswith(f"error: --out={tmp_path / 'out'} is in use: process {os.getpid()} on ")
    assert not (tmp_path / "out").exists()
    assert run(capsys, *common)[0] == 0


def test_the_verdict_does_not_depend_on_the_side(files, rule, tmp_path, capsys):
    for name, a, b in (("ab", *files), ("ba", *reversed(files))):
        run(capsys, "--a", a, "--b", b, "--task", "dialogue", "--judge", rule, "--out", tmp_path / name)
    there, back = summary_of(tmp_path / "ab"), summary_of(tmp_path / "ba")
    assert (there["win"], there["tie"], there["loss"]) == (back["loss"], back["tie"], back["win"])
    assert there["win_rate"] == pytest.approx(1 - back["win_rate"])
    assert there["win_rate_wilson_95"] == pytest.approx([1 - end for end in reversed(back["win_rate_wilson_95"])])


def test_a_judge_that_likes_the_first_is_found_out(tmp_path, capsys):
    (tmp_path / "first.py").write_text("def first(prompt, a, b):\n    return 1\n", encoding="utf-8")
    a = responses(tmp_path / "a.jsonl", [f"a{i}" for i in range(200)])
    b = responses(tmp_path / "b.jsonl", [f"b{i}" for i in range(200)])
    common = ("--a", a, "--b", b, "--task", "dialogue", "--judge", f"rule:{tmp_path / 'first.py'}:first")
    run(capsys, *common, "--out", tmp_path / "one")
    one = summary_of(tmp_path / "one")
    assert one["position"]["first_won"] == 1.0
    assert one["position"]["first_won_wilson_95"][0] > 0.98
    assert 0.4 < one["win_rate"] < 0.6  # which the random order turns into noise
    status, printed, _ = run(capsys, *common, "--both-orders", "--out", tmp_path / "both")
    both = summary_of(tmp_path / "both")
    assert status == 0
    assert (both["win"], both["tie"], both["loss"]) == (0, 200, 0)  # and both orders into ties
    assert both["comparisons"] == 400
    assert both["position"]["same_verdict_in_both_orders"] == 0.0
    assert "| same verdict in both orders | 0.0 % |" in printed


def test_the_order_is_drawn_by_seed(tmp_path, capsys):
    (tmp_path / "first.py").write_text("def first(prompt, a, b):\n    return 1\n", encoding="utf-8")
    a = responses(tmp_path / "a.jsonl", [f"a{i}" for i in range(40)])
    b = responses(tmp_path / "b.jsonl", [f"b{i}" for i in range(40)])
    firsts = {}
    for seed, n in ((0, 40), (0, 20), (1, 40)):
        out = tmp_path / f"{seed}-{n}"
        run(
            capsys, "--a", a, "--b", b, "--task", "dialogue", "--judge", f"rule:{tmp_path / 'first.py'}:first",
            "--seed", seed, "--n", n, "--out", out,
        )  # fmt: skip
        firsts[seed, n] = {line["row_id"]: line["first"] for line in verdicts_of(out)}
    assert len(firsts[0, 20]) == 20
    assert firsts[0, 20].items() <= firsts[0, 40].items()  # a smaller sample is part of a larger one, in the same order
    assert firsts[0, 40] != firsts[1, 40]
    assert 8 < list(firsts[0, 40].values()).count("a") < 32


def test_against_the_chosen_responses_of_a_data_file(rule, tmp_path, capsys):
    rows = preference_rows(12)
    data = write_rows(tmp_path / "data.jsonl", rows)
    # In another order, of a part of the data, and once as messages.
    prompts = [rows[i]["prompt"] for i in (7, 2, 5)]
    prompts[1] = [{"role": "user", "content": prompts[1]}]
    a = responses(tmp_path / "a.jsonl", ["x" * 99, "x", "x" * 99], prompts)
    out = tmp_path / "out"
    options = ("--a", a, "--b", "chosen", "--data", data, "--task", "dialogue", "--judge", rule, "--out", out)
    assert run(capsys, *options)[0] == 0
    assert [line["b"] for line in verdicts_of(out)] == [rows[i]["chosen"] for i in (7, 2, 5)]
    assert [line["winner"] for line in verdicts_of(out)] == ["a", "b", "a"]


def test_equal_prompts_are_paired_in_order(rule, tmp_path, capsys):
    a = responses(tmp_path / "a.jsonl", ["one", "two two"], ["Hi", "Hi"])
    b = responses(tmp_path / "b.jsonl", ["1", "2"], ["Hi", " Hi\n"])
    options = ("--a", a, "--b", b, "--task", "dialogue", "--judge", rule, "--out", tmp_path / "out")
    assert run(capsys, *options)[0] == 0
    assert [(line["a"], line["b"]) for line in verdicts_of(tmp_path / "out")] == [("one", "1"), ("two two", "2")]


BAD_FILES = {
    "other prompt": ([("Question 0?", "x"), ("Other?", "x")], "b.jsonl:2 ('Other?')|a.jsonl:2 ('Question 1?'), where"),
    "fewer": ([("Question 0?", "x")], "the first without a partner is"),
    "more": ([("Question 0?", "x"), ("Question 1?", "x"), ("New?", "x")], "b.jsonl:3 ('New?')"),
    "empty prompt": ([("Question 0?", "x"), ("", "x")], "b.jsonl:2: 'prompt' is empty"),
    "no response": ([("Question 0?", None), ("Question 1?", "x")], "b.jsonl:1: 'response' is NoneType"),
    "empty file": ([], "is empty"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit_are_refused(case, rule, tmp_path, capsys):
    rows, told = BAD_FILES[case]
    a = responses(tmp_path / "a.jsonl", ["y", "y"])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": prompt, "response": text} for prompt, text in rows])
    out = tmp_path / "out"
    status, _, error = run(capsys, "--a", a, "--b", b, "--task", "dialogue", "--judge", rule, "--out", out)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(part in error for part in told.split("|"))
    assert not out.exists()


def bad(capsys, files, *changes, told):
    given = {"--a": files[0], "--b": files[1], "--task": "dialogue"}
    given |= dict(zip(changes[::2], changes[1::2], strict=True))
    status, _, error = run(capsys, *(part for pair in given.items() for part in pair))
    assert status == 2
    line = error.splitlines()[-1]  # transformers shows its progress before
    assert line.startswith("error: ")
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert told in line


def test_what_cannot_be_used_is_refused(files, rule, tmp_path, capsys):
    bad(capsys, files, "--judge", "oracle:x", told="use openai:..., reward:..., rule:...")
    bad(capsys, files, "--judge", "rule:x", told="rule:MODULE.py:FUNCTION")
    bad(capsys, files, "--judge", "rule:none.py:f", told="there is no file")
    bad(capsys, files, "--judge", "reward:nowhere", told="no config.json")
    bad(capsys, files, "--judge", rule, "--b", "chosen", told="--data FILE")
    bad(capsys, files, "--judge", rule, "--n", 0, told="--n 0")
    bad(capsys, files, "--judge", rule, "--a", tmp_path / "none.jsonl", told="no such file")
    bad(capsys, files, "--judge", rule, "--out", files[0], told="is a file")
    bad(capsys, files, "--judge", rule, "--out", tmp_path, told="holds something else")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "Question 0?", "resp', encoding="utf-8")
    bad(capsys, files, "--judge", rule, "--a", broken, told="broken JSON")


RULES = {
    "does not parse": ("def f(:", "SyntaxError"),
    "other name": ("def g(prompt, response):\n    return 1", "has no function f"),
    "one argument": ("def f(prompt):\n    return 1", "has no function f"),
    "raises": ("def f(prompt, response):\n    return 1 / 0", "a.jsonl:1: ZeroDivisionError"),
    "no number": ("def f(prompt, response):\n    return 'good'", "a.jsonl:1: ValueError"),
    "no choice": ("def f(prompt, first, second):\n    return 'first'", "returned 'first', not 1, 2, 0 or None"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_that_fails_is_named(case, files, tmp_path, capsys):
    source, told = RULES[case]
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    bad(capsys, files, "--judge", f"rule:{tmp_path / 'bad.py'}:f", told=told)


def test_a_judge_without_a_verdict_has_an_exit_status_of_its_own(files, tmp_path, capsys):
    (tmp_path / "none.py").write_text("def f(prompt, first, second):\n    return None", encoding="utf-8")
    a = responses(tmp_path / "x.jsonl", ["x", "y"])
    b = responses(tmp_path / "y.jsonl", ["1", "2"])
    status, _, error = run(
        capsys, "--a", a, "--b", b, "--task", "dialogue", "--judge", f"rule:{tmp_path / 'none.py'}:f",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert status == 4
    assert "gave no verdict that can be read: 2 of 2" in error
    assert [line["winner"] for line in verdicts_of(tmp_path / "out")] == ["unparsable"] * 2
    assert summary_of(tmp_path / "out")["win_rate"] is None


def tokenizer_of(words):
    """One token a word, BOS in front, a pair's texts one after another."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


WORDS = ("Question", "good", "bad", "fine", "awful", "very", "user", "assistant", *map(str, range(10)), "?")
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<s> awful{% endif %}"  # a response is judged whole: nothing is to follow it
)


@pytest.fixture(scope="module", params=["llama", "llama with a chat template", "bert"])
def reward_model(request, tmp_path_factory):
    """A random reward model, as transformers saves it."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tokenizer_of(WORDS)
    if "template" in request.param:
        tokenizer.chat_template = TEMPLATE
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 1, "pad_token_id": 0}
    kind = transformers.BertConfig if request.param == "bert" else transformers.LlamaConfig
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(kind(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward(folder, prompt, response):
    """One text at a time, without padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side="left")
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, truncation=True, max_length=16)
    else:
        inputs = tokenizer(prompt, response, return_tensors="pt", truncation=True, max_length=16)
    with torch.no_grad():
        return float(model(**inputs).logits[0, 0])


def test_a_reward_model_scores_as_transformers_does(reward_model, tmp_path, capsys):
    texts_a = ["good", "bad bad", "very good", "fine " * 30, "same", "awful fine good"]
    texts_b = ["awful", "good", "very very bad", "bad", "same", "bad " * 40]
    a, b = responses(tmp_path / "a.jsonl", texts_a), responses(tmp_path / "b.jsonl", texts_b)
    options = ("--a", a, "--b", b, "--task", "dialogue", "--judge", f"reward:{reward_model}", "--out", tmp_path / "out")
    status, printed, _ = run(capsys, *options)
    assert status == 0
    assert "2 of 10 texts are longer than the reward model's 16 tokens" in printed
    winners = []
    for i, line in enumerate(verdicts_of(tmp_path / "out")):
        if texts_a[i] == texts_b[i]:
            winners.append("tie")
            continue
        scores = {
            side: reward(reward_model, f"Question {i}?", text) for side, text in (("a", texts_a[i]), ("b", texts_b[i]))
        }
        winners.append(max(scores, key=lambda side: scores[side]))
        told = [float(line["answer"].split()[place]) for place in (1, 3)]
        order = (line["first"], "b" if line["first"] == "a" else "a")
        assert told == pytest.approx([scores[side] for side in order], rel=1e-4, abs=1e-5)
        assert line["winner"] == winners[-1]
    assert set(winners) == {"a", "b", "tie"}  # or the test says little


HOSTILE = {
    "reaches for Python's own": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "takes all memory": ("{{ 'a' * 10**11 }}", "MemoryError"),
    "never ends": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
    "does not parse": ("{% for x", "TemplateSyntaxError"),
    "reads a file": ("{% include '/etc/passwd' %}", "no loader"),
}


@pytest.mark.parametrize(
    "reward_model",
    ["llama with a chat template", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert"))],
    indirect=True,
)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_reward_model_s_hostile_template_does_no_harm(case, reward_model, files, tmp_path, capsys, monkeypatch):
    template, told = HOSTILE[case]
    folder = shutil.copytree(reward_model, tmp_path / "hostile")
    for file in folder.glob("*.jinja"):
        file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps(settings | {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.5 if "more than" in told else 60.0)
    bad(capsys, files, "--judge", f"reward:{folder}", "--out", tmp_path / "out", told=told)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_s_folder_that_brings_code_is_refused(reward_model, files, tmp_path, capsys):
    folder = shutil.copytree(reward_model, tmp_path / "code")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps(settings | {"auto_map": {"AutoTokenizer": [None, "mine.Tokenizer"]}})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    bad(capsys, files, "--judge", f"reward:{folder}", told="auto_map")


def test_a_folder_that_is_no_reward_model_is_refused(reward_model, files, tmp_path, capsys):
    folder = tmp_path / "two"
    shutil.copytree(reward_model, folder)
    config = transformers.AutoConfig.from_pretrained(reward_model)
    if config.model_type == "llama":
        # A language model: transformers would give it a random head.
        causal = transformers.AutoModelForCausalLM.from_config(config)
        causal.save_pretrained(folder)
        bad(capsys, files, "--judge", f"reward:{folder}", told="no weights for score.weight")
    config.num_labels = 2
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    bad(capsys, files, "--judge", f"reward:{folder}", told="has 2 labels")
    (folder / "model.safetensors").write_bytes(b"broken")
    bad(capsys, files, "--judge", f"reward:{folder}", told="cannot be loaded")


def test_a_row_of_chosen_responses_that_is_of_no_use_is_named(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 3, "rejected": "c"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: column 'chosen' .*; mend the row, or leave it out"):
        read_chosen(str(file), split="train", layout="auto")
