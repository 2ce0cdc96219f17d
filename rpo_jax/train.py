"""Train a policy on preferences: `python -m rpo_jax.train --config configs/NAME.yaml [--section.key value ...]`."""

from rpo_jax.training.run import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    raise SystemExit(main())
