"""One HTML page that holds all that it shows: data, style and script, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rpo_jax.config.reading import known_keys
from rpo_jax.core.templates import render
from rpo_jax.tools.reporting.curves import final_values, make_panels
from rpo_jax.tools.reporting.run_records import RunRecord
from rpo_jax.tools.reporting.verdict import verdict

MAX_SAMPLED_PROMPTS = 50


def settings(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every configuration key with each run's value; whether it is other than the default, or than in other runs."""
    rows = []
    each = [asdict(record.config) for record in records]
    for key, default in known_keys().items():
        section, _, name = key.partition(".")
        values = [_plain(config[section][name]) for config in each]
        rows.append(
            {
                "key": key,
                "values": [_shown(value) for value in values],
                "set": any(value != _plain(default) for value in values),
                "differs": any(value != values[0] for value in values),
            }
        )
    return rows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def samples(record: RunRecord) -> list[dict[str, Any]]:
    """A run's answers by prompt, each prompt's by step."""
    prompts: dict[str, dict[str, Any]] = {}
    for row in record.samples:
        entry = prompts.setdefault(row["row_id"], {"row_id": row["row_id"], "prompt": row["prompt"], "answers": []})
        entry["answers"].append([row["step"], row["response"]])
    return list(prompts.values())[:MAX_SAMPLED_PROMPTS]


def make_page(
    records: Sequence[RunRecord],
    matrices: Sequence[dict[str, Any] | str],
    rewards: Sequence[dict[str, Any] | str],
) -> str:
    """The page; its verdict is on the first of the runs.

    Args:
        matrices, rewards: of each run what for_page of its panel gives, or a sentence that says why
            there is none.
    """
    names = [record.name for record in records]
    data = {
        "runs": [
            {
                "name": record.name,
                "folder": str(record.folder),
                "objective": record.config.objective.name,
                "steps": max(line["step"] for line in record.metrics),
                "matrix": matrix,
                "rewards": reward,
                "samples": samples(record),
                "notes": record.data_notes,
            }
            for record, matrix, reward in zip(records, matrices, rewards, strict=True)
        ],
        "panels": make_panels(records),
        "final": final_values(records),
        "settings": settings(records),
    }
    # "<" would let a prompt that holds "</script>" end the data; json has no other use for it than inside strings.
    packed = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return render("report.html", title=", ".join(names), verdict=verdict(records), data=packed)
