"""Plan a run on devices that are not here: `python -m rpo_jax.plan --config C --topology v5p:4x4x4`."""

from rpo_jax.tools.planning.planner import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
