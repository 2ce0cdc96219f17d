"""Two files of responses, a judge's verdicts on them, and what they say."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpo_jax.core.files import check_writable, read_json, shortest_names
from rpo_jax.core.jsonl import parse_json
from rpo_jax.core.locks import one_writer
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.judging import cost, pairs, summary
from rpo_jax.tools.judging.cache import AnswerCache
from rpo_jax.tools.judging.comparisons import Comparison, Judge, JudgingFailed, Verdict
from rpo_jax.tools.judging.endpoint import EndpointError, EndpointJudge, EndpointSettings
from rpo_jax.tools.judging.local import RewardJudge, RuleJudge
from rpo_jax.tools.judging.questions import Task

_IDENTICAL = Verdict("tie", "the responses are identical; nobody was asked")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What is judged by whom.

    Args:
        a: file of the responses whose win rate is wanted.
        b: file of those that they are compared with, or `chosen` for those of `data`.
        judge: openai:MODEL, reward:FOLDER or rule:MODULE.py:FUNCTION.
        columns: what `data` calls columns of its layout, as data.columns.
        n: prompts, drawn by seed.
        out: folder of verdicts and summary; beside `a` where not given.
        endpoint: settings of EndpointSettings but `model` and `request`.
        request: further fields of a request to an endpoint, as JSON.
        price_in, price_out: dollars per million tokens; a known model's list prices where not given.
        max_cost: dollars that an endpoint may cost; without it, and without `yes`, the user is asked.
        cache: file of answers that were given before.
    """

    a: str
    b: str
    task: Task
    judge: str
    data: str | None = None
    split: str = "test"
    layout: str = "auto"
    columns: Mapping[str, str] | None = None
    n: int = 256
    seed: int = 0
    both_orders: bool = False
    out: str | None = None
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    request: str = "{}"
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None
    yes: bool = False
    cache: str = "~/.cache/rpo_jax/judge.sqlite"

    @property
    def prices(self) -> cost.Prices | None:
        return cost.find_prices(self.judge.partition(":")[2], self.price_in, self.price_out)


def judge_files(config: JudgeConfig, reporter: Reporter) -> dict[str, Any]:
    """Judge as asked, write verdicts and summary, and return the summary.

    Raises:
        ValueError: for files, a judge or an option that cannot be used; nothing has been asked then.
        EndpointError: where the endpoint does not answer.
        InUse: where another process judges into the same folder.
    """
    chosen_pairs = _pairs(config)
    compared = pairs.comparisons(chosen_pairs, config.seed, both_orders=config.both_orders)
    out = Path(config.out or _default_out(config)).expanduser()
    # A folder that nobody named may be another comparison's; one that was named is replaced, as was asked.
    _check_out(out, {} if config.out else {**_names(config), "task": config.task, "files": _files(config, out)})
    # Another process that judges into the same folder would pay for the same verdicts.
    with one_writer(out, "--out"):
        return _judged(config, len(chosen_pairs), compared, out, reporter)


def _judged(
    config: JudgeConfig, count: int, compared: Sequence[Comparison], out: Path, reporter: Reporter
) -> dict[str, Any]:
    prices = config.prices
    with contextlib.ExitStack() as stack:
        judge = make_judge(config, reporter, stack)
        reporter.say(f"{count} prompts, {len(compared)} comparisons by {judge.name}")
        if isinstance(judge, EndpointJudge):
            agree_on_cost(judge, compared, config, reporter)
        spending = cost.Spending()
        verdicts = judge_all(judge, compared, config, reporter, spending)
    usage = {
        "asked": sum(not verdict.cached and verdict is not _IDENTICAL for verdict in verdicts),
        "known": sum(verdict.cached for verdict in verdicts),
        "identical": sum(verdict is _IDENTICAL for verdict in verdicts),
        "prompt_tokens": sum(verdict.prompt_tokens for verdict in verdicts),
        "answer_tokens": sum(verdict.answer_tokens for verdict in verdicts),
        "dollars": None if prices is None or not isinstance(judge, EndpointJudge) else spending.dollars,
    }
    result = {
        **_names(config),
        "files": _files(config, out),
        "task": config.task,
        "judge": judge.name,
        "seed": config.seed,
        "both_orders": config.both_orders,
        **summary.summarize(compared, verdicts, sees_order=judge.sees_order, seed=config.seed),
        "usage": usage,
        "folder": str(out),
    }
    summary.write(out, compared, verdicts, result)
    return result


