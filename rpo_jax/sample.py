"""Preference data of a model's own answers: `python -m rpo_jax.sample --model M --prompts F --score S --out F.jsonl`.

Every prompt is answered --n times, the answers are scored, and a rule makes pairs of them or keeps them all (layout
`ranked`). The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rpo_jax.core.command import print_error, print_text, refuse_unread, run_command
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.generation import GenerateConfig
from rpo_jax.sampling.options import add_sampling_options, generate_settings
from rpo_jax.tools.judging.endpoint import EndpointError, EndpointSettings
from rpo_jax.tools.judging.judge import JudgeConfig
from rpo_jax.tools.judging.questions import TEMPLATES
from rpo_jax.tools.sampling.sample import RSO, SELECTIONS, Choice, SampleConfig, answers_file, sample
from rpo_jax.tools.sampling.scorers import JUDGE, KINDS

__all__ = ["main", "sample"]

ENDPOINT_FAILED = 3  # exit status: the judge's endpoint; answers so far are kept, the same command goes on
_OWN = ("score", "select", "accept", "beta", "keep_unfinished")
_JUDGE = ("task", "both_orders", "request", "price_in", "price_out", "max_cost", "yes", "cache")
_ENDPOINT = ("base_url", "key_variable", "answer_tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.sample", description=__doc__)
    add = parser.add_argument
    add("--prompts", required=True, help=".txt with a prompt a line, or rows with prompt, messages or instruction")
    add("--out", required=True, help="file of the data, .jsonl; answers, statistics and a page lie beside it")
    add("--n", type=int, default=8, dest="samples", help="answers to each prompt (8)")
    add("--score", required=True, help=KINDS)
    add("--select", choices=SELECTIONS, default=Choice.select, help="which answers become data (best_worst)")
    add("--accept", type=int, default=Choice.accept, help="rso: answers that are accepted of each prompt (8)")
    add("--beta", type=float, default=Choice.beta, help="rso: of rejection sampling, in units of the score (0.5)")
    add("--keep-unfinished", action="store_true", help="keep answers that reached --max-tokens")
    add_sampling_options(parser, temperature=0.7)
    add = parser.add_argument_group("judge:").add_argument
    add("--task", choices=tuple(TEMPLATES), default="dialogue", help="which question is asked (dialogue)")
    add("--both-orders", action="store_true", help="ask twice, each response first once")
    add("--base-url", metavar="URL", help="of any OpenAI-compatible server; default OPENAI_BASE_URL, then OpenAI")
    add("--key-variable", default=EndpointSettings.key_variable, help="environment variable that holds the API key")
    add("--answer-tokens", type=int, default=EndpointSettings.answer_tokens, help="limit of the judge's answer")
    add("--request", default="{}", metavar="JSON", help="further fields of a request; null removes one of ours")
    add("--price-in", type=float, metavar="DOLLARS", help="per million tokens of questions")
    add("--price-out", type=float, metavar="DOLLARS", help="per million tokens of answers")
    add("--max-cost", type=float, metavar="DOLLARS", help="go on without asking up to this estimate, and stop there")
    add("--yes", action="store_true", help="go on whatever the estimate")
    add("--cache", default=JudgeConfig.cache, metavar="FILE", help="answers of judges that were given before")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    return run_command(lambda: _sample(parser, options))


def _sample(parser: argparse.ArgumentParser, options: dict[str, Any]) -> int:
    if not options["score"].startswith(f"{JUDGE}:"):
        refuse_unread(parser, options, (*_JUDGE, *_ENDPOINT), f"--score {options['score']} is no judge")
    if options["select"] != RSO:
        refuse_unread(parser, options, ("accept", "beta"), f"--select {options['select']} is not rso")
    out, own = options.pop("out"), {name: options.pop(name) for name in _OWN}
    judge = {name: options.pop(name) for name in _JUDGE}
    judge["endpoint"] = {name: options.pop(name) for name in _ENDPOINT}
    answers = GenerateConfig(**generate_settings(options), out=answers_file(out))
    choice = Choice(**own, seed=answers.seed)
    config = SampleConfig(answers=answers, out=out, choice=choice, judge=judge | {"seed": answers.seed})
    try:
        result = sample(config, Reporter())
    except EndpointError as error:
        print_error(error)
        return ENDPOINT_FAILED
    print_text(f"{out}: {result['rows']} rows of {result['distinct']} different answers to {result['prompts']} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
