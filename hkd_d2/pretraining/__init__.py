"""Pre-training of backbones by classification: HSAKD and its online form HSSAKD."""
