"""Files of preferences, sound and damaged in every way that we know of, and what must become of each row.

`DAMAGE` says of each kind of damage how the reason begins that its rows are refused with; `ACCEPTED` are the kinds of
oddness that are no damage. A maker gives a value to be written as JSON, or a line's bytes.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RARITY = 10
SIDES = ("prompt", "chosen", "rejected")
WORDS = ["bread", "soup", "rice", "oven", "salt", "an", "hour", "slowly", "gladly", "never", "müsli", "麺", "🍞"]


class Maker(NamedTuple):
    make: Callable[[Source], Any]
    reason: str | None  # how the reason begins; None for a row that is used


class Source:
    """What makers draw from: a random generator, and how long a `megabyte` is."""

    def __init__(self, seed: int, megabyte: int) -> None:
        self.rng = random.Random(seed)
        self.megabyte = megabyte

    def text(self) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(3, 12))) + f" {self.rng.randrange(10**9)}"

    def long(self, unit: str = "rice and ") -> str:
        return unit * (self.megabyte // len(unit))

    def pair(self, **changes: Any) -> dict[str, Any]:
        return {name: self.text() for name in SIDES} | changes

    def line(self, **changes: Any) -> bytes:
        return json.dumps(self.pair(**changes), ensure_ascii=False).encode()

    def turns(self, *roles: str) -> list[dict[str, Any]]:
        return [{"role": role, "content": self.text()} for role in roles]

    def talk(self, **changes: Any) -> dict[str, Any]:
        """A pair whose prompt and responses are conversations."""
        prompt = self.turns(*self.rng.choice([("user",), ("system", "user"), ("user", "assistant", "user")]))
        return {"prompt": prompt, "chosen": self.turns("assistant"), "rejected": self.turns("assistant")} | changes


def _sides(s: Source, shared: list[dict[str, Any]]) -> dict[str, Any]:
    return {"chosen": [*shared, *s.turns("assistant")], "rejected": [*shared, *s.turns("assistant")]}


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def _renamed(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


ACCEPTED: dict[str, Maker] = {
    name: Maker(make, None)
    for name, make in {
        "text": Source.pair,
        "conversation": Source.talk,
        "from and value": lambda s: {name: _renamed(turns) for name, turns in s.talk().items()},
        "both kinds of keys": lambda s: s.talk(prompt=[{"role": "user", "content": s.text(), "from": None}]),
        "implicit prompt": lambda s: _sides(s, s.turns("user")),
        "prompt of one message": lambda s: s.talk(prompt=s.turns("user")[0]),
        "text in parts": lambda s: s.talk(prompt=[{"role": "user", "content": [{"type": "text", "text": s.text()}]}]),
        "prompt that ends with the start of an answer": lambda s: s.talk(prompt=s.turns("user", "assistant")),
        "turns that do not alternate": lambda s: s.talk(prompt=s.turns("user", "user")),
        "byte order mark": lambda s: b"\xef\xbb\xbf" + s.line(),
        "carriage return": lambda s: s.line() + b"\r",
        "spaces": lambda s: b" \t" + json.dumps(s.pair(), indent=1).replace("\n", " ").encode() + b"  ",
        "control characters": lambda s: s.pair(chosen=s.text() + "\x1b[31m\x07\x7f\x85"),
        "line separators": lambda s: s.line(chosen=s.text() + "\u2028\u2029\u0085"),
        "noncharacters": lambda s: s.pair(chosen=s.text() + "\ufffd\uffff\ufeff"),
        "surrogate pair": lambda s: s.line(chosen="@").replace(b"@", b"\\ud83c\\udf5e" + s.text().encode()),
        "NaN beside": lambda s: s.pair(score=float("nan"), best=float("inf"), worst=float("-inf")),
        "integer beyond 64 bits beside": lambda s: s.pair(seed=2**100, least=-(2**64)),
        "nesting beside": lambda s: s.pair(meta=_nested(200)),
        "null beside": lambda s: s.pair(source=None, completion=None),
        "megabyte beside": lambda s: s.pair(log=s.long()),
        "megabyte response": lambda s: s.pair(chosen=s.long() + s.text()),
    }.items()
}

_NO_MESSAGES = "column '{}' does not hold messages"
_ROLE = "column '{}' has an unknown role"
DAMAGE: dict[str, Maker] = {
    # Lines that are no objects
    "cut short": Maker(lambda s: s.line()[:-8], "broken JSON"),
    "two objects": Maker(lambda s: s.line() + b" " + s.line(), "broken JSON"),
    "trailing comma": Maker(lambda s: s.line()[:-1] + b",}", "broken JSON"),
    "single quotes": Maker(lambda s: repr(s.pair()).encode(), "broken JSON"),
    "raw control character": Maker(lambda s: s.line(prompt="@").replace(b"@", b"a\tb"), "broken JSON"),
    "null bytes": Maker(lambda s: b"\0" * 64, "broken JSON"),
    "null byte": Maker(lambda s: s.line(prompt="@").replace(b"@", b"\0"), "broken JSON"),
    "log line": Maker(lambda s: b"2026-01-01 12:00:00 INFO " + s.text().encode(), "broken JSON"),
    "comma separated": Maker(lambda s: ",".join(s.pair().values()).encode(), "broken JSON"),
    "merge conflict": Maker(lambda s: b"<<<<<<< HEAD", "broken JSON"),
    "comment": Maker(lambda s: b"// " + s.line(), "broken JSON"),
    "integer of 5000 digits": Maker(lambda s: s.line()[:-1] + b', "n": ' + b"7" * 5000 + b"}", "broken JSON"),
    "brackets without end": Maker(lambda s: b'{"prompt": ' + b"[" * 100_000, "broken JSON"),
    "deep nesting": Maker(
        lambda s: s.line()[:-1] + b', "n": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "broken JSON"
    ),
    "list": Maker(lambda s: list(s.pair().values()), "not a JSON object"),
    "string": Maker(Source.text, "not a JSON object"),
    "null": Maker(lambda s: None, "not a JSON object"),
    "latin-1": Maker(lambda s: s.line(chosen="déjà vu").decode().encode("latin-1", "replace"), "not UTF-8"),
    "cut character": Maker(lambda s: s.line(chosen="@").replace(b"@", "麺".encode()[:2]), "not UTF-8"),
    "encoded surrogate": Maker(lambda s: s.line(chosen="@").replace(b"@", b"\xed\xa0\x80"), "not UTF-8"),
    "duplicate key": Maker(lambda s: s.line()[:-1] + b', "chosen": "another"}', "repeated key"),
    "duplicate key further in": Maker(
        lambda s: s.line(meta=[{"a": 1}]).replace(b'"a": 1', b'"a": 1, "a": 2'), "repeated key"
    ),
    # Columns
    "no columns": Maker(lambda s: {}, "column 'chosen' is missing"),
    "missing column": Maker(lambda s: {"prompt": s.text(), "chosen": s.text()}, "column 'rejected' is missing"),
    "megabyte key": Maker(lambda s: {s.long(): 1, "prompt": s.text()}, "column 'chosen' is missing"),
    "another layout": Maker(
        lambda s: {"prompt": s.text(), "completion": s.text(), "label": True}, "column 'chosen' is missing"
    ),
    "a third layout": Maker(
        lambda s: {"conversations": s.turns("user"), "chosen": s.turns("assistant"), "rejected": s.turns("assistant")},
        "no shared prompt",
    ),
    "null prompt": Maker(lambda s: s.pair(prompt=None), "column 'prompt' is null"),
    "null chosen": Maker(lambda s: s.pair(chosen=None), "column 'chosen' is null"),
    "null rejected": Maker(lambda s: s.pair(rejected=None), "column 'rejected' is null"),
    "number": Maker(lambda s: s.pair(prompt=7), _NO_MESSAGES.format("prompt")),
    "boolean": Maker(lambda s: s.pair(chosen=True), _NO_MESSAGES.format("chosen")),
    "NaN": Maker(lambda s: s.pair(chosen=float("nan")), _NO_MESSAGES.format("chosen")),
    "Infinity": Maker(lambda s: s.pair(prompt=float("-inf")), _NO_MESSAGES.format("prompt")),
    "integer beyond 64 bits": Maker(lambda s: s.pair(rejected=2**70), _NO_MESSAGES.format("rejected")),
    "list of texts": Maker(lambda s: s.pair(prompt=[s.text(), s.text()]), _NO_MESSAGES.format("prompt")),
    "nested junk": Maker(lambda s: s.pair(prompt=_nested(300)), _NO_MESSAGES.format("prompt")),
    "megabyte of junk": Maker(lambda s: s.pair(prompt=[[s.long()]]), _NO_MESSAGES.format("prompt")),
    "object": Maker(lambda s: s.pair(chosen={"text": s.text()}), _ROLE.format("chosen")),
    # Texts
    "empty prompt": Maker(lambda s: s.pair(prompt=""), "empty prompt"),
    "blank prompt": Maker(lambda s: s.pair(prompt=" \n\t\u3000"), "empty prompt"),
    "empty chosen": Maker(lambda s: s.pair(chosen=""), "empty chosen response"),
    "empty rejected": Maker(lambda s: s.pair(rejected="\n"), "empty rejected response"),
    "megabyte of blanks": Maker(lambda s: s.pair(chosen=s.long(" ")), "empty chosen response"),
    "identical responses": Maker(lambda s: s.pair(chosen="Same.", rejected="Same."), "chosen equals rejected"),
    "lone surrogate": Maker(lambda s: s.pair(prompt="\ud800" + s.text()), "not valid unicode text"),
    "surrogates in wrong order": Maker(lambda s: s.pair(rejected="a\udf5e\ud83c"), "not valid unicode text"),
    "lone surrogate in a turn": Maker(
        lambda s: s.talk(prompt=[*s.turns("user", "assistant"), {"role": "user", "content": "\udcff?"}]),
        "not valid unicode text",
    ),
    "null character": Maker(lambda s: s.pair(chosen=s.text() + "\0"), "null character"),
    # Conversations
    "unknown role": Maker(lambda s: s.talk(prompt=s.turns("moderator", "user")), _ROLE.format("prompt")),
    "role with a surrogate": Maker(lambda s: s.talk(prompt=s.turns("\udc80\x1b[2J")), _ROLE.format("prompt")),
    "megabyte role": Maker(lambda s: s.talk(chosen=s.turns(s.long())), _ROLE.format("chosen")),
    "null role": Maker(lambda s: s.talk(chosen=[{"role": None, "content": "a"}]), _ROLE.format("chosen")),
    "role of junk": Maker(lambda s: s.talk(prompt=[{"role": _nested(200), "content": "a"}]), _ROLE.format("prompt")),
    "empty message": Maker(lambda s: s.talk(rejected=[{}]), _ROLE.format("rejected")),
    "null content": Maker(
        lambda s: s.talk(prompt=[{"role": "user", "content": None}]), "column 'prompt' has a message without text"
    ),
    "number as content": Maker(
        lambda s: s.talk(chosen=[{"role": "assistant", "content": 3}]), "column 'chosen' has a message without text"
    ),
    "image": Maker(
        lambda s: s.talk(prompt=[{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]),
        "column 'prompt' has a message part that is not text",
    ),
    "empty conversation": Maker(lambda s: s.talk(prompt=[]), "prompt does not end with a user turn"),
    "prompt that ends with instructions": Maker(
        lambda s: s.talk(prompt=s.turns("user", "system")), "prompt does not end with a user turn"
    ),
    "blank last turn": Maker(lambda s: s.talk(prompt=[{"role": "user", "content": " "}]), "empty prompt"),
    "no answer": Maker(lambda s: s.talk(chosen=[]), "column 'chosen' is not one assistant turn"),
    "answer of the user": Maker(
        lambda s: s.talk(rejected=s.turns("user")), "column 'rejected' is not one assistant turn"
    ),
    "conversations that differ": Maker(
        lambda s: {"chosen": s.turns("user", "assistant"), "rejected": s.turns("user", "assistant")},
        "no shared prompt",
    ),
    "prompt of another row": Maker(lambda s: s.pair() | _sides(s, s.turns("user")), "no shared prompt"),
}


@dataclass
class Written:
    """What a file holds: the numbers of its good rows, and of the others how many and the first of each reason."""

    path: Path
    good: list[int] = field(default_factory=list)
    good_bytes: int = 0  # of their prompts and responses, as Python holds them
    reasons: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, int] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def note(self, number: int, name: str, value: Any, reason: str | None) -> None:
        self.kinds[name] += 1
        if reason is None:
            self.good.append(number)
            used = {side: value[side] for side in SIDES if side in value} if isinstance(value, dict) else value
            self.good_bytes += _held_bytes(used)
        else:
            self.reasons[reason] += 1
            self.firsts.setdefault(reason, number)


def _held_bytes(value: Any) -> int:
    """Of all texts in a value; a single character beyond Latin makes each of its text's take two bytes or four."""
    if isinstance(value, bytes):
        return sys.getsizeof(value.decode(errors="replace"))
    if isinstance(value, dict | list):
        return sum(map(_held_bytes, value.values() if isinstance(value, dict) else value))
    return sys.getsizeof(value) if isinstance(value, str) else 0


