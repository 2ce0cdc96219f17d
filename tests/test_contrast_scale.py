"""The table and plot of contrast by size: numbers of made-up prompts, whose laws are known."""

import numpy as np
import pytest

from benchmarks import contrast_scale, related_scale

pytest.importorskip("matplotlib", reason="pip install matplotlib")


def test_the_table_and_the_plot_tell_what_is_measured(tmp_path):
    embeddings = related_scale.synthetic_embeddings(300, 16, seed=0)
    results = [
        {
            "group": group,
            "order": order,
            "weights": name,
            **contrast_scale.measure(embeddings, np.arange(300), order, group, settings),
        }
        for group in (8, 64)
        for order in contrast_scale.ORDERS
        for name, settings in contrast_scale.WEIGHTS.items()
    ]
    found = {(one["group"], one["order"], one["weights"]): one for one in results}
    for (_, _, weights), one in found.items():
        if weights == "perplexity 6":
            assert one["row perplexity"] == pytest.approx(6, abs=1e-3)
    assert found[64, "shuffled", "tau 0.5"]["row perplexity"] > 5 * found[8, "shuffled", "tau 0.5"]["row perplexity"]
    prompts = {order: found[8, order, "tau 0.5"][contrast_scale.RELATED] for order in contrast_scale.ORDERS}
    assert prompts["related"] > 1.5 * prompts["shuffled"]
    lines = contrast_scale.table(results).splitlines()
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1
    contrast_scale.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
