"""Compare two files of responses by a judge's verdicts.

python -m rpo_jax.judge --a FILE --b FILE|chosen --task dialogue|summarization --judge openai:gpt-4-0613 --n 256
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging import cost, pairs, summary
from rpo_jax.tools.judging.cache import AnswerCache
from rpo_jax.tools.judging.comparisons import Comparison, Judge, Verdict
from rpo_jax.tools.judging.endpoint import EndpointError, EndpointJudge, EndpointSettings
from rpo_jax.tools.judging.local import RewardJudge, RuleJudge
from rpo_jax.tools.judging.questions import TEMPLATES

MENDABLE, ENDPOINT, NONSENSE = 2, 3, 4  # exit statuses
_EXITS = (
    "exit status: 0 judged; 2 something given cannot be used; 3 the endpoint failed (answers so far are kept, the same "
    "command goes on); 4 no verdict can be read."
)
_IDENTICAL = Verdict("tie", "the responses are identical; nobody was asked")


def compare(options: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    """Judge as asked, write verdicts and summary, and return the summary.

    Raises:
        ValueError: for files, a judge or an option that cannot be used; nothing has been asked then.
        EndpointError: where the endpoint does not answer.
    """
    chosen_pairs = _pairs(options)
    compared = pairs.comparisons(chosen_pairs, options.seed, both_orders=options.both_orders)
    out = Path(options.out or _default_out(options)).expanduser()
    _check_out(out)
    prices = cost.find_prices(options.judge.partition(":")[2], options.price_in, options.price_out)
    with contextlib.ExitStack() as stack:
        judge = _make_judge(options, reporter, stack)
        reporter.say(f"{len(chosen_pairs)} prompts, {len(compared)} comparisons by {judge.name}")
        if isinstance(judge, EndpointJudge):
            _agree_on_cost(judge, compared, options, prices, reporter)
        verdicts = _judge_all(judge, compared, options, prices, reporter)
    usage = {
        "asked": sum(not verdict.cached and verdict is not _IDENTICAL for verdict in verdicts),
        "known": sum(verdict.cached for verdict in verdicts),
        "identical": sum(verdict is _IDENTICAL for verdict in verdicts),
        "prompt_tokens": sum(verdict.prompt_tokens for verdict in verdicts),
        "answer_tokens": sum(verdict.answer_tokens for verdict in verdicts),
        "dollars": _spent(verdicts, prices) if isinstance(judge, EndpointJudge) else None,
    }
    told = {
        "a": Path(options.a).name,
        "b": "the chosen responses" if options.b == pairs.CHOSEN else Path(options.b).name,
        "task": options.task,
        "judge": judge.name,
        "seed": options.seed,
        "both_orders": options.both_orders,
        **summary.summarize(compared, verdicts, sees_order=judge.sees_order, seed=options.seed),
        "usage": usage,
        "folder": str(out),
    }
    summary.write(out, compared, verdicts, told)
    return told


def _pairs(options: argparse.Namespace) -> list[pairs.Pair]:
    if options.n < 1:
        raise ValueError(f"--n {options.n} must be at least 1.")
    against_chosen = options.b == pairs.CHOSEN
    if against_chosen != (options.data is not None):
        raise ValueError("--b chosen and --data FILE go together: the data file holds the chosen responses.")
    a = pairs.read_responses(options.a)
    b = (
        pairs.read_chosen(options.data, split=options.split, layout=options.layout)
        if against_chosen
        else pairs.read_responses(options.b)
    )
    # Responses to a part of a data set are judged against that part of it.
    return pairs.sample(pairs.make_pairs(a, b, b_may_have_more=against_chosen), options.n, options.seed)


def _default_out(options: argparse.Namespace) -> Path:
    a = Path(options.a)
    b = options.b if options.b == pairs.CHOSEN else Path(options.b).name.partition(".")[0]
    judge = re.sub(r"[^\w.-]+", "-", options.judge.replace(str(Path.home()), ""))
    return a.with_name(f"{a.name.partition('.')[0]}-against-{b}-{judge}")


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / summary.SUMMARY).is_file():
        raise ValueError(f"--out {out} holds something else; name a folder of its own.")


def _make_judge(options: argparse.Namespace, reporter: Reporter, stack: contextlib.ExitStack) -> Judge:
    kind, colon, rest = options.judge.partition(":")
    if kind not in _JUDGES or not colon or not rest:
        raise ValueError(f"--judge {options.judge} is unknown; use {', '.join(f'{name}:...' for name in _JUDGES)}.")
    return _JUDGES[kind](rest, options, reporter, stack)


def _endpoint(model: str, options: argparse.Namespace, reporter: Reporter, stack: contextlib.ExitStack) -> Judge:
    try:
        request = json.loads(options.request)
    except ValueError as error:
        raise ValueError(f"--request is no JSON object: {error}") from None
    if not isinstance(request, dict):
        raise ValueError(f"--request is no JSON object: {options.request}")
    names = [field.name for field in dataclasses.fields(EndpointSettings)]
    given = {name: getattr(options, name) for name in names if name not in ("model", "request")}
    settings = EndpointSettings(model=model, request=request, **given)
    cache = stack.enter_context(AnswerCache(options.cache))
    return stack.enter_context(EndpointJudge(settings, options.task, cache, reporter.say))


def _reward(folder: str, options: argparse.Namespace, reporter: Reporter, stack: contextlib.ExitStack) -> Judge:
    return RewardJudge(folder, reporter.say)


def _rule(spec: str, options: argparse.Namespace, reporter: Reporter, stack: contextlib.ExitStack) -> Judge:
    return RuleJudge(spec)


_JUDGES: dict[str, Callable[[str, argparse.Namespace, Reporter, contextlib.ExitStack], Judge]] = {
    "openai": _endpoint,
    "reward": _reward,
    "rule": _rule,
}


def _agree_on_cost(
    judge: EndpointJudge,
    compared: Sequence[Comparison],
    options: argparse.Namespace,
    prices: cost.Prices | None,
    reporter: Reporter,
) -> None:
    """Tell what the run will cost at most; go on only with a user's word for it."""
    asked = [comparison for comparison in compared if comparison.pair.a != comparison.pair.b]
    new = [judge.question(comparison) for comparison in asked if judge.known(comparison) is None]
    expected = cost.estimate(new, options.answer_tokens, prices)
    price = "no price is known for it (--price-in, --price-out)"
    if expected.dollars is not None and prices is not None:
        source = f"list prices of {cost.PRICES_OF}" if options.price_in is None else "the prices given"
        price = f"${expected.dollars:.2f} at most, at {source}"
    reporter.say(
        f"{expected.requests} requests to {judge.endpoint}, {len(asked) - len(new)} known already: about "
        f"{expected.prompt_tokens:,} tokens of questions, up to {expected.answer_tokens:,} of answers: {price}"
    )
    if not expected.requests or (options.yes and options.max_cost is None):
        return
    if options.max_cost is not None:
        if expected.dollars is None:
            raise ValueError("--max-cost needs a price: give --price-in and --price-out, dollars per million tokens.")
        if expected.dollars > options.max_cost:
            raise ValueError(
                f"this may cost ${expected.dollars:.2f}, more than --max-cost {options.max_cost:g}; raise it, or lower "
                "--n or --answer-tokens."
            )
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is here to agree to the cost: give --yes, or --max-cost DOLLARS.")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not asked: you did not agree to the cost.")


