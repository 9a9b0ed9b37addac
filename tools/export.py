#!/usr/bin/env python
"""Export a trained detector: hkd export."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("export", argv, prog="export.py", aliases={"--weights": "--model"})


if __name__ == "__main__":
    sys.exit(main())
