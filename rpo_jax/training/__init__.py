"""From a configuration to a trained policy."""
