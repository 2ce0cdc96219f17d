"""Look over a run or a configuration before it costs anything: `rpo_jax.doctor --run DIR | --config FILE`."""

from rpo_jax.tools.checkup.doctor import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