def _pairs(config: JudgeConfig) -> list[pairs.Pair]:
    if config.n < 1:
        raise ValueError(f"--n {config.n} must be at least 1.")
    against_chosen = config.b == pairs.CHOSEN
    if against_chosen != (config.data is not None):
        raise ValueError("--b chosen and --data FILE go together: the data file holds the chosen responses.")
    a = pairs.read_responses(config.a)
    if config.data is None:
        b = pairs.read_responses(config.b)
    else:
        b = pairs.read_chosen(config.data, split=config.split, layout=config.layout, columns=config.columns)
    # Responses to a part of a data set are judged against that part of it.
    return pairs.sample(pairs.make_pairs(a, b, b_may_have_more=against_chosen), config.n, config.seed)


def _default_out(config: JudgeConfig) -> Path:
    a = Path(config.a)
    b = config.b if config.b == pairs.CHOSEN else Path(config.b).stem
    judge = re.sub(r"[^\w.-]+", "-", config.judge.replace(str(Path.home()), ""))
    return a.with_name(f"{a.stem}-against-{b}-{judge}")


def _names(config: JudgeConfig) -> dict[str, str]:
    """What both files are called: by as few last parts of their paths as tell them apart."""
    if config.b == pairs.CHOSEN:
        return {"a": Path(config.a).name, "b": "the chosen responses"}
    a, b = shortest_names([Path(file).expanduser().absolute() for file in (config.a, config.b)])
    return {"a": a, "b": b}


def _files(config: JudgeConfig, out: Path) -> list[str]:
    """Which two files they are, seen from `out`, as a project may move: other folders have others of their names."""

    def named(file: str) -> str:  # a hub's name as it is
        place = Path(file).expanduser()
        return os.path.relpath(place.resolve(), out.resolve()) if place.exists() else file

    return [named(config.a), named(config.data or config.b)]


