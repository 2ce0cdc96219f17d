"""What the documentation says exists: commands and keys parse, links lead somewhere, tables agree with the code."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import rpo_jax
from rpo_jax import cli
from rpo_jax.config import TrackingConfig, synonyms
from rpo_jax.config.reading import known_keys, load_config, parse_config
from rpo_jax.export import export
from rpo_jax.models.attention.kind import Split
from rpo_jax.models.attention.registry import ATTENTIONS, make_attention
from rpo_jax.runs import loggers
from rpo_jax.runs.tracking import MetricsLog
from tests.judge_server import completion, serving
from tests.models.test_blockwise import packed_layout, tensors
from tests.objectives import laws
from tests.runs import SMALL, configured, preference_rows, write_rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CONFIGURED = {"train", "prepare"}  # all their arguments are the configuration's


SHOWN = {"text", "json"}  # languages that nobody runs: output, and rows, which tests/data/test_columns.py reads
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def test_every_block_is_of_a_kind_that_is_checked():
    found = {(page.name, language) for page in PAGES for language, _ in FENCE.findall(page.read_text("utf-8"))}
    assert {language for _, language in found} == {"bash", "python", "yaml"} | SHOWN
    assert {page for page, language in found if language == "python"} == {"README.md", "index.md", "architecture.md"}


def spans_of(page: Path) -> list[str]:
    """Commands in running text."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    programs = ("rpo-jax ", "python -", "bash ", "pip ", "uv ", "pytest ", "docker ", "lm_eval ", "PYTHONPATH=")
    return [span for span in spans if span.startswith(programs)]


def shell_lines(page: Path) -> list[str]:
    """Lines of the blocks that a shell would run."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if words_of(line)]


def words_of(line: str) -> list[str]:
    """A command's words, without a comment and the variables that are set for it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


COMMANDS = [
    pytest.param(words_of(line), whole, id=f"{page.stem}: {line[:60]}")
    for page in PAGES
    for whole, lines in ((True, shell_lines(page)), (False, spans_of(page)))
    for line in lines
]


def ours(command: str, arguments: list[str], whole: bool = True) -> None:
    """One of our commands is there, and takes what it is given; running text may leave out what it needs besides."""
    if command in ("--help", "--version"):
        assert cli.main([command]) == 0
        return
    if command == "NAME":
        return
    assert command in cli.COMMANDS
    arguments = [word if word != "FILE" else "quickstart" for word in arguments if not re.fullmatch(r"\.\.+", word)]
    if "--help" in arguments:
        assert helped(command, arguments) == 0
        return
    if command not in CONFIGURED:
        parser = importlib.import_module(f"rpo_jax.{command}")._parser()
        for action in parser._actions:
            action.required &= whole
        _, arguments = parser.parse_known_args(arguments)
        assert not arguments or command in ("plan", "doctor")
    if arguments:
        parse_config(arguments)


def helped(command: str, arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main([command, *arguments]))
    return int(ended.value.code or 0)


