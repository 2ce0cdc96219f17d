"""The console script: `rpo-jax COMMAND ...` is `python -m rpo_jax.COMMAND ...`."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("train", "prepare", "generate", "judge", "export", "plan", "doctor", "report", "compare", "sample")


def summary(command: str) -> str:
    """The first sentence of a command's docstring, read from its source: importing it may take seconds for jax."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].partition(": `")[0].rstrip(".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named first; without one, or with --help, list them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        return importlib.import_module(f"rpo_jax.{given[0]}").main(given[1:])
    helped = bool(given) and given[0] in ("-h", "--help")
    if given and not helped:
        print(f"error: there is no command {given[0]!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    print("usage: rpo-jax COMMAND [ARGUMENTS]; rpo-jax COMMAND --help tells what a command takes\n")
    for command in COMMANDS:
        print(f"  {command:<10}{summary(command)}")
    return 0 if helped else 2


if __name__ == "__main__":
    raise SystemExit(main())
