"""Hugging Face folders in and out: configurations, weights by a table, files; nothing of one family alone."""
