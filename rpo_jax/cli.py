"""The console script: `rpo-jax COMMAND ...` is `python -m rpo_jax.COMMAND ...`; `rpo-jax --version`."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rpo_jax import __version__

COMMANDS = ("train", "prepare", "generate", "judge", "export", "plan", "doctor", "report", "compare", "sample")


def summary(command: str) -> str:
    """The first sentence of a command's docstring, read from its source: importing it may take seconds for jax."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].partition(": `")[0].rstrip(".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named first; without one, or with --help, list them; --version tells that."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return importlib.import_module(f"rpo_jax.{words[0]}").main(words[1:])
    if words and words[0] in ("-V", "--version"):
        print(f"rpo-jax {__version__}")
        return 0
    helped = bool(words) and words[0] in ("-h", "--help")
    if words and not helped:
        print(f"error: there is no command {words[0]!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    print("usage: rpo-jax COMMAND [ARGUMENTS]; rpo-jax COMMAND --help tells what a command takes\n")
    for command in COMMANDS:
        print(f"  {command:<10}{summary(command)}")
    print("\nrpo-jax train --help names presets, objectives, data layouts and model families; rpo-jax --version")
    return 0 if helped else 2


if __name__ == "__main__":
    raise SystemExit(main())
