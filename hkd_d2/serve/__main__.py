"""Serve a detector over HTTP: python -m hkd_d2.serve is hkd serve."""

import sys

from hkd_d2.cli.dispatch import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("serve", argv, prog="python -m hkd_d2.serve")


if __name__ == "__main__":
    sys.exit(main())
