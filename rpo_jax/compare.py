"""Compare methods: `python -m rpo_jax.compare --config configs/compare_small.yaml --out runs/compare_small`."""

from rpo_jax.tools.comparing.compare import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
