"""What a run does besides its steps: one file a hook, their protocol in hook.py, their order in training/run.py."""
