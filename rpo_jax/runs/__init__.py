"""All that lies on disk for a run: its folder, checkpoints, metrics and model card."""
