"""What the HTML pages have in common; those without a script are read on a phone without scrolling sideways."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from rpo_jax.core.pages import dot_chart, round_ticks
from rpo_jax.core.templates import render
from rpo_jax.tools.comparing import comparison_page
from rpo_jax.tools.comparing.study import StudyRow, Table
from rpo_jax.tools.comparing.tables import tried
from rpo_jax.tools.judging import summary
from rpo_jax.tools.judging.comparisons import Comparison, Pair, Verdict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>document.title = 'broken'</script>"


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (41.3, 78.2, [40, 50, 60, 70, 80]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.31, 0.42, [-0.4, -0.2, 0, 0.2, 0.4, 0.6]),
        (1234, 1240, [1234, 1236, 1238, 1240]),
    ],
)
def test_ticks_are_round_and_hold_all(low, high, wanted):
    assert round_ticks(low, high) == wanted


def test_any_range_has_few_ticks_around_it():
    rng = np.random.default_rng(0)
    for _ in range(500):
        low = rng.normal() * 10.0 ** rng.integers(-6, 6)
        high = low + abs(rng.normal()) * 10.0 ** rng.integers(-6, 6) * rng.integers(0, 2)
        ticks = round_ticks(low, high)
        assert 2 <= len(ticks) <= 6
        near = 1e-6 * (ticks[-1] - ticks[0])
        assert ticks[0] <= low + near
        assert ticks[-1] >= high - near


def test_a_chart_has_its_baseline_by_name_and_value():
    chart = dot_chart("wins, %", {"RPO": (74.7, 72.4, 77.0), "one seed": (70.0, math.nan, math.nan)}, ("DPO", 72.3))
    assert chart["ticks"][0] == ("70", 0.0)
    assert chart["ticks"][-1] == ("78", 100.0)
    assert chart["baseline"] == ("DPO: 72.3", pytest.approx(28.75))
    assert [row["range"] for row in chart["rows"]] == [(30.0, 57.5), None]
    assert dot_chart("nothing yet", {})["rows"] == []


def compared() -> str:
    """A comparison of two methods over three seeds."""
    rng = np.random.default_rng(0)

    def result(share):
        wins = (rng.random(60) < share).astype(float).tolist()
        return {"wins": wins, "metrics": {"eval_rewards/margins": share}, "divergence": 2.5, "train_seconds": 40.0}

    table = Table(
        "main", "Methods", "DPO", tuple(StudyRow(name, None, {}, {}) for name in ("DPO", "RPO, uniform weights"))
    )
    results = {
        "main": {row.label: [result(0.5 + 0.2 * number) for _ in range(3)] for number, row in enumerate(table.rows)}
    }
    settings = {"objective.beta": 0.1, "optim.learning_rate": 3e-5}
    trials = tried({"DPO": [(settings, results["main"]["DPO"][0])]}, {"DPO": settings})

    class Tables:
        tables = (table,)

    return comparison_page.make_page(Tables, results, trials, "`rpo-jax compare`: seeds 1, 2, 3; 6 runs.")


def judged() -> str:
    """Verdicts on forty prompts, most of them for A."""
    comparisons, verdicts = [], []
    for number in range(40):
        prompt = f"Question {number}? {HOSTILE}"
        comparisons.append(
            Comparison(Pair(str(number), "f:1", prompt, "A long answer. " * 9, HOSTILE), number % 2 == 0)
        )
        verdicts.append(Verdict(("first" if (number % 2 == 0) == (number % 4 < 3) else "second"), "More helpful: it."))
    told = summary.summarize(comparisons, verdicts, sees_order=True, seed=0)
    told |= {"a": "rpo.jsonl", "b": "a_very_long_name_of_a_file_of_other_answers.jsonl", "task": "dialogue"}
    return summary.page(told | {"judge": "gpt-4-0613", "seed": 0}, comparisons, verdicts)


def sampled() -> str:
    facts = {"model": "path/" * 30, "different answers": 2, "mean score": "0.5"}
    answers = [(None, "x" * 200), (0.5, HOSTILE)]
    bars = [(1, 0.5), (2, 1.0)] * 10
    return render(
        "samples.html", title="x.jsonl", verdict="", plain=facts, bars=bars, ends=("0", "1"), shown=[(HOSTILE, answers)]
    )


def test_the_pages_say_what_they_show():
    page = judged()
    assert HOSTILE not in page
    told = re.sub(r"\s+", " ", page)
    assert "rpo.jsonl wins against a_very_long_name_of_a_file_of_other_answers.jsonl more often than not" in told
    assert "even: 50" in told
    page = compared()
    assert re.search(r"DPO: \d", page), "the baseline has its name and value"
    assert "Methods: RPO, uniform weights has the highest gold win rate against chosen, " in page
    assert re.search(r"; its difference to DPO is \+\d+\.\d \(\+\d+\.\d to \+\d+\.\d\) points\.", page)
    for title in ("difference to DPO", "KL to the start, nats", "training time, s", "Tuning trials"):
        assert title in page
    assert "http" not in page
    assert "<script" not in page


PROBE = """{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{ document.getElementById("found").textContent = JSON.stringify(
  [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument.documentElement)
    .map((page) => page.scrollWidth - page.clientWidth)); }});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
def test_no_page_is_wider_than_a_phone(tmp_path):
    pages = {"judged.html": judged(), "compared.html": compared(), "sampled.html": sampled()}
    for name, page in pages.items():
        (tmp_path / name).write_text(page, encoding="utf-8")
    frames = "".join(f'<iframe src="{name}" style="width:390px;height:900px;border:0"></iframe>' for name in pages)
    (tmp_path / "probe.html").write_text(PROBE.format(frames=frames), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    profile = f"--user-data-dir={tmp_path}/profile"
    command = [
        str(BROWSER),
        *flags,
        profile,
        "--virtual-time-budget=4000",
        "--dump-dom",
        (tmp_path / "probe.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert json.loads(found[1]) == [0, 0, 0]
