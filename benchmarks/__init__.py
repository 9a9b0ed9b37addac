"""Speed: operators, training step, evaluation, the GPU check."""
