"""Answers of a model to prompts: `python -m rpo_jax.generate --model RUN_OR_HF --prompts FILE --out FILE.jsonl`.

An answer depends on the model, its prompt, the settings and the seed, not on the prompts beside it. A file that is
half done is completed; its rows end up in the order of the prompts. With --alpaca-eval, model_outputs.json for
AlpacaEval besides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rpo_jax.config import MeshConfig, RunConfig
from rpo_jax.core.command import column_names, json_object, print_text, run_command
from rpo_jax.data.tokenize import TEMPLATES
from rpo_jax.hosts.sharding import MESH_AXES
from rpo_jax.sampling.engine import Sampling
from rpo_jax.sampling.generation import GenerateConfig, generate
from rpo_jax.sampling.policy import DTYPES

__all__ = ["generate", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.generate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="run folder, Hugging Face folder or hub name")
    add("--prompts", help=".txt with a prompt a line, or rows with prompt, messages or instruction, or preferences")
    add("--out", help="file of the answers: .jsonl; with --alpaca-eval .json (model_outputs.json)")
    add("--checkpoint", help="of a run: last (default), best, or a step")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, help="sample from the k likeliest tokens")
    add("--top-p", type=float, help="sample from the likeliest tokens that make up this probability")
    add("--max-tokens", type=int, default=256, help="most tokens of an answer (256)")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32, help="prompts at a time (32)")
    add("--template", choices=TEMPLATES, help="chat: text prompts become a user's message; default as in training")
    add("--template-arguments", type=json_object, help='JSON object for the chat template: {"enable_thinking": false}')
    add(
        "--columns", type=column_names, help='what rows call their columns: {"prompt": "question"}; default: the run\'s'
    )
    add("--ignore-columns", nargs="+", help="columns to read as if they were not there; default: the run's")
    add("--max-prompt-tokens", type=int, help="cut longer prompts, as training does")
    add("--dtype", choices=DTYPES, dest="compute_dtype", help="default: the run's; float32 for folders")
    add("--base", help="of a LoRA run: where the model that it started from is now, if it has moved")
    add("--overwrite", action="store_true", help="start anew rather than complete the file")
    add("--alpaca-eval", action="store_true", help="write model_outputs.json for the alpaca_eval package")
    add("--generator", help="with --alpaca-eval: the model's name there")
    for axis in MESH_AXES:
        add(f"--mesh.{axis}", type=int, default=getattr(MeshConfig(), axis), help="devices along this axis")
    add("--cache-dir", default=RunConfig().cache_dir, help="compiled programs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    return run_command(lambda: _generate(options))


def _generate(options: dict[str, Any]) -> None:
    sampling = Sampling(**{name: options.pop(name) for name in ("temperature", "top_k", "top_p")})
    mesh = MeshConfig(**{axis: options.pop(f"mesh.{axis}") for axis in MESH_AXES})
    options["stop"] = tuple(options["stop"])
    if options["ignore_columns"] is not None:
        options["ignore_columns"] = tuple(options["ignore_columns"])
    out = generate(GenerateConfig(**options, sampling=sampling, mesh=mesh))
    print_text(out)
    if options["alpaca_eval"]:
        print_text(f"judge it: alpaca_eval --model_outputs {out} --annotators_config weighted_alpaca_eval_gpt4_turbo")


if __name__ == "__main__":
    raise SystemExit(main())
