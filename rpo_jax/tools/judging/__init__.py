"""Pairwise judging: responses to the same prompts, a judge, its verdicts, and what they say."""
