"""Fill the caches of a configuration without training: `python -m rpo_jax.prepare --config FILE`."""

from rpo_jax.training.prepare import main, prepare

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    raise SystemExit(main())
