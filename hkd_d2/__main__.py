"""The command line: python -m hkd_d2 COMMAND, the same as hkd COMMAND."""

import sys

from hkd_d2.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
