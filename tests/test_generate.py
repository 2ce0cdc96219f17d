"""The command that answers prompts: runs and folders, resumed files, stop strings, AlpacaEval, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

import rpo_jax
from rpo_jax import export, generate
from rpo_jax.core.files import WriteFailed
from rpo_jax.sampling.answers import Answerer, batch_rows, prompt_seeds
from rpo_jax.sampling.engine import Sampling
from rpo_jax.sampling.generation import GenerateConfig
from tests.disks import small_files
from tests.runs import configured, preference_rows, write_rows

MAX_TOKENS = 24
WARM = Sampling(temperature=1.5)
PROMPTS = [row["prompt"] for row in preference_rows(12)] + [
    "Tea?",
    "What goes well with bread, soup and beans, please?",
]


class World:
    """A run of SFT, its folder, and a run of LoRA on it."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder, folder / "cache"
        self.data = data = write_rows(folder / "pairs.jsonl")
        common = {"tracking.tensorboard": False, "train.keep_last": 5}
        sft = {"train.steps": 6, "train.save_every": 2, "objective.name": "sft"}
        self.run = rpo_jax.run(configured(data, folder / "sft", self.cache, common | sft)).run_dir
        self.hf = export.export(self.run, folder / "hf")
        lora = {
            "train.steps": 2,
            "contrast.weights": "uniform",
            "lora.rank": 4,
            "model.path": self.hf,
            "optim.learning_rate": 0.05,
        }
        self.lora = rpo_jax.run(configured(data, folder / "lora", self.cache, common | lora)).run_dir
        self.prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def config(self, name, **changes) -> GenerateConfig:
        values = {"model": str(self.run), "prompts": str(self.prompts), "out": str(self.folder / f"{name}.jsonl")}
        own = {"max_tokens": MAX_TOKENS, "batch_size": 8, "cache_dir": str(self.cache)}
        return GenerateConfig(**values | own | changes)

    def answers(self, name, **changes) -> list[dict]:
        return rows_of(generate.generate(self.config(name, **changes)))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sampled(world):
    return world.answers("sampled", sampling=WARM)


