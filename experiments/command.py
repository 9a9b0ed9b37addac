"""The error rule of ``hkd`` for the experiments, where a training may fail as well."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

from hkd_d2.cli.errors import guard


def run_experiment(main: Callable[[], None], prog: str) -> int:
    """Run an experiment.

    Args:
        main: raises RuntimeError, with the last lines of its log, where a training failed.
        prog: its name, which begins every message.

    Returns:
        the exit code: 1 where a training failed; otherwise see :func:`hkd_d2.cli.errors.guard`.
    """

    def command() -> int:
        # In the background SIGINT is ignored; and both signals end the trainings that run.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            main()
        except RuntimeError as error:
            if os.environ.get("HKD_TRACEBACK"):
                traceback.print_exception(error)
            print(f"{prog}: {error}", file=sys.stderr)
            return 1
        return 0

    code = guard(command, prog)
    if code > 128:
        print("The same command keeps what is finished and goes on.", file=sys.stderr)
    return code
