#!/usr/bin/env python
"""Parameters and multiply-adds of configs: hkd count."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("count", argv, prog="count_model.py", aliases={"--opts": None})


if __name__ == "__main__":
    sys.exit(main())
