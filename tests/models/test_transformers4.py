"""Every family's export, read by transformers 4: the logits are those of transformers 5's model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rpo_jax import models
from tests import read_by_transformers
from tests.test_exports import needs_readers, reading_process

from .conftest import CASES, SIZES, torch_model

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 24).tolist()
UNKNOWN: set[str] = set()  # to version 4.57


@pytest.fixture(scope="module")
def by_version_4(hf_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    made = {
        str(models.save_pretrained(folder / name, *models.load_pretrained(hf_folder(name)))): name for name in CASES
    }
    request = {"models": list(made), "tokens": TOKENS, "texts": [], "messages": [], "folders": [], "gguf": []}
    (folder / "request.json").write_text(json.dumps(request))
    answer = json.loads(reading_process(str(Path(read_by_transformers.__file__)), str(folder / "request.json")))
    assert answer["version"].startswith("4.")
    return {made[path]: found for path, found in answer["found"].items()}


@needs_readers
@pytest.mark.parametrize("name", CASES)
def test_an_export_is_read_by_version_4(name, by_version_4):
    found = by_version_4[name]
    if CASES[name][0] in UNKNOWN:
        assert "does not recognize this architecture" in found
        return
    with torch.no_grad():
        expected = torch_model(name)(torch.tensor([TOKENS])).logits[0].numpy()
    if name == "gpt_oss":  # version 4.57 clamps at 7, as published models do, whatever the configuration says
        assert np.abs(np.array(found) - expected).max() > 1e-3
        return
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
