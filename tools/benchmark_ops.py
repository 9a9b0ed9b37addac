#!/usr/bin/env python
"""Time the distillation operators: python -m benchmarks.operators."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.operators.__main__ import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
