"""Comparisons of methods: a task with a known truth, runs over seeds, tables with intervals."""
