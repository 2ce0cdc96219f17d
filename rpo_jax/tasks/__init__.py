"""Data for the quickstart and the studies: generated worlds whose truth is a rule, a model's own answers, scored."""
