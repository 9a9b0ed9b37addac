#!/usr/bin/env python
"""Teacher, plain and distilled student on drawn streets: python -m experiments.quickstart."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.quickstart import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
