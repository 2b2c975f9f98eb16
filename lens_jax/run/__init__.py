"""State, step and loop: batches in, checkpoints and samples out."""
