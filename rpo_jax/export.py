"""A run"s checkpoint as a Hugging Face folder: `python -m rpo_jax.export --run DIR --out HF_DIR`."""

from rpo_jax.tools.exporting import export, main

__all__ = ["export", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
