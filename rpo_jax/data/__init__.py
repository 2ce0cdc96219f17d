"""Rows to batches: sources, examples, tokens, embeddings, packing.  NumPy only: nothing here imports jax."""
