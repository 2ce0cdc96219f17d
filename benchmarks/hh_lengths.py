"""Write hh_lengths.json: the token counts of a preference file, and none of its text.

python -m benchmarks.hh_lengths [--hh-file PATH] [--tokenizer FOLDER --out benchmarks/hh_lengths_smollm2.json]

The tokenizer is that of a model folder, with its chat template, or rpo_jax's own byte-level BPE with the benchmark's
vocabulary, learnt from the file; lengths are cut as in training, with the defaults of data.max_prompt_tokens and
data.max_tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.spec import MODELS
from benchmarks.workloads import HH_LENGTHS
from rpo_jax.config import DataConfig
from rpo_jax.data.examples import make_examples, prompt_text
from rpo_jax.data.sources import read_rows
from rpo_jax.data.tokenize import TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import load_tokenizer, train_tokenizer

HH_FILE = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"


def token_lengths(file: Path, model_folder: Path | None) -> list[list[int]]:
    """[prompt, chosen, rejected] of every usable pair, in file order."""
    found = make_examples(read_rows(str(file)), on_bad_row="skip")
    texts = [text for e in found.examples for text in (prompt_text(e), *(response.text for response in e.responses))]
    defaults = DataConfig()
    with tempfile.TemporaryDirectory() as folder:
        tokenized, _ = tokenize_examples(
            found.examples,
            load_tokenizer(model_folder)
            if model_folder
            else train_tokenizer(texts, MODELS["small"].vocab_size, folder),
            TokenLimits(defaults.max_prompt_tokens, defaults.max_tokens, "keep_end"),
        )
    return [[len(e.prompt_ids), *(len(response.ids) for response in e.responses)] for e in tokenized]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hh-file", type=Path, default=HH_FILE)
    parser.add_argument("--tokenizer", type=Path, help="model folder; without it a tokenizer is learnt from the file")
    parser.add_argument("--out", type=Path, default=HH_LENGTHS)
    options = parser.parse_args()
    file, out = options.hh_file, options.out
    lengths = token_lengths(file, options.tokenizer)
    text = ",\n".join(json.dumps(row) for row in lengths)
    out.write_text(f'{{"file": "{file.name}", "lengths": [\n{text}\n]}}\n', encoding="utf-8")
    print(f"{len(lengths)} pairs, {sum(map(sum, lengths)) / len(lengths):.1f} tokens each, in {out}")


if __name__ == "__main__":
    main()
