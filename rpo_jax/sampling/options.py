"""The command line of the commands that sample."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rpo_jax.config import MeshConfig, RunConfig
from rpo_jax.core.command import column_names, json_object
from rpo_jax.data.tokenize import TEMPLATES
from rpo_jax.sampling.engine import Sampling
from rpo_jax.sampling.policy import DTYPES

PRINCIPLE_WEIGHT = 2.0
_CHOOSING = ("temperature", "top_k", "top_p", "principle_weight")
_MESH = tuple(entry.name for entry in dataclasses.fields(MeshConfig) if entry.name != "reduce_dtype")  # axes


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """The options that say who answers and how; `temperature` is the default."""
    add = parser.add_argument
    add("--model", required=True, help="run folder, Hugging Face folder or hub name")
    add("--checkpoint", help="of a run: last (default), best, or a step")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy ({temperature:g})")
    add("--top-k", type=int, help="sample from the k likeliest tokens")
    add("--top-p", type=float, help="sample from the likeliest tokens that make up this probability")
    add("--principle", metavar="TEXT", help="Linear Alignment: what answers are to keep to, read with every prompt")
    add("--principle-weight", type=float, metavar="R", help="how much it outweighs the prompt without it (2)")
    add("--max-tokens", type=int, default=256, help="most tokens of an answer (256)")
    add("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32, help="answers at a time (32)")
    add("--template", choices=TEMPLATES, help="chat: text prompts become a user's message; default as in training")
    add("--template-arguments", type=json_object, help='JSON object for the chat template: {"enable_thinking": false}')
    add(
        "--columns", type=column_names, help='what rows call their columns: {"prompt": "question"}; default: the run\'s'
    )
    add("--ignore-columns", nargs="+", help="columns to read as if they were not there; default: the run's")
    add("--max-prompt-tokens", type=int, help="cut longer prompts, as training does")
    add("--dtype", choices=DTYPES, dest="compute_dtype", help="default: the run's; float32 for folders")
    add("--base", help="of a LoRA run: where the model that it started from is now, if it has moved")
    add("--overwrite", action="store_true", help="start anew rather than complete what is there")
    for axis in _MESH:
        add(f"--mesh.{axis}", type=int, default=getattr(MeshConfig(), axis), help="devices along this axis")
    add("--cache-dir", default=RunConfig().cache_dir, help="compiled programs")


def generate_settings(options: dict[str, Any]) -> dict[str, Any]:
    """What GenerateConfig takes, of parsed options, which lose the names that it has otherwise."""
    if options["principle_weight"] is None:
        options["principle_weight"] = 0.0 if options["principle"] is None else PRINCIPLE_WEIGHT
    sampling = Sampling(**{name: options.pop(name) for name in _CHOOSING})
    mesh = MeshConfig(**{axis: options.pop(f"mesh.{axis}") for axis in _MESH})
    ignored = options["ignore_columns"]
    listed = {"stop": tuple(options["stop"]), "ignore_columns": None if ignored is None else tuple(ignored)}
    return {**options, **listed, "sampling": sampling, "mesh": mesh}
