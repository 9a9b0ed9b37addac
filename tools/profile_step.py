#!/usr/bin/env python
"""Where a training step's time goes: python -m benchmarks.training_step."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_step.__main__ import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
