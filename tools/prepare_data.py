#!/usr/bin/env python
"""Check and prepare a download of a data set: hkd data check."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("data check", argv, prog="prepare_data.py")


if __name__ == "__main__":
    sys.exit(main())
