"""Without torch and sentence-transformers: what needs neither runs, and what does says how to get them."""

import subprocess
import sys

import pytest

from rpo_jax.core import torch_extra
from tests.runs import settings, write_rows

# As if they were not installed: nothing finds them.
HIDDEN = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ("torch", "sentence_transformers")
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in hidden else find(name, *more)
from rpo_jax import train
trained, refused = train.main({words}), train.main({encoder})
assert "torch" not in sys.modules
raise SystemExit((trained, refused) != (0, 2))
"""


def test_rpo_is_trained_without_torch_by_words_and_told_what_an_encoder_needs(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl")

    def arguments(name, **more):
        changes = {"train.steps": 2, "tracking.tensorboard": False, **more}
        return [f"--{word}" for word in settings(data, tmp_path / name, tmp_path / "cache", changes)]

    code = HIDDEN.format(
        words=arguments("words", **{"embedding.encoder": "hashed-words"}), encoder=arguments("encoder")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words" / "checkpoints" / "2").is_dir()
    assert "needs torch and sentence-transformers: `uv pip install --torch-backend cpu torch`" in done.stderr
    assert "or use --embedding.encoder hashed-words" in done.stderr
    assert done.stderr.count("\n") == 1, "one line"
    assert not (tmp_path / "encoder").exists()


def test_what_is_missing_is_named(monkeypatch):
    torch_extra.check_torch("x")
    monkeypatch.setattr(torch_extra.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ValueError, match=r"^x needs torch: `uv pip install --torch-backend cpu torch` .*; or y\.$"):
        torch_extra.check_torch("x", "; or y")
