"""Relative Preference Optimization (arXiv 2402.10958) in JAX: one contrast matrix over all devices."""