def _check_out(out: Path, compared: Mapping[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    check_writable(out)  # before anything is paid for
    # A judging that was killed has left some of its files, or a part of one.
    files = [file for file in out.iterdir() if not file.name.startswith(".")] if out.is_dir() else []
    if not (out / summary.SUMMARY).is_file() and any(file.name not in summary.FILES for file in files):
        raise ValueError(f"--out {out} holds something else; name a folder of its own.")
    if compared and (out / summary.SUMMARY).is_file():
        before = read_json(out, summary.SUMMARY)
        for key, value in compared.items():
            if before.get(key, value) != value:
                raise ValueError(
                    f"{out} holds verdicts with {key}={before.get(key)}, not {value}; name another folder with --out."
                )


def make_judge(config: JudgeConfig, reporter: Reporter, stack: contextlib.ExitStack) -> Judge:
    """The judge that is named; what it opens is closed with the stack. Raises ValueError where there is none."""
    kind, _, name = config.judge.partition(":")
    makers = {
        "openai": lambda: _endpoint(name, config, reporter, stack),
        "reward": lambda: RewardJudge(name, reporter.say),
        "rule": lambda: RuleJudge(name),
    }
    if kind not in makers or not name:
        raise ValueError(f"--judge {config.judge} is unknown; use {', '.join(f'{known}:...' for known in makers)}.")
    return makers[kind]()


def _endpoint(model: str, config: JudgeConfig, reporter: Reporter, stack: contextlib.ExitStack) -> EndpointJudge:
    try:
        request = parse_json(config.request)
    except ValueError as error:
        raise ValueError(f"--request is no JSON object: {error}") from None
    if not isinstance(request, dict):
        raise ValueError(f"--request is no JSON object: {config.request}")
    settings = EndpointSettings(model=model, request=request, **config.endpoint)
    cache = stack.enter_context(contextlib.closing(AnswerCache(config.cache)))
    return stack.enter_context(contextlib.closing(EndpointJudge(settings, config.task, cache, reporter.say)))


def check_consent(config: JudgeConfig, *, attended: bool) -> None:
    """JudgingFailed where `agree_on_cost` could not go on, as far as that is known before anything is compared.

    Args:
        attended: whether somebody can be asked.
    """
    prices = config.prices
    if config.max_cost is not None:
        if prices is None:
            raise JudgingFailed(
                "--max-cost needs a price: give --price-in and --price-out, dollars per million tokens."
            )
    elif not config.yes and not attended:
        raise JudgingFailed("nobody is here to agree to the cost: give --yes, or --max-cost DOLLARS.")


def agree_on_cost(
    judge: EndpointJudge, compared: Sequence[Comparison], config: JudgeConfig, reporter: Reporter, spent: float = 0.0
) -> None:
    """Report what the run will cost at most; go on only with a user's word for it.

    Args:
        spent: dollars of --max-cost that are gone already.
    """
    prices = config.prices
    asked = [comparison for comparison in compared if comparison.pair.a != comparison.pair.b]
    new = [judge.question(comparison) for comparison in asked if judge.known(comparison) is None]
    expected = cost.estimate(new, judge.settings.most_answer_tokens, prices)
    price = "no price is known for it"
    if expected.dollars is not None and prices is not None:
        source = f"list prices of {cost.PRICES_OF}" if config.price_in is None else "the prices given"
        price = f"${expected.dollars:.2f} at most, at {source}"
    reporter.say(
        f"{expected.requests} requests to {judge.endpoint}, {len(asked) - len(new)} known already: about "
        f"{expected.prompt_tokens:,} tokens of questions, up to {expected.answer_tokens:,} of answers: {price}"
    )
    if not expected.requests or (config.yes and config.max_cost is None):
        return
    check_consent(config, attended=sys.stdin.isatty())
    if config.max_cost is not None:
        assert expected.dollars is not None, "a limit without a price is refused"
        if spent + expected.dollars > config.max_cost:
            before = f" beside the ${spent:.2f} that are spent" if spent else ""
            raise JudgingFailed(
                f"this may cost ${expected.dollars:.2f}{before}, more than --max-cost {config.max_cost:g}; raise it, "
                "or lower --n or --answer-tokens."
            )
        return
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise JudgingFailed("not asked: you did not agree to the cost.")


def judge_all(
    judge: Judge,
    compared: Sequence[Comparison],
    config: JudgeConfig,
    reporter: Reporter,
    spending: cost.Spending,
) -> list[Verdict]:
    """A verdict on each comparison. Raises EndpointError where an endpoint fails or costs more than it may.

    Args:
        spending: gets the cost of every verdict, and has what counts against --max-cost already.
    """
    prices = config.prices if isinstance(judge, EndpointJudge) else None
    verdicts: list[Verdict | None] = [_IDENTICAL if pair.a == pair.b else None for pair, _ in compared]
    places = [index for index, verdict in enumerate(verdicts) if verdict is None]
    done = len(verdicts) - len(places)
    with reporter.progress("judged", len(verdicts), done) as update:
        for index, verdict in judge.verdicts([compared[place] for place in places]):
            verdicts[places[index]] = verdict
            done += 1
            update(done, {})
            if prices is not None:
                spending.add(cost.dollars(prices, verdict.prompt_tokens, verdict.answer_tokens))
            if config.max_cost is not None and spending.dollars > config.max_cost:
                raise EndpointError(
                    f"${spending.dollars:.2f} have been spent, more than --max-cost {config.max_cost:g}: the estimate "
                    "was too low. Answers so far are kept."
                )
    whole = [verdict for verdict in verdicts if verdict is not None]
    assert len(whole) == len(compared), "a judge gives a verdict on everything or raises"
    return whole
