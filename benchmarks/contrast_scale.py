"""What becomes of the contrast weights as the matrix grows, on a preference file's prompts.

python -m benchmarks.contrast_scale --data FILE [--out FOLDER]

Prompts are embedded as in training and grouped in shuffled and in related batches; weights and statistics are
those of the training step. Writes contrast_scale.md (a table), .json (the numbers) and .png (a plot), which needs
matplotlib (pip install matplotlib).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rpo_jax.config import EmbeddingConfig
from rpo_jax.core.records import PreferenceExample
from rpo_jax.data.embeddings import embed_texts
from rpo_jax.data.examples import embedding_text, make_examples
from rpo_jax.data.related import related_order, whole_points
from rpo_jax.data.sources import read_rows
from rpo_jax.objectives import contrast, metrics

GROUPS = (8, 64, 512, 2048)
WEIGHTS = {
    "tau 0.5": {"temperature": 0.5, "perplexity": None},
    "perplexity 6": {"temperature": None, "perplexity": 6.0},
}
ORDERS = ("shuffled", "related")
BATCH = 64  # pairs of a batch where the group is smaller
EPOCHS = 4  # that the numbers are means over
SHOWN = {
    "diagonal weight": "contrast/diagonal_weight",
    "row perplexity": "contrast/perplexity",
    "weight on related prompts": "contrast/related_weight",
}
RELATED = "related prompts per row"


def transcript(example: PreferenceExample) -> str:
    """The prompt as Anthropic's files have it, with what its speakers are called in every embedded text."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    assert not isinstance(example.prompt, str)
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in example.prompt) + "\n\nAssistant:"


TEXTS: dict[str, Callable[[PreferenceExample], str]] = {
    "prompt": lambda example: embedding_text(example, "prompt", ""),
    "last_turn": lambda example: embedding_text(example, "last_turn", ""),
    "transcript": transcript,
}


def read_prompts(file: str, text: str, cache_dir: Path) -> tuple[Float[np.ndarray, "n E"], Int[np.ndarray, "n"]]:
    """Embeddings of all usable prompts of a file, and a number for each distinct prompt."""
    examples = make_examples(read_rows(file), on_bad_row="skip").examples
    texts = [TEXTS[text](example) for example in examples]
    embeddings = embed_texts(texts, EmbeddingConfig().encoder, cache_dir)
    return embeddings, np.unique(texts, return_inverse=True)[1]


def grouped(embeddings: Float[np.ndarray, "n E"], order: str, group: int, epoch: int) -> Int[np.ndarray, "G M"]:
    """Prompts of an epoch's full groups."""
    index = np.random.default_rng((0, epoch)).permutation(len(embeddings))
    if order == "related":
        sizes = (BATCH, group) if group < BATCH else (group,)
        index = related_order([whole_points(embeddings)], [index], sizes, (0, epoch))[0]
    return index[: len(index) // group * group].reshape(-1, group)


@jax.jit
def _related_prompts(cosine: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(other & (cosine > metrics.RELATED_COSINE), axis=-1))


def measure(
    embeddings: Float[np.ndarray, "n E"],
    prompt_id: Int[np.ndarray, "n"],
    order: str,
    group: int,
    settings: dict[str, Any],
) -> dict[str, float]:
    """The step's statistics of paired groups, means over rows and epochs."""

    @jax.jit
    def statistics(rows, ids):
        mask = jnp.ones((group, group), bool)
        matrix = contrast.make_weights("embedding", rows, rows, mask, alpha=0.0, **settings)
        cosine = contrast.cosine(rows, rows)
        means = metrics.contrast_metrics(matrix, cosine, ids, ids, paired=True)
        return metrics.finalize(means), _related_prompts(cosine, ids[:, None] != ids[None, :])

    found: list[dict[str, float]] = []
    for epoch in range(EPOCHS):
        for index in grouped(embeddings, order, group, epoch):
            told, prompts = statistics(embeddings[index], prompt_id[index])
            found.append({name: float(told[key]) for name, key in SHOWN.items()} | {RELATED: float(prompts)})
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def table(results: list[dict[str, Any]]) -> str:
    columns = ("group", "order", "weights", *SHOWN, RELATED)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for one in results:
        share = f"{one['weight on related prompts']:.1%}"
        numbers = (f"{one['diagonal weight']:.3f}", f"{one['row perplexity']:,.1f}", share, f"{one[RELATED]:.2f}")
        lines.append("| " + " | ".join((f"{one['group']:,}", one["order"], one["weights"], *numbers)) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2))
    for axis, name in zip(axes, (*SHOWN, RELATED), strict=True):
        for weights, colour in zip(WEIGHTS, ("tab:red", "tab:blue"), strict=True):
            for order, line in zip(ORDERS, ("--", "-"), strict=True):
                if name == RELATED and weights != next(iter(WEIGHTS)):
                    continue  # weights do not change which prompts there are
                points = [
                    (one["group"], one[name]) for one in results if (one["order"], one["weights"]) == (order, weights)
                ]
                label = order if name == RELATED else f"{weights}, {order}"
                axis.plot(
                    *zip(*points, strict=True),
                    line,
                    marker="o",
                    color="black" if name == RELATED else colour,
                    label=label,
                )
        axis.set(title=name, xlabel="pairs in a contrast group", xscale="log", xticks=GROUPS)
        axis.set_xticks(GROUPS, [f"{group:,}" for group in GROUPS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if name in (RELATED, "row perplexity"):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a preference file, as data.path")
    parser.add_argument("--text", choices=TEXTS, default="prompt", help="what is embedded; prompt as in training")
    parser.add_argument("--out", type=Path, default=Path("runs/contrast_scale"))
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/rpo_jax").expanduser())
    parser.add_argument("--groups", type=lambda text: tuple(map(int, text.split(","))), default=GROUPS)
    options = parser.parse_args(arguments)
    embeddings, prompt_id = read_prompts(options.data, options.text, options.cache_dir)
    usable = [group for group in options.groups if group <= len(embeddings)]
    if not usable:
        parser.error(f"--groups {options.groups} are all larger than the {len(embeddings)} prompts of {options.data}")
    results = [
        {"group": group, "order": order, "weights": weights, **measure(embeddings, prompt_id, order, group, settings)}
        for group in usable
        for order in ORDERS
        for weights, settings in WEIGHTS.items()
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (options.out / "contrast_scale.md").write_text(text, encoding="utf-8")
    (options.out / "contrast_scale.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    cosine = (embeddings @ embeddings.T)[~np.eye(len(embeddings), dtype=bool)]
    print(f"{len(embeddings):,} prompts, {EPOCHS} epochs each; cosine of two prompts {cosine.mean():.2f} on average,")
    print(f"{np.quantile(cosine, 0.99):.2f} at the 99th percentile\n\n{text}")
    plot(results, options.out / "contrast_scale.png")
    print(f"table, numbers and plot in {options.out}")


if __name__ == "__main__":
    main()
