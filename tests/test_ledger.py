"""The ledger of the slow tests: what ran, file by file, beside what it knew of others."""

import json
import subprocess
import sys

from tests.processes import REPOSITORY

TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise ValueError
def test_cannot_begin(broken): pass
"""
RUN = """
import sys, pytest
from pathlib import Path
from tests.ledger import Ledger
pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-c", "/dev/null"], plugins=[Ledger(Path(sys.argv[2]))])
"""


def test_a_session_notes_what_ran_and_leaves_what_did_not(tmp_path):
    file, ledger = tmp_path / "test_made.py", tmp_path / "ledger.json"
    file.write_text(TESTS)
    earlier = {"tests/test_other.py": {"day": "2026-01-01", "commit": "abc", "passed": 1}}
    ledger.write_text(json.dumps(earlier))
    subprocess.run([sys.executable, "-c", RUN, str(file), str(ledger)], cwd=REPOSITORY, check=True, capture_output=True)
    noted = json.loads(ledger.read_text())
    assert noted.pop("tests/test_other.py") == earlier["tests/test_other.py"]
    [(name, entry)] = noted.items()
    assert name.endswith("test_made.py")
    assert (entry["passed"], entry["failed"], entry["skipped"]) == (1, 2, 1)
    assert entry["commit"]
