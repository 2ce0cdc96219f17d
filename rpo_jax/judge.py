"""Compare two files of responses by a judge"s verdicts."""

from rpo_jax.tools.judging.judge import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
