"""See what training did: `python -m rpo_jax.report --run DIR [--run DIR ...]` writes one HTML page, for no network."""

from rpo_jax.tools.reporting.report import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
