"""Print a table of benchmarks/plan.md from the plans in a folder: python -m benchmarks.plan_table .cache/plans/gpu"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
HEADER = (
    "model",
    "devices",
    "mesh (data x fsdp x tensor)",
    "rows x tokens",
    "parameters + optimizer, GiB",
    "temporary, GiB",
    "peak of memory, GiB",
    "TFLOP",
    "moved, GB",
    "sent, GB",
    "step, s",
    "utilisation",
    "largest micro-batch",
)


def row(name: str, content: dict[str, Any], rate: float) -> list[str]:
    """Cells of one plan; the first that fits where the configured one does not."""
    plans = content["plans"]
    plan = next((one for one in plans if one["estimate"] and one["estimate"]["fits"]), plans[0])
    found = plan["estimate"]
    model, target = name.partition("_")[0], content["target"]
    mesh = " x ".join(str(size) for size in (found["mesh"].values() if found else plan["mesh"]))
    if found is None:
        return [model, target, mesh, plan["reason"], *[""] * (len(HEADER) - 4)]
    memory = found["memory"]
    times = found["seconds_overlapped"], found["seconds_serial"]
    shares = [found["necessary_flops"] / (time * rate) for time in reversed(times)]
    return [
        model,
        target,
        mesh,
        f"{found['rows']} x {found['row_tokens']}",
        f"{memory['params'] / GIB:.2f} + {memory['optimizer'] / GIB:.2f}",
        f"{memory['temporary'] / GIB:.2f}",
        f"{found['peak_bytes'] / GIB:.2f} of {found['memory_limit'] / GIB:.0f}",
        f"{found['flops'] / 1e12:.1f}",
        f"{found['moved_bytes'] / 1e9:.0f}",
        f"{found['sent_bytes'] / 1e9:.1f}",
        f"{times[0]:.2f} to {times[1]:.2f}",
        f"{shares[0]:.0%} to {shares[1]:.0%}",
        content["largest_micro_batch"].partition(":")[0],
    ]


def main(folder: Path) -> None:
    from rpo_jax.tools.planning.chips import CHIPS

    print("|", " | ".join(HEADER), "|")
    print("|", " | ".join("---" for _ in HEADER), "|")
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rate = CHIPS[content["target"].partition(":")[0]].flops
        print("|", " | ".join(row(file.stem, content, rate)), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
