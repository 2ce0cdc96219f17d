"""Generated worlds whose truth is a rule: data for the quickstart and the studies."""
