"""Checks of what a run needs and has left, each a list of findings: rpo_jax.doctor shows them."""
