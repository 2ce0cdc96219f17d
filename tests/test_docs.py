"""What the documentation says exists: commands and keys parse, links lead somewhere, tables agree with the code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import rpo_jax
from rpo_jax import cli
from rpo_jax.config import synonyms
from rpo_jax.config.reading import known_keys, load_config, parse_config
from tests.runs import write_rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CONFIGURED = {"train", "prepare"}  # all their arguments are the configuration's


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    ours = [words[words.index("rpo-jax") + 1 :] for words in found if words[:1] == ["rpo-jax"]]
    modules = [
        [words[2].removeprefix("rpo_jax."), *words[3:]]
        for words in found
        if words[:2] == ["python", "-m"] and words[2].startswith("rpo_jax.")
    ]
    return ours + modules


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {shlex.join(words)[:60]}") for page in PAGES for words in commands(page)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_there_is_with_arguments_that_it_takes(words, tmp_path, monkeypatch):
    command, *arguments = words
    if command in ("--help", "--version"):
        return
    assert command in cli.COMMANDS
    arguments = [word if word != "FILE" else "quickstart" for word in arguments]
    if command not in CONFIGURED:
        parser = importlib.import_module(f"rpo_jax.{command}")._parser()
        _, arguments = parser.parse_known_args(arguments)
        assert not arguments or command in ("plan", "doctor")
    monkeypatch.chdir(tmp_path)
    if arguments:
        parse_config(arguments)


def test_there_are_commands_of_each_kind():
    assert {words.values[0][0] for words in COMMANDS} >= {"train", "doctor", "export", "generate", "plan", "report"}


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
            if block.startswith("# rpo_jax"):
                file = tmp_path / f"{page.stem}.yaml"
                file.write_text(block, encoding="utf-8")
                load_config(file)
                read += 1
            else:
                assert yaml.safe_load(block)
    assert read


@pytest.mark.slow
def test_the_python_of_the_first_page_runs(tmp_path, monkeypatch):
    from tests.runs import SMALL

    write_rows(tmp_path / "pairs.jsonl")
    (block,) = blocks(DOCS / "index.md", "python")
    small = [f"{key}={value}" for key, value in SMALL.items()] + ["train.steps=1", "model.path=null"]
    monkeypatch.chdir(tmp_path)
    read = rpo_jax.load_config
    monkeypatch.setattr(rpo_jax, "load_config", lambda name, changes: read(name, [*changes, *small]), raising=False)
    exec(block, {})
    assert (tmp_path / "runs" / "small_data" / "checkpoints" / "1").is_dir()
