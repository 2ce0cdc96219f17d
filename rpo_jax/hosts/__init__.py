"""Who takes part in a run: processes, their shares and ends, the device mesh and where arrays live on it."""