def installs(arguments: list[str]) -> None:
    """The extras that are asked for are there."""
    asked = [name for word in arguments for name in re.findall(r"\[([\w,-]+)\]", word)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {name for names in asked for name in names.split(",")} <= set(extras)


def in_docker(arguments: list[str]) -> None:
    """An image's file, or what an image runs: `rpo-jax`."""
    if arguments[0] == "build":
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
        return
    image = next(number for number, word in enumerate(arguments) if word.startswith("rpo-jax:"))
    ours(arguments[image + 1], arguments[image + 2 :])


@pytest.mark.parametrize(("words", "whole"), COMMANDS)
def test_a_command_is_one_that_there_is_with_arguments_that_it_takes(words, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    match words:
        case ["rpo-jax", command, *arguments]:
            ours(command, arguments, whole)
        case ["python", "-m", module, *arguments] if module.startswith("rpo_jax."):
            ours(module.removeprefix("rpo_jax."), arguments, whole)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["pip" | "uv", *arguments]:
            installs(arguments)
        case ["docker", *arguments]:
            in_docker(arguments)
        case ["bash", script, *_] if script != "-c":
            assert (ROOT / script).is_file()
        case ["source", file]:
            made = (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
            assert f"$root/{file.partition('/')[0]}" in made
        case ["pytest", *arguments]:
            assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
        case ["lm_eval", *_]:
            pass  # tests/test_lm_eval.py runs it
        case ["python", "-c", code]:
            compile(code, "documentation", "exec")
        case _:
            pytest.fail(f"nothing checks {shlex.join(words)}")


def test_there_are_commands_of_each_kind():
    all_words = [case.values[0] for case in COMMANDS]
    used = {words[1] for words in all_words if words[0] == "rpo-jax"}
    used |= {words[2].removeprefix("rpo_jax.") for words in all_words if words[:2] == ["python", "-m"]}
    assert used >= set(cli.COMMANDS) | {"--help", "--version"}
    assert {words[0] for words in all_words} >= {"pip", "uv", "docker", "bash", "source", "lm_eval"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_named_is_one(page):
    sections = {key.partition(".")[0] for key in known_keys()}
    named = re.findall(r"`(?:--)?([a-z]+\.[a-z_]\w*)(?:[`: =])", page.read_text(encoding="utf-8"))
    keys = {key for key in named if key.partition(".")[0] in sections and not key.endswith((".json", ".jsonl", ".py"))}
    invented = {"objective.cauchy_scale", "data.json"}  # the example of an extension; a file of a run folder
    assert keys - set(known_keys()) - invented == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def test_other_trainers_keys_are_answered_as_the_table_says():
    rows = [line.split("|")[1:4] for line in (DOCS / "coming-from.md").read_text("utf-8").splitlines() if "| `" in line]
    pairs = []
    for *theirs, ours in rows:
        keys = re.findall(r"`([a-z]+\.\w+)`", ours)
        assert keys
        assert set(keys) <= set(known_keys())
        pairs += [(name, keys) for cell in theirs for name in re.findall(r"`(\w+)`", cell)]
    assert len(pairs) > 50
    for name, keys in pairs:
        assert set(synonyms.meant(name, known_keys())) & set(keys), name


def test_configurations_are_read(tmp_path):
    read = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            assert yaml.safe_load(block)
            if not block.startswith(("# LLaMA-Factory", "# lm-eval")):
                file = tmp_path / f"{page.stem}.yaml"
                file.write_text(block, encoding="utf-8")
                load_config(file)
                read += 1
    assert read >= 3


def test_the_answer_to_another_trainer_s_key_is_the_one_that_is_shown(tmp_path, monkeypatch, capsys):
    (shown,) = blocks(DOCS / "coming-from.md", "text")
    theirs = next(block for block in blocks(DOCS / "coming-from.md", "yaml") if block.startswith("# LLaMA-Factory"))
    monkeypatch.chdir(tmp_path)
    assert "per_device_train_batch_size: 2" in theirs
    Path("mine.yaml").write_text("per_device_train_batch_size: 2\n", encoding="utf-8")
    assert cli.main(["train", "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err.startswith(shown.strip().rstrip("?"))


# The extensions of docs/architecture.md, each in the place of a file that it is like.


def extension(number: int, like: str | None) -> dict:
    """The names that one of the page's blocks makes, given what the module `like` imports."""
    names = {} if like is None else {**vars(importlib.import_module(like)), "__name__": "extension"}
    exec(blocks(DOCS / "architecture.md", "python")[number], names)
    return names


def test_the_objective_that_is_shown_is_its_equation():
    made = extension(0, "rpo_jax.objectives.methods.discopop")["OBJECTIVES"]["cauchy"]
    scores = laws.draw_scores(6)
    loss = made.total_loss(scores)
    ratios = [np.asarray(side.log_prob - side.reference_log_prob, float) for side in laws.sides_of(scores)]
    weights, valid = laws.matrix_of(scores)
    entries = weights * np.subtract.outer(*ratios)
    wanted = np.log1p((1 - made.beta * entries) ** 2 / made.cauchy_scale)[valid].mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_the_family_that_is_shown_is_the_one_that_there_is():
    module = importlib.import_module("rpo_jax.models.families.vaultgemma")
    assert extension(1, module.__name__)["FAMILY"] == module.FAMILY


def test_the_attention_that_is_shown_agrees_with_ours(monkeypatch):
    kind = extension(2, "rpo_jax.models.attention.dense")["KIND"]
    monkeypatch.setitem(ATTENTIONS, "shown", kind)
    layout = packed_layout(2, 256)
    live = np.asarray(layout.segment_ids > 0)
    found = {}
    for name in ("shown", "dense"):
        attend = make_attention(name, "cpu", layout, (None, 64), Split())
        *qkv, _ = tensors(2, 256)
        found[name] = np.asarray(attend(*qkv, np.int32(1)))[live]
    np.testing.assert_allclose(found["shown"], found["dense"], atol=2e-5)


def test_the_layout_that_is_shown_reads_a_row():
    layout = extension(3, "rpo_jax.data.layouts.shp")["LAYOUT"]
    row = {"prompt": "Hi", "response_0": "Hello.", "response_1": "Go.", "better_response_id": 0}
    assert set(layout.columns) == set(row)
    for better, wanted in ((0, ["Hello.", "Go."]), (1, ["Go.", "Hello."])):
        parts = extension(3, "rpo_jax.data.layouts.shp")["parse"]({**row, "better_response_id": better})
        by_kind = {response.kind: response.text for response in parts.responses}
        assert [by_kind[kind] for kind in ("chosen", "rejected")] == wanted, better


def test_the_hook_that_is_shown_stops_a_run_without_progress(monkeypatch):
    given, stopped = [], []
    monkeypatch.setattr(rpo_jax, "run", lambda config, hooks: given.extend(hooks), raising=False)
    names = {"rpo_jax": rpo_jax, "config": None}
    exec(blocks(DOCS / "architecture.md", "python")[4], names)
    (hook,) = given
    for step, accuracy in ((0, 0.5), (100, 0.6), (200, 0.6), (300, 0.55)):
        assert stopped == []
        hook.after_evaluation(SimpleNamespace(step=step, stop=stopped.append), {"eval_rewards/accuracies": accuracy})
    assert stopped == ["no better accuracy since step 100"]


def test_the_dashboard_that_is_shown_takes_what_is_logged(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", extension(5, "rpo_jax.runs.loggers")["KIND"])
    log = MetricsLog(tmp_path, TrackingConfig(), 0, "id", {})
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "1,loss,0.5\n"


# The pages' commands, one after another as a reader would give them, in few steps.

# What is left out here, and who runs it: the words that the command has, joined by spaces.
ELSEWHERE = {
    r"bash scripts/quickstart": "tests/test_smollm2.py",
    r"bash scripts/": "scripts/test.sh itself, which runs docs.sh too",
    r"bash benchmarks/": "tests/test_benchmarks.py, with a tiny model",
    r"(pip|uv) ": "test_the_pages_install_what_they_say, in an environment of its own",
    r"source ": "test_the_environment_of_a_clone_is_activated",
    r"docker ": "test_the_images_are_built_and_train, where there is Docker",
    r"lm_eval ": "tests/test_lm_eval.py",
    r".*plan --": "tests/test_plan_gpu.py",
    r".*compare --config configs/frontier": "tests/test_frontier.py, with a small model",
    r".*compare --": "test_the_studies_of_the_pages_come_to_their_end, with a small model",
    r".* --distributed": "tests/test_distributed.py, with two processes of this machine",
}
DASHBOARDS = re.compile(r"tracking\.(\w+)")


def runs_here(words: list[str]) -> bool:
    line = " ".join(words)
    needed = DASHBOARDS.search(line)
    if needed is not None and importlib.util.find_spec(needed[1]) is None:
        return False
    return not any(re.match(elsewhere, line) for elsewhere in ELSEWHERE)


RULE = "def score(prompt, answer):\n    return float(len(answer))\n"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with what a reader of the pages has: models, preferences, prompts, a rule, our configurations."""
    folder = tmp_path_factory.mktemp("reader")
    rows = preference_rows(48)
    for name in ("pairs.jsonl", "other.jsonl", "my_preferences.jsonl", "test.jsonl"):
        write_rows(folder / name, rows)
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:32]])
    (folder / "rules.py").write_text(RULE)
    (folder / "FILE").write_text("data: {path: pairs.jsonl}\nmodel: {path: my-sft}\n")
    (folder / "configs").symlink_to(ROOT / "configs")
    changes = {"train.steps": 1, "data.eval_rows": 0, "objective.name": "sft"}
    run = rpo_jax.run(configured(folder / "pairs.jsonl", folder / "start", folder / "cache", changes)).run_dir
    export(run, folder / "my-sft")
    (folder / "path" / "to").mkdir(parents=True)
    for name in ("model", "llama-or-mistral-folder"):
        (folder / "path" / "to" / name).symlink_to(folder / "my-sft")
    return folder


FEW = ["--train.steps", "2", "--batch.pairs", "8", "--data.max_prompt_tokens", "48", "--data.max_tokens", "112"]
FEW += ["--run.cache_dir", "cache", "--run.overwrite", "true"]
# The paper's runs with what a reader of this folder has in place of its data and its model.
PAPER = [*FEW, "--model.path", "my-sft", "--data.path", "pairs.jsonl", "--data.eval_path", "pairs.jsonl"]
PAPER += ["--data.layout", "auto", "--data.eval_split", "train", "--batch.micro_rows", "8"]
LOOP = [*FEW[2:], "--train.rounds", "2", "--rounds.prompts", "8", "--data.eval_rows", "8", "--rounds.max_tokens", "8"]
LOOP += ["--rounds.keep_unfinished", "true"]  # the model has learnt nothing


def in_few_steps(command: str, arguments: list[str]) -> list[str]:
    if command == "train":
        more = LOOP if "--train.rounds" in arguments else FEW
        return [*arguments, *(PAPER if any(word.startswith("paper_") for word in arguments) else more)]
    if command == "doctor":
        return [*arguments, *FEW[:-2]]
    # Two pages write to one folder here.
    more = {"generate": ["--max-tokens", "8", "--overwrite"], "export": ["--overwrite"]}
    return [*arguments, *more.get(command, [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's database library
def test_the_commands_of_the_pages_run_one_after_another(reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    nearby = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "TRACKIO_DIR": "trackio"}
    for name, value in nearby.items():
        monkeypatch.setenv(name, value)
    pages = [DOCS / "index.md", *(page for page in PAGES if page.name != "index.md")]  # its models come first
    run, failed = 0, []
    with serving(lambda *_: completion("Response 1 is more helpful.")) as judge:
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        for words in filter(runs_here, (words_of(line) for page in pages for line in shell_lines(page))):
            command, *arguments = words[1:] if words[0] == "rpo-jax" else words[2:]
            command = command.removeprefix("rpo_jax.")
            given = [command, *in_few_steps(command, arguments)]
            run += 1
            if cli.main(given) != 0:
                failed.append(f"{shlex.join(given)}: {capsys.readouterr().err}")
    assert "\n".join(failed) == ""
    assert run > 20
    assert judge.requests
    assert (reader / "answers.jsonl").is_file()
    assert (reader / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [DOCS / "index.md", ROOT / "README.md"], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, reader, monkeypatch):
    (block,) = blocks(page, "python")
    monkeypatch.chdir(reader)
    read = rpo_jax.load_config
    small = [f"{key}={value}" for key, value in SMALL.items() if not key.startswith("model.")]
    small += ["train.steps=1", "run.dir=runs/python", "run.overwrite=true"]
    small += ["model.path=path/to/model", "data.path=pairs.jsonl"]
    monkeypatch.setattr(rpo_jax, "load_config", lambda name, changes: read(name, [*changes, *small]), raising=False)
    exec(block, {})
    assert (reader / "runs" / "python" / "checkpoints" / "1").is_dir()


TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_the_pages_install_what_they_say(tmp_path):
    """In an empty environment, with this repository's wheel in place of the index's.

    Where PyTorch's own index is not reachable, torch comes as a clone gets it.
    """
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")], cwd=ROOT, check=True
    )
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    programs = tmp_path / "empty" / "bin"
    links = f"{tmp_path / 'dist'} {os.environ.get('PIP_FIND_LINKS', '')}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_FIND_LINKS": links}
    environment["VIRTUAL_ENV"] = str(tmp_path / "empty")  # what uv installs into

    def given(*words: str, at: Path = ROOT) -> str:
        command = [str(programs / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
        return done.stdout

    pages = [DOCS / "install.md", *PAGES]
    told = [words_of(line) for page in pages for line in (*shell_lines(page), *spans_of(page))]
    lines = list(dict.fromkeys(tuple(words) for words in told if words[0] in ("pip", "uv")))
    for_torch = [("pip", "install", "uv"), ("uv", "pip", "install", "--torch-backend", "cpu", "torch")]
    assert lines[:3] == [("pip", "install", "rpo-jax"), *for_torch]
    assert len(lines) > 6
    given(*lines[0])
    assert given("rpo-jax", "--version", at=tmp_path) == f"rpo-jax {rpo_jax.__version__}\n"
    given("rpo-jax", "doctor", "--config", "quickstart_sft", at=tmp_path)
    given("python", "-c", "import importlib.util; assert importlib.util.find_spec('torch') is None")
    given(*for_torch[0])
    given(*(for_torch[1] if answers(TORCH_INDEX) else ("pip", "install", "-c", "constraints.txt", "torch")))
    for words in lines[3:]:
        given(*words)
    # An environment that has torch's CPU build keeps it, whatever is asked for.
    assert given("python", "-c", "import torch; print(torch.version.cuda)") == "None\n"
    assert given("rpo-jax", "--version", at=tmp_path) == f"rpo-jax {rpo_jax.__version__}\n"


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="the tests run in another environment than scripts/test.sh's")
def test_the_environment_of_a_clone_is_activated():
    (line,) = (line for line in shell_lines(ROOT / "README.md") if line.startswith("source "))
    done = subprocess.run(["bash", "-ec", f"{line}\ncommand -v rpo-jax"], cwd=ROOT, capture_output=True, text=True)
    assert Path(done.stdout.strip()).resolve() == (ROOT / ".venv" / "bin" / "rpo-jax").resolve(), done.stderr


@pytest.mark.slow
def test_the_images_are_built_and_train(tmp_path):
    """Each `docker` line of the pages; without a GPU its image trains on the CPU."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.skip("no Docker engine answers")
    lines = [line for line in shell_lines(DOCS / "install.md") if line.startswith("docker ")]
    assert [line.split()[1] for line in lines] == ["build", "run", "build", "run"]
    for number, line in enumerate(lines):
        folder, few = ROOT, ""
        if "docker run" in line:
            folder = tmp_path / str(number)
            folder.mkdir()
            few = " --train.steps 2 --batch.pairs 8"
        given = line if shutil.which("nvidia-smi") else line.replace("--gpus all ", "")
        done = subprocess.run(["bash", "-c", given + few], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{given}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        if folder != ROOT:
            assert (folder / "runs" / "quickstart" / "sft" / "checkpoints" / "2").is_dir()


TINY = {"model.hidden_size": 16, "model.intermediate_size": 16, "model.num_layers": 1, "model.num_heads": 2}
TINY |= {"model.num_kv_heads": 1}
FEWER = {"train.epochs": 1, "data.train_rows": 32, "train.rounds": 2, "rounds.prompts": 32, "rounds.eval_prompts": 4}
FEWER |= {"rounds.max_tokens": 4, "batch.micro_rows": 16}  # of the tests' eight devices


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare_small", "compare_rounds"])
def test_the_studies_of_the_pages_come_to_their_end(name, tmp_path, monkeypatch):
    """The first table of each, with one seed, a tiny model and few rows."""
    told = {tuple(words_of(line)) for page in PAGES for line in (*shell_lines(page), *spans_of(page))}
    (words,) = (words for words in told if f"configs/{name}.yaml" in words)
    study = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    study["seeds"] = study["seeds"][:1]
    study["tables"] = dict(list(study["tables"].items())[:1])
    study["task"] |= {"train_pairs": 1, "held_out_pairs": 1}
    study["max_tokens"] = 4
    study["base"] |= TINY
    for changes in (study["start"], *study["methods"].values()):
        changes.update({key: value for key, value in FEWER.items() if key in changes})
        if "train.rounds" in changes:
            # The model has learnt nothing: none of its answers ends, and all are as bad by the true rule.
            changes |= {"rounds.keep_unfinished": True, "rounds.score": "rule:rules.py:score"}
    if "tuning" in study:
        study["tuning"]["grid"] = {"objective.beta": [0.1]}
        study["methods"]["PPO"]["grid"] = {"objective.ppo_kl_weight": [0.1]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "rules.py").write_text(RULE, encoding="utf-8")
    (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert cli.main([words[2].removeprefix("rpo_jax."), *words[3:]]) == 0
    table = (tmp_path / "runs" / name / "report.md").read_text(encoding="utf-8")
    for row in next(iter(study["tables"].values()))["rows"]:
        assert f"| {row} |" in table
