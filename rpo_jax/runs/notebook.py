"""Progress in a Jupyter notebook: one line that is redrawn where it stands, however long a run takes."""

from __future__ import annotations

import html
import time
import warnings
from typing import Any

REDRAWS_SECONDS = 0.2  # a kernel that sends more often makes a browser wait


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, as of JupyterLab, VS Code or Colab: IPython in a terminal is none."""
    try:
        shell = get_ipython()  # pyright: ignore[reportUndefinedVariable]  # IPython puts it among the builtins
    except NameError:
        return False
    return shell.has_trait("kernel")


def hush_libraries() -> None:
    """Without tqdm's warning that it would rather draw with widgets: libraries import it, and its bars are not used."""
    warnings.filterwarnings("ignore", message="IProgress not found")


class NotebookProgress:
    """A bar with a line of text, in an output of its own that every update replaces.

    HTML and not a widget: it needs no extension, and stays in a notebook that is saved, or run without a browser.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]  # there in every notebook

        self._name, self._total, self._begun, self._done, self._text = name, total, done, done, ""
        self._started = self._drawn = time.perf_counter()
        self._handle: Any = display(self, display_id=True)

    def update(self, done: int, text: str) -> None:
        """Show this many as done; a text that is empty leaves the newest one in place."""
        self._done, self._text = done, text or self._text
        if time.perf_counter() - self._drawn >= REDRAWS_SECONDS:
            self.draw()

    def draw(self) -> None:
        self._drawn = time.perf_counter()
        self._handle.update(self)

    def _times(self) -> str:
        seconds, did = time.perf_counter() - self._started, self._done - self._begun
        left = self._total - self._done
        if left <= 0 or did <= 0:
            return f"{clock(seconds)} taken"
        return f"{clock(seconds / did * left)} left"

    def __repr__(self) -> str:
        parts = (f"{self._name} {self._done}/{self._total}", self._times(), self._text)
        return "  ".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._done}" max="{max(self._total, 1)}"></progress>'
        return f'<div style="font-family: monospace; white-space: pre-wrap">{bar} {html.escape(repr(self))}</div>'


def clock(seconds: float) -> str:
    """Hours where there are any, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
