"""The command line benchmarks.evaluation."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_run_compares_and_prints_a_row_a_size():
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "evaluation.py")),
            *("--detections", "300", "1000", "--repeats", "1"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in done.stdout.splitlines()[-2:])
    assert first[:2] == ["300", "3"] and second[:2] == ["1,000", "10"]
    assert "-" not in first and second.count("-") == 2  # plain Python on the first set alone
