"""Times, memory and bandwidth of operators, all of a case in one process and round by round."""

import ctypes
import gc
import os
import statistics
import subprocess
import time
from pathlib import Path

import torch

# Most rounds of a case, and the least that has a median worth the name.
MAX_ROUNDS, MIN_ROUNDS = 300, 5
MODES = ("forward", "backward", "full")


# ---------------------------------------------------------------------------------------- machine
def instruction_set() -> str:
    """Widest vectors that the compiled kernels use here: ``baseline``, ``avx2`` or ``avx512``."""
    limit = os.environ.get("HKD_CPU_ISA")
    return limit or torch.backends.cpu.get_cpu_capability().lower().replace("default", "baseline")


def commit() -> str:
    """Commit of this checkout, ``-dirty`` where tracked files differ from it."""

    def git(*args):
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------- time
def _time_cpu(problem, operator):
    start = time.perf_counter()
    output = problem.run_forward(operator)
    middle = time.perf_counter()
    gradients = problem.run_backward(output)
    end = time.perf_counter()
    del output, gradients  # after the clock: what frees them is not the operator
    return middle - start, end - middle


def _time_cuda(problem, operator):
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    start.record()
    output = problem.run_forward(operator)
    middle.record()
    gradients = problem.run_backward(output)
    end.record()
    torch.cuda.synchronize()
    del output, gradients
    return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3


class _Stream:
    """Two ways to stream through memory, timed as if they were a problem's two passes."""

    def __init__(self, one, other):
        self.run_forward = lambda _: one()
        self.run_backward = lambda _: other()


def measure(variants: dict, seconds: float, device: torch.device, stream_bytes: int):
    """Time variants round by round, so that a disturbance meets all of them.

    Args:
        variants: (problem, operator) by any key.
        seconds: to spend on the rounds, except that there are at least ``MIN_ROUNDS``.
        device: where the inputs are.
        stream_bytes: size of the tensor that measures the bandwidth.

    Returns:
        dict: by key the list of (forward, backward) seconds, one pair a round; and
        (bytes read, bytes written) a second of the same rounds.
    """
    time_once = _time_cuda if device.type == "cuda" else _time_cpu
    data = torch.zeros(stream_bytes // 4, device=device)
    halves = data.view(2, -1)
    streams = {
        "read": (_Stream(data.sum, lambda: torch.dot(*halves)), None),
        "write": (_Stream(data.zero_, lambda: data.fill_(1.0)), None),
    }
    runs = {**variants, **streams}
    samples = {key: [] for key in runs}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        # The first round fills caches and allocators, and is dropped.
        for number in range(MAX_ROUNDS + 1):
            if number > MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            for key, run in runs.items():
                sample = time_once(*run)
                if number:
                    samples[key].append(sample)
    finally:
        gc.enable()
    # The faster way of the two counts.
    read, write = (
        stream_bytes / min(map(statistics.median, zip(*samples.pop(key), strict=True)))
        for key in streams
    )
    return samples, (read, write)


def percentile(values, share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


# ----------------------------------------------------------------------------------------- memory
class _ProcessMemory:
    """Resident memory of this process and its peak, from Linux."""

    def current(self):
        return self._status("VmRSS")

    def start(self):
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc keeps would be taken without a trace
        return self.restart()

    def restart(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at the present size
        return self.current()

    def peak(self):
        return self._status("VmHWM")

    def _status(self, name):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(f"no {name} in /proc/self/status")


class _CudaMemory:
    """Bytes that PyTorch's caching allocator has handed out."""

    def start(self):
        return self.restart()

    def restart(self):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def extra_memory(problem, operator, device: torch.device) -> int | None:
    """Peak bytes of a forward and backward pass beyond inputs, output and gradients.

    On a CPU it is the process's resident memory, so a kernel's own buffers count, to about a
    megabyte. None where the system does not tell.
    """
    memory = _CudaMemory() if device.type == "cuda" else _ProcessMemory()
    try:
        before = memory.start()
        output = problem.run_forward(operator)
        extra = memory.peak() - before - output.nbytes
        memory.restart()
        gradients = problem.run_backward(output)
        result = output.nbytes + sum(g.nbytes for g in gradients)
        return max(extra, memory.peak() - before - result, 0)
    except (OSError, AttributeError):
        return None


# ------------------------------------------------------------------------------------ correctness
def difference(results, expected) -> float:
    """Relative error of the output or of all gradients together, whichever is larger; by the
    Euclidean norm. (A gradient of its own can be 0 up to rounding: PKD's, where a channel has two
    cells.)"""

    def relative(part):
        errors = [
            (a.double() - b.double()).norm()
            for a, b in zip(results[part], expected[part], strict=True)
        ]
        norms = torch.stack([b.double().norm() for b in expected[part]])
        return torch.stack(errors).norm() / norms.norm().clamp(min=1e-30)

    # Of a NaN and a number, this maximum is NaN.
    return torch.maximum(relative(slice(1)), relative(slice(1, None))).item()


def evaluate(problem, operator) -> list[torch.Tensor]:
    """Output and gradients, without their graph."""
    output = problem.run_forward(operator)
    return [output.detach(), *problem.run_backward(output)]
