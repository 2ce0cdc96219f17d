"""A model's own answers, scored, as preference data."""
