"""SIGTERM and SIGINT: the run saves after the step and leaves; a second signal ends it at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST = 0.5  # seconds


class StopRequest:
    """Whether a signal has asked this process, or one that trains with it, to stop."""

    def __init__(self):
        self._signal, self._since = 0, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; in another thread than the first do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number, frame):
        if self._signal:
            # A terminal and a launcher may each pass on what was one request.
            if time.monotonic() - self._since > SAME_REQUEST:
                os._exit(128 + number)
            return
        self._signal, self._since = number, time.monotonic()
        if comm.is_main_process():
            # The signal may have come in the midst of a print.
            os.write(
                sys.__stderr__.fileno(),
                f"{signal.Signals(number).name}: saving after this step; a second signal ends the "
                "run at once.\n".encode(),
            )

    def agreed(self) -> int:
        """The signal that one of the processes has got, the same number in all; 0 for none."""
        if comm.get_world_size() == 1:
            return self._signal
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self._signal, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)
