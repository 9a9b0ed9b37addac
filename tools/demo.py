#!/usr/bin/env python
"""Find pedestrians in pictures and videos: hkd detect."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("detect", argv, prog="demo.py")


if __name__ == "__main__":
    sys.exit(main())
