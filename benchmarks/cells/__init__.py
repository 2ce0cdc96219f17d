"""One measurement each, run in a process of its own; benchmarks.suite starts them."""