def drawn(rows: int, source: Source, wanted: Callable[[Any], bool] = lambda value: True) -> Any:
    """(kind, value, reason) of each row: half of them good, in random order.

    Only kinds whose values are `wanted` are drawn; all alike often, but those of megabytes RARITY times less.
    """
    pools = []
    for kinds in (ACCEPTED, DAMAGE):
        fitting = [(name, maker) for name, maker in kinds.items() if wanted(maker.make(source))]
        usual = [pair for pair in fitting if "megabyte" not in pair[0]]
        pools.append(fitting + usual * (RARITY - 1))
    chosen = [pools[i % 2][i // 2 % len(pools[i % 2])] for i in range(rows)]
    source.rng.shuffle(chosen)
    for name, maker in chosen:
        yield name, maker.make(source), maker.reason


def write_lines(path: Path, rows: int, *, seed: int = 0, megabyte: int = 2**20) -> Written:
    """A JSON Lines file, compressed where its name ends with .gz, with blank lines here and there."""
    written, source, number = Written(path), Source(seed, megabyte), 0
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        for name, value, reason in drawn(rows, source):
            if source.rng.random() < 0.01:
                file.write(b" \r\n")
                number += 1
            number += 1
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            assert b"\n" not in raw
            file.write(raw + b"\n")
            written.note(number, name, value, reason)
    return written


def write_document(path: Path, rows: int, *, seed: int = 0, megabyte: int = 2**20) -> Written:
    """A JSON list: of the kinds, those that are JSON at all."""

    def is_json(value: Any) -> bool:
        if not isinstance(value, bytes):
            return True
        try:
            json.loads(value.decode())
        except (ValueError, RecursionError):
            return False
        return True

    written, elements = Written(path), []
    for number, (name, value, reason) in enumerate(drawn(rows, Source(seed, megabyte), is_json), start=1):
        elements.append(value if isinstance(value, bytes) else json.dumps(value).encode())
        written.note(number, name, value, reason)
    path.write_bytes(b"[" + b",\n".join(elements) + b"]")
    return written


def write_table(path: Path, rows: int, *, seed: int = 0, megabyte: int = 2**20) -> Written:
    """A Parquet file of texts, or, where `path` has no suffix, an Arrow folder of conversations."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    def is_text(value: Any) -> bool:
        return value is None or (isinstance(value, str) and _encodes(value))

    def is_talk(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(turn, dict) and set(turn) == {"role", "content"} and all(map(is_text, turn.values()))
            for turn in value
        )

    fits = is_text if path.suffix else is_talk

    def wanted(value: Any) -> bool:
        return isinstance(value, dict) and set(value) >= set(SIDES) and all(fits(value[side]) for side in SIDES)

    written, records = Written(path), []
    for number, (name, value, reason) in enumerate(drawn(rows, Source(seed, megabyte), wanted), start=1):
        records.append({side: value[side] for side in SIDES})
        written.note(number, name, value, reason)
    if path.suffix:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return written


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
