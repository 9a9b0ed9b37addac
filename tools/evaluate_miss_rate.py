#!/usr/bin/env python
"""Log-average miss rate of a file of detections: hkd score."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("score", argv, prog="evaluate_miss_rate.py")


if __name__ == "__main__":
    sys.exit(main())
