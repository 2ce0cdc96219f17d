"""Every family's export, read by transformers 4: the logits are those of transformers 5's model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rpo_jax import models
from tests import read_by_transformers
from tests.test_exports import needs_readers, reading_process

from .conftest import CASES as ALL
from .conftest import SIZES

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 24).tolist()
# One of each class that tests/test_exports.py does not read already.
CASES = {
    name: ALL[name]
    for name in {prefix: name for name, (prefix, _) in ALL.items()}.values()
    if ALL[name][0] not in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
UNKNOWN = {"HyperCLOVAX"}  # to version 4.57


@pytest.fixture(scope="module")
def by_version_4(hf_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for name in CASES:
        config, params = models.load_pretrained(hf_folder(name))
        if name == "olmo3":  # version 4 has one base for all of its layers, as published models do
            variant = dataclasses.replace(config.parts, local_rope=models.Rope(theta=config.rope.theta))
            config = dataclasses.replace(config, variant=variant)
        if name == "gpt_oss":  # and clamps at 7, as published models do, whatever the configuration says
            experts = dataclasses.replace(config.parts.experts, clamp=7.0)
            config = dataclasses.replace(config, variant=dataclasses.replace(config.parts, experts=experts))
        made[str(models.save_pretrained(folder / name, config, params))] = name
    request = {"models": list(made), "tokens": TOKENS, "texts": [], "messages": [], "folders": [], "gguf": []}
    (folder / "request.json").write_text(json.dumps(request))
    answer = json.loads(reading_process(str(Path(read_by_transformers.__file__)), str(folder / "request.json")))
    assert answer["version"].startswith("4.")
    return {made[path]: (path, found) for path, found in answer["found"].items()}


@needs_readers
@pytest.mark.parametrize("name", CASES)
def test_an_export_is_read_by_version_4(name, by_version_4):
    saved, found = by_version_4[name]
    if CASES[name][0] in UNKNOWN:
        assert "does not recognize this architecture" in found
        return
    expected = read_by_transformers.logits_of(saved, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
