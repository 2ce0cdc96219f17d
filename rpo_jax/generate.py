"""Answers of a model to prompts: `python -m rpo_jax.generate --model RUN_OR_HF --prompts FILE --out FILE.jsonl`."""

from rpo_jax.sampling.generation import generate, main

__all__ = ["generate", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
