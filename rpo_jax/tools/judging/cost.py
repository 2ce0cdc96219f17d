"""What asking a judge will cost, reported before the first request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rpo_jax.core.files import atomic_write, read_json


class Prices(NamedTuple):
    """US dollars per million tokens."""

    prompt: float
    answer: float


PRICES_OF = "April 2026"  # public list prices of that month; providers change them
PRICES = {
    "gpt-4-0613": Prices(30.0, 60.0),
    "gpt-4": Prices(30.0, 60.0),
    "gpt-4-turbo": Prices(10.0, 30.0),
    "gpt-4o": Prices(2.5, 10.0),
    "gpt-4o-mini": Prices(0.15, 0.6),
    "gpt-4.1": Prices(2.0, 8.0),
    "gpt-4.1-mini": Prices(0.4, 1.6),
    "gpt-4.1-nano": Prices(0.1, 0.4),
}
_BYTES_PER_TOKEN = 4  # of English; a tokenizer would know better, but each model has its own
_MESSAGE_TOKENS = 8  # that a chat template adds


class CostEstimate(NamedTuple):
    """requests: not yet answered; dollars: at most, each answer as long as it may be; None without known prices."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    dollars: float | None


class Spending:
    """What a judge has cost so far, US dollars.

    Args:
        file: keeps the sum, and has that of earlier processes; it is read when it is first asked for.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._dollars = file, None if file is not None else 0.0

    @property
    def dollars(self) -> float:
        if self._dollars is None:
            assert self._file is not None
            self._dollars = read_json(self._file.parent, self._file.name)["dollars"] if self._file.is_file() else 0.0
        return self._dollars

    def add(self, dollars: float) -> None:
        self._dollars = self.dollars + dollars
        if self._file is not None and dollars:
            atomic_write(self._file, json.dumps({"dollars": self._dollars}) + "\n")


def find_prices(model: str, prompt: float | None, answer: float | None) -> Prices | None:
    """The prices given, or those of the table; None where neither is there. Raises ValueError for half of a price."""
    if (prompt is None) != (answer is None):
        raise ValueError("--price-in and --price-out, dollars per million tokens, are given together or not at all.")
    if prompt is not None and answer is not None:
        if prompt < 0 or answer < 0:
            raise ValueError("--price-in and --price-out must not be negative.")
        return Prices(prompt, answer)
    return PRICES.get(model)


def dollars(prices: Prices, prompt_tokens: int, answer_tokens: int) -> float:
    return (prompt_tokens * prices.prompt + answer_tokens * prices.answer) / 1e6


def estimate(questions: Sequence[str], answer_tokens: int, prices: Prices | None) -> CostEstimate:
    """Tokens from the questions' UTF-8 bytes, four a token; equal questions are asked once."""
    distinct = set(questions)
    prompt = sum(len(text.encode()) // _BYTES_PER_TOKEN + _MESSAGE_TOKENS for text in distinct)
    answers = len(distinct) * answer_tokens
    return CostEstimate(len(distinct), prompt, answers, None if prices is None else dollars(prices, prompt, answers))
