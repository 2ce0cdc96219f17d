"""A run's checkpoint as a Hugging Face folder: `python -m rpo_jax.export --run DIR --out HF_DIR`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rpo_jax import models
from rpo_jax.checkpoint import Checkpoints, check_architecture, comparable


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights, configuration, tokenizer and chat template of a run's policy; whole or not at all.

    Args:
        step: which checkpoint; the newest where not given.
        dtype: of the tensors; where not given, that of the folder that the run started from.
        overwrite: replace an existing folder.

    Raises:
        ValueError: a folder that is no run, a step without a checkpoint, an `out` that exists.
    """
    run_dir = Path(run_dir).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml; give the run.dir of a training run.")
    model_config = models.read_config(run_dir / "model")
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{run_dir} has no complete checkpoint yet; let the run reach its first save.")
    if step is not None and step not in steps:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    check_architecture(checkpoints.record(step)["model"], comparable(model_config), run_dir)
    params = checkpoints.restore_params(step, models.abstract_params(model_config))
    checkpoints.close()
    return models.save_pretrained(
        out,
        model_config,
        params,
        tokenizer=run_dir / "model",
        # As the folder that the run started from had it; otherwise from the architecture.
        generation_config=run_dir / "model" if (run_dir / "model" / "generation_config.json").is_file() else None,
        dtype=dtype,
        overwrite=overwrite,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `export`; exit status 2 and one line for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.export", description=__doc__)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--out", required=True, help="Hugging Face folder to make")
    parser.add_argument("--step", type=int, help="checkpoint to export; the newest by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every restore
    try:
        folder = export(options.run, options.out, step=options.step, dtype=options.dtype, overwrite=options.overwrite)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