def test_greedy_answers_are_those_of_transformers(world):
    rows = world.answers("greedy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(world.hf)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        found = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["response"] == tokenizer.decode(found, skip_special_tokens=True)
        assert row["tokens"] == len(found)
        assert row["finish_reason"] == ("eos" if found[-1] == tokenizer.eos_token_id else "length")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[0]["model"] == f"{world.run}@6"
    of_folder = world.answers("of folder", model=str(world.hf))
    assert [row["response"] for row in of_folder] == [row["response"] for row in rows]


def test_rows_may_call_the_prompt_by_another_name(world, capsys):
    rows = [{"text": prompt, "prompt": "of something else", "notes": "none"} for prompt in PROMPTS]
    renamed = write_rows(world.folder / "renamed.jsonl", rows)
    out = world.folder / "of renamed.jsonl"
    given = ["--model", world.run, "--prompts", renamed, "--out", out, "--max-tokens", MAX_TOKENS, "--batch-size", 8]
    columns = ["--columns", '{"prompt": "text"}', "--ignore-columns", "notes", "--cache-dir", world.cache]
    assert generate.main([str(word) for word in [*given, *columns]]) == 0
    assert [row["response"] for row in rows_of(out)] == [row["response"] for row in world.answers("greedy")]
    with pytest.raises(SystemExit):
        generate.main([str(word) for word in [*given, "--columns", '{"prompt": 1}']])
    assert """'{"prompt": 1}' names no columns""" in capsys.readouterr().err


def test_a_lora_run_answers_as_its_merged_folder_does(world):
    merged = export.export(world.lora, world.folder / "merged")
    of_run, of_folder, of_base = (
        [row["response"] for row in world.answers(f"of {path.name}", model=str(path))]
        for path in (world.lora, merged, world.hf)
    )
    assert of_run == of_folder != of_base


def test_neither_order_nor_batch_changes_an_answer(world, sampled):
    turned = write_rows(world.folder / "turned.jsonl", [{"prompt": prompt} for prompt in reversed(PROMPTS)])
    again = world.answers("turned answers", sampling=WARM, prompts=str(turned))
    assert [row["response"] for row in reversed(again)] == [row["response"] for row in sampled]
    other = world.answers("other batches", sampling=WARM, batch_size=16)
    assert other == sampled
    assert len({row["response"] for row in sampled}) > len(PROMPTS) // 2
    another = world.answers("another seed", sampling=WARM, seed=1)
    assert [row["response"] for row in another] != [row["response"] for row in sampled]


def test_a_half_done_file_is_completed(world, sampled, capsys):
    whole = (world.folder / "sampled.jsonl").read_bytes()
    out = world.folder / "resumed.jsonl"
    out.write_bytes(whole[: len(whole) * 2 // 3])  # in the middle of a line, as a kill leaves it
    assert not whole[: len(whole) * 2 // 3].endswith(b"\n")
    generate.generate(world.config("resumed", sampling=WARM))
    assert out.read_bytes() == whole
    assert "answers already" in capsys.readouterr().out
    generate.generate(replace(world.config("resumed", sampling=WARM), model=str(world.run)))  # nothing to do
    assert out.read_bytes() == whole


def test_answers_of_other_weights_in_the_same_folder_are_told_apart(world, tmp_path, capsys):
    model, prompts = (
        shutil.copytree(world.hf, tmp_path / "model"),
        write_rows(tmp_path / "p.jsonl", [{"prompt": "Tea?"}]),
    )
    ask = {"model": str(model), "prompts": str(prompts), "out": str(tmp_path / "answers.jsonl")}
    world.answers("", **ask)
    export.export(world.run, model, step=2, overwrite=True)
    with pytest.raises(ValueError, match=r"answers\.jsonl has answers of other weights that were in .*model before"):
        world.answers("", **ask)
    rows = rows_of(tmp_path / "answers.jsonl")
    del rows[0]["weights"]  # as files were before they said so
    write_rows(tmp_path / "answers.jsonl", rows)
    world.answers("", **ask)
    with pytest.raises(ValueError, match=r"p\.jsonl holds the prompts and would be replaced"):
        world.answers("", **ask | {"out": str(prompts), "overwrite": True})


def test_an_export_does_not_replace_what_it_is_made_of(world, tmp_path):
    run = shutil.copytree(world.run, tmp_path / "runs" / "sft")
    for out in (run, run.parent, run / "model", run / "checkpoints"):
        with pytest.raises(ValueError, match=r"is to be written and holds .*, which it is made of"):
            export.export(run, out, overwrite=True)
    with pytest.raises(ValueError, match=r"is to be written and holds .*hf, which it is made of"):
        export.export(world.lora, world.hf, overwrite=True)
    assert export.export(run, run / "exported") == run / "exported"


def test_what_a_killed_start_wrote_is_used(world, sampled, monkeypatch):
    """Batches are on disk as they come: the second start does the rest only."""
    asked = []
    answers = Answerer.answers

    def dying(self, prompts, seeds, limits, wanted, without):
        asked.append(len(wanted))
        for number, batch in enumerate(answers(self, prompts, seeds, limits, wanted, without)):
            if number == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Answerer, "answers", dying)
    config = world.config("killed", sampling=WARM)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(config)
    assert world.answers("killed", sampling=WARM) == sampled
    assert asked[0] == len(PROMPTS) > asked[1] > 0


def test_stop_strings_end_an_answer(world, sampled):
    text = max((row["response"] for row in sampled), key=len)
    stop = text[len(text) // 2 :][:2]
    rows = world.answers("stopped", sampling=WARM, stop=(stop, "never said"))
    for row, free in zip(rows, sampled, strict=True):
        assert row["response"] == free["response"].partition(stop)[0]
        if stop in free["response"]:
            assert (row["finish_reason"], row["tokens"] <= free["tokens"]) == ("stop", True)
        else:
            assert row["finish_reason"] == free["finish_reason"]


def test_conversations_go_through_the_chat_template(world):
    turns = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:3]]
    messages = write_rows(world.folder / "messages.jsonl", turns)
    text = world.folder / "lines.txt"
    text.write_text("\n\n".join(PROMPTS[:3]) + "\n", encoding="utf-8")
    wrapped, chat, plain = (
        [row["response"] for row in world.answers(name, prompts=str(path), sampling=WARM, **options)]
        for name, path, options in (
            ("wrapped", messages, {}),
            ("chat", text, {"template": "chat"}),
            ("plain", text, {}),
        )
    )
    assert wrapped == chat != plain


def test_a_principle_changes_answers_and_none_changes_nothing(world):
    """Of no weight to a model that never saw one but what its logits say; the file says what it was."""
    plain = world.answers("no principle", prompts=world.prompts)
    told = world.answers("principle", principle="Be brief.", sampling=Sampling(principle_weight=3.0))
    assert [row["prompt"] for row in told] == [row["prompt"] for row in plain]
    assert [row["response"] for row in told] != [row["response"] for row in plain]
    assert told[0]["settings"]["principle"] == "Be brief."
    assert told[0]["settings"]["principle_weight"] == 3.0
    assert not {"principle", "principle_weight"} & plain[0]["settings"].keys()
    with pytest.raises(ValueError, match="max_prompt_tokens=9 would cut a prompt otherwise with the principle"):
        world.config("principle", principle="Be brief.", sampling=Sampling(principle_weight=1.0), max_prompt_tokens=9)
    with pytest.raises(ValueError, match="principle=None and principle_weight=1"):
        world.config("principle", sampling=Sampling(principle_weight=1.0))
    with pytest.raises(ValueError, match=r"other settings: principle was 'Be brief\.' and is None now"):
        world.answers("principle")


def test_any_checkpoint_can_be_asked(world):
    texts = {}
    for which in ("2", "6", "last", "best"):
        texts[which] = [row["response"] for row in world.answers(f"at {which}", checkpoint=which)]
    assert texts["last"] == texts["6"] != texts["2"]
    assert texts["best"] in (texts["2"], texts["6"])


def test_seeds_follow_from_the_prompt_and_batches_from_all_prompts():
    first, second = [1, 2, 3], [4]
    seeds = prompt_seeds([first, second, first], 0)
    assert len(set(seeds)) == 3
    assert prompt_seeds([second, first, first], 0) == [seeds[1], seeds[0], seeds[2]]
    assert not set(prompt_seeds([first, second, first], 1)) & set(seeds)
    assert [batch_rows(32, n, 1) for n in (1, 3, 20, 33)] == [1, 4, 32, 32]
    assert batch_rows(32, 3, 8) == 8


def said(world, capsys, *arguments) -> str:
    capsys.readouterr()
    assert generate.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    return message


def test_what_cannot_be_done_is_refused_in_one_line(world, sampled, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    common = ("--prompts", world.prompts, "--out", out)
    empty, long, odd, broken = (tmp_path / name for name in ("empty.jsonl", "long.txt", "odd.jsonl", "broken.jsonl"))
    empty.touch()
    long.write_text("fine\n" + "word " * 300, encoding="utf-8")
    write_rows(odd, [{"prompt": "one"}, {"prompt": 2}])
    broken.write_text('{"prompt": "one"}\n{"prompt', encoding="utf-8")
    unsaved = shutil.copytree(world.run, tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints"))

    def refused(*arguments, model=world.run):
        return said(world, capsys, "--model", model, *arguments)

    assert "is empty" in refused("--prompts", empty, "--out", out)
    assert "long.txt:2" in (message := refused("--prompts", long, "--out", out))
    assert "120 positions" in message
    assert "odd.jsonl:2" in refused("--prompts", odd, "--out", out)
    assert "broken.jsonl:2" in refused("--prompts", broken, "--out", out)
    assert "no such file" in refused("--prompts", tmp_path / "absent.jsonl", "--out", out)
    assert "no complete checkpoint" in refused(*common, model=unsaved)
    assert "no checkpoint 3" in refused(*common, "--checkpoint", 3)
    assert "no model folder" in refused(*common, model=tmp_path / "absent")
    assert "--checkpoint" not in refused(*common, model=tmp_path)
    assert "checkpoint=best is for run folders" in refused(*common, "--checkpoint", "best", model=world.hf)
    assert "temperature=0" in refused(*common, "--top-p", 0.9)
    assert "top_p=2.0" in refused(*common, "--temperature", 1, "--top-p", 2)
    assert "max_tokens=0" in refused(*common, "--max-tokens", 0)
    assert "--prompts FILE --out" in refused("--prompts", world.prompts)
    assert "generator" in refused(*common, "--generator", "mine")
    assert "end in .json" in refused(*common, "--alpaca-eval")
    assert "cannot be written" in refused("--prompts", world.prompts, "--out", world.prompts / "below.jsonl")
    assert "other settings: temperature was 1.5" in refused(
        "--prompts", world.prompts, "--out", world.folder / "sampled.jsonl", "--max-tokens", MAX_TOKENS
    )
    turned = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "another"}])
    shutil.copy(world.folder / "sampled.jsonl", out)
    warm = ("--max-tokens", MAX_TOKENS, "--temperature", 1.5)
    assert "other prompts" in refused("--prompts", turned, "--out", out, *warm)
    assert "model was" in refused(*common, *warm, model=world.hf)
    assert "no answer of this command" in refused("--prompts", world.prompts, "--out", turned, *warm)


def test_long_prompts_can_be_cut_and_answers_end_with_the_model_s_positions(world, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 300, encoding="utf-8")
    row = world.answers("cut", prompts=str(long), max_prompt_tokens=110, max_tokens=500)[0]
    assert row["tokens"] <= 10
    assert row["settings"]["max_prompt_tokens"] == 110


@pytest.mark.slow
def test_samples_of_training_are_the_answers_of_its_checkpoints(world, tmp_path):
    """At every evaluation, before the first step and with LoRA too; a resumed run goes on in the same file."""
    data = {"train.sample_prompts": 3, "train.sample_tokens": 12, "train.eval_every": 2, "train.save_every": 2}
    common = {"tracking.tensorboard": False, "train.keep_last": 5, **data}
    kinds = {
        "whole": {"objective.name": "sft"},
        "adapters": {"lora.rank": 4, "model.path": world.hf, "contrast.weights": "uniform"},
    }
    for name, changes in kinds.items():
        for steps, resume in ((2, "never"), (4, "auto")):
            own = {"train.steps": steps, "run.resume": resume, "optim.learning_rate": 0.05}
            run_dir = rpo_jax.run(configured(world.data, tmp_path / name, world.cache, common | own | changes)).run_dir
        samples = rows_of(run_dir / "samples.jsonl")
        assert [row["step"] for row in samples] == [0] * 3 + [2] * 3 + [4] * 3
        assert len({(row["step"], row["response"]) for row in samples}) > 3
        prompts = write_rows(tmp_path / f"{name}.jsonl", [{"prompt": row["prompt"]} for row in samples[:3]])
        for step in (2, 4):
            options = {"model": str(run_dir), "checkpoint": str(step), "prompts": str(prompts), "max_tokens": 12}
            answers = world.answers(f"{name} at {step}", **options)
            assert [row["response"] for row in answers] == [row["response"] for row in samples if row["step"] == step]


@pytest.fixture(scope="module")
def model_outputs(world):
    """AlpacaEval's file, made by the command from a set that it is given."""
    asked = [
        {"instruction": prompt, "output": "No.", "generator": "reference", "dataset": "helpful_base"}
        for prompt in PROMPTS
    ]
    reference = world.folder / "alpaca_eval_set.json"
    reference.write_text(json.dumps(asked), encoding="utf-8")
    out = world.folder / "model_outputs.json"
    options = ("--max-tokens", MAX_TOKENS, "--batch-size", 8, "--generator", "mine", "--cache-dir", world.cache)
    arguments = ("--model", world.run, "--alpaca-eval", "--prompts", reference, "--out", out, *options)
    assert generate.main([str(argument) for argument in arguments]) == 0
    return out, reference


def test_alpaca_eval_s_file_has_every_prompt_and_a_generator(model_outputs):
    out, _ = model_outputs
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == PROMPTS
    assert {(row["generator"], row["dataset"]) for row in rows} == {("mine", "helpful_base")}
    answers = rows_of(out.with_suffix(".jsonl"))
    assert [row["output"] for row in rows] == [row["response"] for row in answers]
    assert answers[0]["prompt"] == [{"role": "user", "content": PROMPTS[0]}]


# Beside the environment, not in it: it needs a setuptools that still has pkg_resources.
ALPACA_EVAL = ("alpaca_eval==0.6.6", "fire==0.7.1", "termcolor", "python-dotenv", "tiktoken", "patsy", "setuptools<81")


@pytest.mark.slow
def test_alpaca_eval_reads_what_is_written_for_it(model_outputs, tmp_path):
    """Every row is lined up with the reference's answer to its instruction and judged, by the package itself."""
    out, reference = model_outputs
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "package")]
    subprocess.run([*install, *ALPACA_EVAL], check=True)
    reader = Path(__file__).with_name("read_by_alpaca_eval.py")
    command = [sys.executable, "-W", "ignore", str(reader), str(out), str(reference)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "package")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    rows = json.loads(out.read_text(encoding="utf-8"))
    longer = sum(len(row["output"].strip()) > len("No.") for row in rows)
    assert told == {"generator": "mine", "n_total": len(PROMPTS), "wins": longer}


def test_a_disk_without_room_ends_in_one_line_and_keeps_what_fits(world, capsys):
    with small_files(4 << 10), pytest.raises(WriteFailed, match=r"full\.jsonl cannot be written: File too large"):
        generate.generate(world.config("full"))
    assert "its lines wait in memory, and it goes on" in capsys.readouterr().out
    assert 0 < len(rows_of(world.folder / "full.jsonl")) < len(PROMPTS), "whole lines"
    assert world.answers("full") == world.answers("whole")
