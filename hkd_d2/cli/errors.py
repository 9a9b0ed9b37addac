"""The error rule of every command.

What the user can change is one sentence on stderr and exit code 2; everything else keeps its
traceback. HKD_TRACEBACK=1 shows the traceback of the former as well.
"""

import builtins
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

# What the package raises for mistakes that a user can change, always with a full sentence.
USER_ERRORS = (ValueError, OSError, ImportError)
# The last line of a traceback that came as text: "ValueError: The sentence."
_LAST_LINE = re.compile(r"^([A-Za-z_][\w.]*): (.+)$")


def guard(command: Callable[[], int], prog: str) -> int:
    """Run a command.

    Args:
        command: returns its exit code: 0 done, 1 done in part.
        prog: its name, which begins the sentence of an error.

    Returns:
        the command's exit code; 2 for a user's error; 130 and 143 after SIGINT and SIGTERM.
    """
    try:
        with _sigterm_raises():
            return command()
    except KeyboardInterrupt:
        _stop_children()
        print(f"{prog}: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        _stop_children()
        print(f"{prog}: stopped by SIGTERM.", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            # The reader of our output is gone, as in hkd score ... | head.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if getattr(error, "exit_code", None) in (130, 143):  # of a process that was stopped
            return error.exit_code
        sentence = user_sentence(error)
        if sentence is None:
            raise
        if os.environ.get("HKD_TRACEBACK"):
            traceback.print_exception(error)
        print(f"{prog}: {sentence}", file=sys.stderr)
        return 2


def user_sentence(error: BaseException) -> str | None:
    """The sentence of an error that the user can change; None for any other.

    An error of a worker process comes as text inside another: of torch.multiprocessing's processes
    as a ProcessRaisedException, of a DataLoader's workers as its own type or a RuntimeError.
    """
    text = str(error)
    if type(error).__name__ == "ProcessRaisedException" or "Original Traceback" in text:
        return _sentence_of_traceback(text)
    if not isinstance(error, USER_ERRORS):
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"'{error.filename}': {error.strerror}."
    return _one_line(text) or type(error).__name__


def _sentence_of_traceback(text: str) -> str | None:
    lines = text.strip().splitlines()
    # A message may have several lines, so the last line need not be the one with the type.
    for number in range(len(lines) - 1, -1, -1):
        match = _LAST_LINE.match(lines[number])
        kind = match and _error_type(match[1])
        if kind:
            message = " ".join([match[2], *lines[number + 1 :]])
            return _one_line(message) if issubclass(kind, USER_ERRORS) else None
    return None


def _error_type(name: str) -> type | None:
    """The exception class that a traceback calls ``name``; None where there is none."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module) if module else builtins, attribute, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stop_children() -> None:
    """End the processes of a training on several GPUs, which would outlive this one."""
    for child in multiprocessing.active_children():
        child.terminate()


class _Terminated(BaseException):
    """SIGTERM as an exception, so that unfinished files are removed on the way out."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    owner = os.getpid()

    def terminate(number, frame):
        if os.getpid() == owner:
            raise _Terminated
        # A forked process, which has inherited this handler, ends as it would without.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
