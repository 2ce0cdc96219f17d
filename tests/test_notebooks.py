"""The notebooks: committed without outputs, and run from the first cell to the last by a real kernel, in small."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import tomllib
import warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import rpo_jax
from rpo_jax.export import export
from rpo_jax.runs.notebook import NotebookProgress, in_notebook
from rpo_jax.runs.tracking import Reporter
from rpo_jax.training import prepare
from tests.runs import configured

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "TRAIN_ROWS": 64,
    "SFT_STEPS": 3,
    "RPO_STEPS": 3,
    "TRIED": ("temperature=0.5", "perplexity=2"),
    "EPOCHS": 0.25,
    "ASKED": 6,
}
PARAMETERS = "parameters"  # the tag of the cell whose values a test replaces
MOST_PRINTED = 10_000  # characters of a notebook's whole printed output: two pages


def by_name(path: Path) -> str:
    return path.stem


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["contrast", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == [], cell.source
        assert cell.execution_count is None, cell.source
    assert len([cell for cell in code if PARAMETERS in cell.metadata.get("tags", [])]) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_opens_in_colab_where_it_fetches_what_it_needs(path):
    opening, setup = nbformat.read(path, as_version=4).cells[:2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owner = project["urls"]["Repository"].removeprefix("https://github.com/")
    colab = "https://colab.research.google.com"
    (badge,) = re.findall(r"\[!\[Open in Colab\]\((\S+)\)\]\((\S+)\)", opening.source)
    assert badge == (f"{colab}/assets/colab-badge.svg", f"{colab}/github/{owner}/blob/main/notebooks/{path.name}")
    assert f'"https://github.com/{owner}"' in setup.source
    (extras,) = re.findall(r"\.\[{accelerator}([\w,]+)\]", setup.source)
    accelerators = re.findall(r'"(\w+),"', setup.source)
    assert accelerators == ["tpu", "cuda", "cuda12"]
    assert set(project["optional-dependencies"]) >= {*extras.split(","), *accelerators}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_calls_what_there_is_as_it_is_called(path):
    """Without a run, which takes minutes: every function of ours that a cell calls takes the arguments it is given."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for source in code for node in ast.walk(ast.parse(source))]
    known = {"rpo_jax": rpo_jax}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rpo_jax"):
            known |= {name.name: getattr(importlib.import_module(str(node.module)), name.name) for name in node.names}
    checked = 0
    for node in nodes:
        words = ast.unparse(node.func).split(".") if isinstance(node, ast.Call) else []
        if not words or words[0] not in known or not all(word.isidentifier() for word in words):
            continue
        assert isinstance(node, ast.Call)
        called = functools.reduce(getattr, words[1:], known[words[0]])
        given = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        inspect.signature(called).bind(*node.args, **given)
        checked += 1
    assert checked >= 5


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A small model that answers conversations."""
    folder, data = tmp_path_factory.mktemp("chat"), ROOT / "configs" / "data" / "smollm2_train.jsonl"
    changes = {"objective.name": "sft", "train.steps": 2, "data.eval_rows": 0, "model.vocab_size": 1500}
    run = rpo_jax.run(configured(data, folder / "run", folder / "cache", changes)).run_dir
    return export(run, folder / "hf")


def executed(path: Path, runs: Path, model: Path) -> nbformat.NotebookNode:
    """The notebook after a run with few steps, on few rows."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", []))
    named = {line.partition(" = ")[0]: line for line in cell.source.splitlines()}
    changes = {
        name: value for name, value in {**SMALL, "RUNS": str(runs), "MODEL": str(model)}.items() if name in named
    }
    assert set(changes) == set(named), "every parameter has a small value here"
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode, cell_with: str) -> list:
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and cell_with in cell.source)
    return cell.outputs


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("default")  # of the kernel's client: tornado, zmq and asyncio warn of each other
@pytest.mark.slow  # more than a minute each
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs(path, tmp_path, chat_model):
    notebook = executed(path, tmp_path / "runs", chat_model)
    assert figures(notebook) == {"quickstart": 2, "contrast": 3}[path.stem]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = [output for output in outputs if output.output_type == "stream"]
    assert sum(len(output.text) for output in streams) < MOST_PRINTED
    assert [output.text for output in streams if output.name == "stderr"] == [], "warnings of libraries"
    bars = [
        output.data["text/plain"] for output in outputs if "<progress" in output.get("data", {}).get("text/html", "")
    ]
    assert bars
    assert [bar for bar in bars if " 0/" in bar] == [], "what was in the cache is done"
    assert json.loads((tmp_path / "runs" / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "runs" / "report.html").stat().st_size > 10_000
    # The run's progress is one output each that ends where the run ended, not a line a step.
    outputs = printed(notebook, {"quickstart": "result = rpo_jax.run(", "contrast": "sft = rpo_jax.run("}[path.stem])
    (bar,) = (output for output in outputs if output.get("data", {}).get("text/plain", "").startswith("train "))
    assert re.match(r"train (\d+)/\1\b", bar.data["text/plain"])
    assert "<progress" in bar.data["text/html"]
    if path.stem == "quickstart":
        tables = [output.data["text/html"] for output in printed(notebook, "rows.append([*texts, verdict(")]
        assert tables[0].count("<tr>") == 1 + SMALL["ASKED"]
        assert "tied" in tables[0], "three steps change little"
        assert (tmp_path / "runs" / "hf" / "model.safetensors").is_file()
    else:
        (table,) = printed(notebook, "accuracies = np.array(")
        assert table.text.splitlines()[-2].endswith(": tied"), "and so they are said to be"


def test_here_is_no_notebook():
    assert not in_notebook()


def test_what_was_embedded_before_is_shown_as_done(monkeypatch):
    told = []

    class Told(Reporter):
        @contextmanager
        def progress(self, name, total, start=0):
            yield lambda done, metrics: told.append((name, done, total))

    config = rpo_jax.load_config(None, ["embedding.encoder=hashed-words"])
    monkeypatch.setattr(prepare, "embed_texts", lambda texts, *_, **__: np.zeros((len(texts), 4)))  # all from the cache
    assert len(prepare._embed(config.embedding, "cache", Told(silent=True), ["a", "b"])) == 2
    assert told == [("embed", 2, 2)]


def test_in_a_notebook_no_library_asks_for_widgets(monkeypatch):
    monkeypatch.setattr("rpo_jax.runs.tracking.in_notebook", lambda: True)
    Reporter()
    warnings.warn("IProgress not found. Please update jupyter and ipywidgets.", stacklevel=1)  # an error otherwise


def test_progress_tells_what_is_done_and_how_long_the_rest_takes(monkeypatch):
    drawn = []

    class Handle:
        def update(self, shown):
            drawn.append(shown._repr_html_())

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Handle())
    clock = iter([0.0, 0.0, 0.1, 10.0, 10.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr("rpo_jax.runs.notebook.time.perf_counter", lambda: next(clock, 20.0))
    bar = NotebookProgress("train", 4, 0)
    bar.update(1, "loss <1>")  # too soon after the start to draw
    bar.update(2, "")
    bar.draw()
    assert "train 2/4" in drawn[-1]
    assert 'value="2" max="4"' in drawn[-1]
    assert "loss &lt;1&gt;" in drawn[-1]
    assert "left" in drawn[-1]
