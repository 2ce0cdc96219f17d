"""Answers of a model to prompts: `python -m rpo_jax.generate --model RUN_OR_HF --prompts FILE --out FILE.jsonl`.

An answer depends on the model, its prompt, the settings and the seed, not on the prompts beside it. A file that is
half done is completed; its rows end up in the order of the prompts. With --alpaca-eval, model_outputs.json for
AlpacaEval besides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rpo_jax.core.command import print_text, run_command
from rpo_jax.sampling.generation import GenerateConfig, generate
from rpo_jax.sampling.options import add_sampling_options, generate_settings

__all__ = ["generate", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.generate", description=__doc__)
    add = parser.add_argument
    add("--prompts", help=".txt with a prompt a line, or rows with prompt, messages or instruction, or preferences")
    add("--out", help="file of the answers: .jsonl; with --alpaca-eval .json (model_outputs.json)")
    add("--samples", type=int, default=1, help="answers to each prompt, with a temperature (1)")
    add_sampling_options(parser, temperature=0.0)
    add("--alpaca-eval", action="store_true", help="write model_outputs.json for the alpaca_eval package")
    add("--generator", help="with --alpaca-eval: the model's name there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: _generate(options))


def _generate(options: dict[str, Any]) -> None:
    out = generate(GenerateConfig(**generate_settings(options)))
    print_text(out)
    if options["alpaca_eval"]:
        print_text(f"judge it: alpaca_eval --model_outputs {out} --annotators_config weighted_alpaca_eval_gpt4_turbo")


if __name__ == "__main__":
    raise SystemExit(main())
