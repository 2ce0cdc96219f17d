"""Compare two files of responses by a judge's verdicts.

python -m rpo_jax.judge --a FILE --b FILE|chosen --task dialogue|summarization --judge openai:gpt-4-0613 --n 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rpo_jax.core.command import column_names, print_error, print_text, refuse_unread, run_command
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging import summary
from rpo_jax.tools.judging.endpoint import EndpointError, EndpointSettings
from rpo_jax.tools.judging.judge import JudgeConfig, judge_files
from rpo_jax.tools.judging.questions import TEMPLATES

__all__ = ["judge_files", "main"]

ENDPOINT_FAILED, NO_VERDICT = 3, 4  # exit statuses
_EXITS = (
    "exit status: 0 judged; 2 something given cannot be used; 3 the endpoint failed (answers so far are kept, the same "
    "command goes on); 4 no verdict can be read."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.judge", description=__doc__, epilog=_EXITS)
    add = parser.add_argument
    add("--a", required=True, metavar="FILE", help="responses whose win rate is wanted: rows with prompt and response")
    add("--b", required=True, metavar="FILE|chosen", help="responses to compare with; `chosen`: those of --data")
    add("--task", required=True, choices=tuple(TEMPLATES), help="which of the paper's questions is asked")
    add("--judge", required=True, help="openai:MODEL, reward:HF_DIR or rule:MODULE.py:FUNCTION")
    add("--data", metavar="FILE", help="data whose chosen responses --b chosen means")
    add("--split", default="test", help="of --data, where it has several")
    add("--layout", default="auto", help="of --data")
    add("--columns", type=column_names, help='what --data calls its columns: {"prompt": "question"}')
    add("--n", type=int, default=256, help="prompts, drawn by seed (default 256, the paper's)")
    add("--seed", type=int, default=0, help="of the sample, the order and the bootstrap")
    add("--both-orders", action="store_true", help="ask twice, each response first once")
    add("--out", metavar="DIR", help="folder of verdicts.jsonl, summary.json, summary.md and summary.html")
    endpoint = parser.add_argument_group("openai: endpoints")
    add = endpoint.add_argument
    add("--base-url", metavar="URL", help="of any OpenAI-compatible server; default OPENAI_BASE_URL, then OpenAI")
    add("--key-variable", default=EndpointSettings.key_variable, help="environment variable that holds the API key")
    add("--concurrency", type=int, default=EndpointSettings.concurrency, help="requests at once")
    add("--retries", type=int, default=EndpointSettings.retries, help="of a request that failed in a way that may pass")
    add("--timeout-seconds", type=float, default=EndpointSettings.timeout_seconds, help="for one request")
    backoff = EndpointSettings.backoff_seconds
    add("--backoff-seconds", type=float, default=backoff, help="before the first retry; then doubled")
    add("--temperature", type=float, default=EndpointSettings.temperature, help="of the judge")
    add("--answer-tokens", type=int, default=EndpointSettings.answer_tokens, help="limit of an answer")
    add("--request", default="{}", metavar="JSON", help="further fields of a request; null removes one of ours")
    add("--price-in", type=float, metavar="DOLLARS", help="per million tokens of questions")
    add("--price-out", type=float, metavar="DOLLARS", help="per million tokens of answers")
    add("--max-cost", type=float, metavar="DOLLARS", help="go on without asking up to this estimate, and stop there")
    add("--yes", action="store_true", help="go on whatever the estimate")
    add("--cache", default="~/.cache/rpo_jax/judge.sqlite", metavar="FILE", help="answers that were given before")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    return run_command(lambda: _judge(parser, options))


def _judge(parser: argparse.ArgumentParser, options: dict[str, Any]) -> int:
    if options["data"] is None:
        refuse_unread(parser, options, ("split", "layout", "columns"), "there is no --data")
    endpoint = {each.name: options.pop(each.name) for each in fields(EndpointSettings) if each.name in options}
    request = endpoint.pop("request")
    try:
        result = judge_files(JudgeConfig(**options, endpoint=endpoint, request=request), Reporter())
    except EndpointError as error:
        print_error(error)
        return ENDPOINT_FAILED
    if not result["judged_prompts"]:
        unread = f"{result['unparsable']} of {result['comparisons']} answers name no response"
        where = f"{result['folder']}/{summary.VERDICTS}"
        print_error(
            f"{result['judge']} gave no verdict that can be read: {unread}, {result['refused']} were refused; read "
            f"{where}."
        )
        return NO_VERDICT
    print_text(summary.markdown(result))
    print_text(result["folder"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
