"""The notebooks: committed without outputs, and run from the first cell to the last by a real kernel, in small."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rpo_jax.runs.notebook import NotebookProgress, in_notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {"TRAIN_ROWS": 64, "SFT_STEPS": 3, "RPO_STEPS": 3, "TRIED": ("temperature=0.5", "perplexity=2")}
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


def executed(path: Path, runs: Path) -> nbformat.NotebookNode:
    """The notebook after a run with few steps, on few rows."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", []))
    named = {line.partition(" = ")[0]: line for line in cell.source.splitlines()}
    changes = {name: value for name, value in {**SMALL, "RUNS": str(runs)}.items() if name in named}
    assert set(changes) == set(named), "every parameter has a small value here"
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(path.parent)}}).execute()
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
def test_a_notebook_runs(path, tmp_path):
    notebook = executed(path, tmp_path / "runs")
    assert figures(notebook) == {"quickstart": 2, "contrast": 3}[path.stem]
    streams = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    assert sum(map(len, streams)) < MOST_PRINTED
    # The run's progress is one output each that ends where the run ended, not a line a step.
    outputs = printed(notebook, "sft = rpo_jax.run(")
    (bar,) = (output for output in outputs if "train " in output.get("data", {}).get("text/plain", ""))
    assert "train 3/3" in bar.data["text/plain"]
    assert "<progress" in bar.data["text/html"]
    if path.stem == "quickstart":
        assert (tmp_path / "runs" / "report.html").stat().st_size > 10_000
        lines = (tmp_path / "runs" / "rpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[-1])["step"] == SMALL["RPO_STEPS"]


def test_here_is_no_notebook():
    assert not in_notebook()


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
