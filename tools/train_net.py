#!/usr/bin/env python
"""Train or evaluate a detector, with Detectron2's own arguments: hkd train."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("train", argv, prog="train_net.py")


if __name__ == "__main__":
    sys.exit(main())
