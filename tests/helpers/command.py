"""Commands of the project, each in a process of its own."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports this checkout and the helpers of the tests."""
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | variables
    )


def run_python(
    *arguments: object, status: int | None = 0, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess:
    """Run the interpreter of the tests and return the finished process, with its text.

    Args:
        arguments: of the interpreter: ``"-m", "hkd_d2"`` or a file, and what follows.
        status: exit code that is asserted; None asserts nothing.
        cwd: folder to run in.
        variables: of the environment, beside those of the tests.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True
    )
    if status is not None:
        said = f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, f"exit code {done.returncode} of {said}"
    return done


def run_code(code: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a program text, indented or not; the options are those of :func:`run_python`."""
    return run_python("-c", textwrap.dedent(code), *arguments, **options)


def hkd(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run ``hkd`` as ``python -m hkd_d2``; the options are those of :func:`run_python`."""
    return run_python("-m", "hkd_d2", *arguments, **options)


def forget_loggers() -> None:
    """Remove what a command that ran in this process has set up, which writes to its streams."""
    from detectron2.utils.logger import setup_logger

    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "hkd_d2"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
