"""What a training step needs on devices that are not here: compiled for them, counted, held against their rates."""
