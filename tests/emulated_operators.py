"""The CUDA kernels, emulated, in place of the CPU kernels of this process.

As a pytest plugin (``-p emulated_operators``) it makes the CPU kernels' tests run them; the
environment names the library (``HKD_EMULATED``) and a file for the names of the kernels that ran
(``HKD_EMULATED_RAN``). As a program it tries other orders of threads, dropped barriers and, built
with a mutation, whether that shows:

    python emulated_operators.py LIBRARY orders | barriers | compare
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path

SHUFFLED = 2
DIFFERS = 3  # the exit status of a process that has noticed a dropped barrier


class Emulator:
    """The emulator of a library of operators, loaded over the CPU kernels."""

    def __init__(self, library):
        import torch  # noqa: F401  before what is linked against it

        import hkd_d2._C  # noqa: F401  the schemas, and the kernels that are replaced

        self.library = ctypes.CDLL(str(library))
        self.library.hkd_emulator_ran.restype = ctypes.c_char_p
        self.configure(SHUFFLED)

    def configure(self, seed, dropped=("", 0)):
        """Set the order of threads and a barrier (end of a path, line) that does nothing."""
        file, line = dropped
        self.library.hkd_emulator_configure(ctypes.c_uint64(seed), str(file).encode(), int(line))

    def ran(self):
        """Names of the kernels that ran."""
        names = self.library.hkd_emulator_ran().decode().split("\n")
        return sorted({re.match(r"\(?(\w+)", name).group(1) for name in names if name})


# ---------------------------------------------------------------------------------- pytest plugin
def pytest_configure(config):
    config.emulator = Emulator(os.environ["HKD_EMULATED"])


def pytest_report_header(config):
    return "hkd_d2 operators: the CUDA kernels, emulated on the CPU, replace the CPU kernels"


def pytest_unconfigure(config):
    Path(os.environ["HKD_EMULATED_RAN"]).write_text(json.dumps(config.emulator.ran()))


# ---------------------------------------------------------------------------------------- program
def calls():
    """{name: function without arguments that returns tensors}: small calls, one of each kernel."""
    import torch

    from hkd_d2 import ops

    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    def with_gradients(loss, *leaves, **options):
        def call(impl):
            for leaf in leaves:
                leaf.requires_grad_()
            value = loss(impl)
            return [value.detach(), *torch.autograd.grad(3 * value, leaves)]

        return call

    found = _imitation_calls(randn, with_gradients)
    for dtype in (torch.float32, torch.float64, torch.float16):
        levels = [randn(n, dtype=dtype) for n in (4500, 0, 37)]
        probs = [torch.rand(len(x), generator=generator).to(dtype) for x in levels]
        ignore = [p > 0.9 for p in probs]
        found[f"adaptive {dtype}"] = with_gradients(
            lambda impl, x=levels, q=probs, i=ignore: ops.adaptive_distillation_loss(
                x, q, ignore=i, impl=impl
            ),
            *levels,
        )
        for classes in (1, 3, 50):
            rows = [randn(n, classes, dtype=dtype) for n in (300, 5)]
            targets = [randn(n, classes, dtype=dtype) for n in (300, 5)]
            weights = [torch.rand(n, generator=generator) for n in (300, 5)]
            for activation in ("softmax", "sigmoid"):
                found[f"kl {dtype} {classes} {activation}"] = with_gradients(
                    lambda impl, x=rows, t=targets, w=weights, a=activation: (
                        ops.kl_distillation_loss(x, t, weights=w, activation=a, impl=impl)
                    ),
                    *rows,
                )
        for size in (4, 3):
            student, teacher, target = (randn(1100, size, dtype=dtype) for _ in range(3))
            found[f"bounded {dtype} {size}"] = with_gradients(
                lambda impl, s=student, t=teacher, y=target: ops.bounded_regression_loss(
                    s, t, y, impl=impl
                ),
                student,
            )
    # More tensors than a launch takes.
    many = [randn(3, 2) for _ in range(40)]
    targets = [randn(3, 2) for _ in many]
    found["kl of many"] = with_gradients(
        lambda impl: ops.kl_distillation_loss(many, targets, impl=impl), *many
    )
    probs = [t.sigmoid() for t in targets]
    found["adaptive of many"] = with_gradients(
        lambda impl: ops.adaptive_distillation_loss(many, probs, impl=impl), *many
    )
    return found


def _imitation_calls(randn, with_gradients):
    """Those of feature imitation: a level of some strips, one of few cells, one that is adapted."""
    import torch

    from hkd_d2 import ops

    sizes = ((17, 20), (3, 5), (12, 13))
    boxes = [
        torch.tensor([[9.0, 6.0, 30.0, 70.0], [0.0, 0.0, 500.0, 500.0]]),
        torch.tensor([[40.0, 8.0, 60.0, 44.0]] * 300),  # more than a block has threads
    ]
    masked = {
        "boxes": boxes,
        "ignore_boxes": [b[:1] + 3 for b in boxes],
        "strides": [4.0, 8.0, 16.0],
        "assign_ignore": "all",
    }
    anchors = [torch.tensor([[8.0, 20.0], [30.0, 9.0]]) for _ in sizes]
    cases = {
        "mse": {**masked, "background_weight": 0.2},
        "l1": {**masked, "rasterize": "fgfi", "anchors": anchors, "anchor_offset": 0.5},
        "smooth_l1": {"spatial_weights": [randn(2, *size).relu() for size in sizes]},
        "cosine": masked,
        "pkd": {},
    }
    nchw, nhwc = torch.contiguous_format, torch.channels_last

    def pyramid(memory_format, channels, dtype):
        shapes = [(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
        return [randn(*shape, dtype=dtype).to(memory_format=memory_format) for shape in shapes]

    def imitation(student, teacher, weight, bias, distance, options):
        return lambda impl: ops.feature_imitation_loss(
            student,
            teacher,
            distance=distance,
            adapter=[None, None, (weight, bias)],
            impl=impl,
            **options,
        )

    found = {}
    for dtype in (torch.float32, torch.float64, torch.float16):
        for layouts in ((nchw, nchw), (nhwc, nhwc), (nchw, nhwc)):
            student = pyramid(layouts[0], (130, 5, 21), dtype)
            teacher = pyramid(layouts[1], (130, 5, 70), dtype)
            weight, bias = (randn(*shape, dtype=dtype) for shape in ((70, 21), (70,)))
            for distance, options in cases.items():
                if dtype == torch.float32 or distance not in ("l1", "smooth_l1"):
                    # What a bias adds is taken off again by pkd.
                    given = None if distance == "pkd" else bias
                    leaves = [x for x in (*student, weight, given) if x is not None]
                    found[f"imitation {distance} {dtype} {layouts}"] = with_gradients(
                        imitation(student, teacher, weight, given, distance, options), *leaves
                    )
    return found


def orders(emulator):
    """Names of the calls whose result depends on the order of threads and blocks."""
    import torch

    different = []
    for name, call in calls().items():
        emulator.configure(0)
        first = call("fused")
        for seed in (1, 2, 3):
            emulator.configure(seed)
            again = call("fused")
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                different.append(name)
                break
    return different


def barriers(emulator):
    """Whether each barrier of the kernels' text, dropped, changes a result or is told."""
    import torch
    from cuda_sources import CSRC

    emulator.configure(SHUFFLED)
    right = {name: call("fused") for name, call in calls().items()}

    def differs(path, number):
        for seed in (0, 1, 2, 3):
            emulator.configure(seed, (path, number))
            for name, call in calls().items():
                try:
                    result = call("fused")
                except RuntimeError:
                    return True
                if not all(torch.equal(a, b) for a, b in zip(result, right[name], strict=True)):
                    return True
        return False

    found = {}
    for path in sorted((*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"))):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"__sync(threads|warp)\(", line):
                # In a process of its own, which may crash: numbers that nobody wrote are places.
                child = os.fork()
                if child == 0:
                    os._exit(DIFFERS if differs(path.relative_to(CSRC), number) else 0)
                status = os.waitpid(child, 0)[1]
                told = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == DIFFERS
                found[f"{path.relative_to(CSRC)}:{number}"] = told
    return found


def compare(emulator):
    """Names of the calls whose result is not the definition's."""
    import torch

    wrong = []
    for name, call in calls().items():
        tolerance = 2e-3 if "float16" in name else 1e-5
        for a, b in zip(call("fused"), call("reference"), strict=True):
            largest = max(b.abs().flatten().tolist(), default=0)
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest):
                wrong.append(name)
                break
    return wrong


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[2]](Emulator(sys.argv[1]))))