def _spent(verdicts: Sequence[Verdict], prices: cost.Prices | None) -> float | None:
    if prices is None:
        return None
    asked = sum(verdict.prompt_tokens for verdict in verdicts)
    return cost.dollars(prices, asked, sum(verdict.answer_tokens for verdict in verdicts))


def _judge_all(
    judge: Judge,
    compared: Sequence[Comparison],
    options: argparse.Namespace,
    prices: cost.Prices | None,
    reporter: Reporter,
) -> list[Verdict]:
    verdicts: list[Verdict | None] = [_IDENTICAL if pair.a == pair.b else None for pair, _ in compared]
    places = [index for index, verdict in enumerate(verdicts) if verdict is None]
    done = len(verdicts) - len(places)
    with reporter.progress("judged", len(verdicts), done) as update:
        for index, verdict in judge.verdicts([compared[place] for place in places]):
            verdicts[places[index]] = verdict
            done += 1
            update(done, {})
            spent = _spent([verdict for verdict in verdicts if verdict is not None], prices)
            if options.max_cost is not None and spent is not None and spent > options.max_cost:
                raise EndpointError(
                    f"${spent:.2f} have been spent, more than --max-cost {options.max_cost:g}: the estimate was too "
                    "low. Answers so far are kept."
                )
    whole = [verdict for verdict in verdicts if verdict is not None]
    assert len(whole) == len(compared), "a judge gives a verdict on everything or raises"
    return whole


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
    add("--n", type=int, default=256, help="prompts, drawn by seed (default 256, the paper's)")
    add("--seed", type=int, default=0, help="of the sample, the order and the bootstrap")
    add("--both-orders", action="store_true", help="ask twice, each response first once")
    add("--out", metavar="DIR", help="folder of verdicts.jsonl, summary.json and summary.md")
    asked = parser.add_argument_group("openai: endpoints")
    add = asked.add_argument
    settings = {field.name: field.default for field in dataclasses.fields(EndpointSettings)}
    add("--base-url", metavar="URL", help="of any OpenAI-compatible server; default OPENAI_BASE_URL, then OpenAI")
    add("--key-variable", default=settings["key_variable"], help="environment variable that holds the API key")
    add("--concurrency", type=int, default=settings["concurrency"], help="requests at once")
    add("--retries", type=int, default=settings["retries"], help="of a request that failed in a way that may pass")
    add("--timeout-seconds", type=float, default=settings["timeout_seconds"], help="for one request")
    add(
        "--backoff-seconds",
        type=float,
        default=settings["backoff_seconds"],
        help="before the first retry; then doubled",
    )
    add("--temperature", type=float, default=settings["temperature"], help="of the judge")
    add("--answer-tokens", type=int, default=settings["answer_tokens"], help="limit of an answer")
    add("--request", default="{}", metavar="JSON", help="further fields of a request; null removes one of ours")
    add("--price-in", type=float, metavar="DOLLARS", help="per million tokens of questions")
    add("--price-out", type=float, metavar="DOLLARS", help="per million tokens of answers")
    add("--max-cost", type=float, metavar="DOLLARS", help="go on without asking up to this estimate, and stop there")
    add("--yes", action="store_true", help="go on whatever the estimate")
    add("--cache", default="~/.cache/rpo_jax/judge.sqlite", metavar="FILE", help="answers that were given before")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `compare`; one line and an exit status for what goes wrong."""
    options = _parser().parse_args(arguments)
    try:
        told = compare(options, Reporter())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MENDABLE
    except EndpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return ENDPOINT
    if not told["judged_prompts"]:
        print(
            f"error: {told['judge']} gave no verdict that can be read: {told['unparsable']} of {told['comparisons']} "
            f"answers name no response, {told['refused']} were refused; read {told['folder']}/{summary.VERDICTS}.",
            file=sys.stderr,
        )
        return NONSENSE
    print(summary.markdown(told))
    print(told["folder"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
