"""Runs a function in two processes that make one gloo group."""

import os
import tempfile

import torch


def run_in_two_processes(function, *args):
    """Call ``function(rank, *args)`` as rank 0 and rank 1; raise what one of them raises."""
    # They meet at a file: a port that was free a moment ago may be another test's by then.
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (f"{folder}/group", function, args), nprocs=2)


def _rank(rank, file, function, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    function(rank, *args)
    torch.distributed.barrier()
    # A thread of gloo that wakes while the interpreter is taken down ends the process with SIGABRT,
    # rarely. All work is done and written here, so the interpreter is not taken down.
    os._exit(0)
