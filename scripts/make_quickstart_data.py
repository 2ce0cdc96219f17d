"""Write the quickstart's preference pairs: `python scripts/make_quickstart_data.py [--out DIR] [--seed N]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rpo_jax.tasks.gold import GoldTask, make_rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's preference pairs as JSONL.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "configs" / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), make_rows(GoldTask(), arguments.seed), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"quickstart_{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
