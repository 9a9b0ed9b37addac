"""Time and memory of a training step, stage by stage."""
