"""When each file's slow tests last ran: written by the command that runs them, `bash scripts/test.sh slow`."""

import json
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


class Ledger:
    """Counts the outcomes of a session, file by file, and puts them into a JSON file beside those of files not run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, Counter[str]] = {}
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self._seconds[file] += report.duration
        if report.when == "call" or report.outcome != "passed":  # a test that is skipped or fails before it begins
            self._outcomes.setdefault(file, Counter())[report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):  # the workers of a session report to its first process
            return
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        for file, outcomes in self._outcomes.items():
            known[file] = {
                "day": date.today().isoformat(),
                "commit": _commit(),
                **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
                "seconds": round(self._seconds[file]),
            }
        self._path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
