"""The CUDA kernels, emulated, in place of the CPU kernels of this process.

As a pytest plugin (``-p cuda_emulator.emulated_operators``) it makes the CPU kernels' tests run
them; the environment names the library (``HKD_EMULATED``) and a file for the names of the kernels
that ran (``HKD_EMULATED_RAN``). As a program it tries other orders of threads, dropped barriers
and, built with a mutation, whether that shows; with HKD_ROI_BACKWARD=scatter of the calls that it
concerns:

    python emulated_operators.py LIBRARY orders | deterministic_orders | launches | compare [FAMILY]
    python emulated_operators.py LIBRARY barriers [FILE:LINE ...]
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path

SHUFFLED = 2
SCATTER = os.environ.get("HKD_ROI_BACKWARD") == "scatter"


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

    def launches(self, call):
        """How many kernels a call launches."""
        before = self.library.hkd_emulator_launches()
        call()
        return self.library.hkd_emulator_launches() - before

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
def calls(family=None):
    """{name: function without arguments that returns tensors}: small calls, one of each kernel.

    Args:
        family (str | None): a folder of csrc/: its operators' alone.
    """
    import torch

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

    if SCATTER:
        return {name: call for name, call in roi_calls(randn).items() if "float32" in name}
    found = {}
    if family in ("feature_imitation", None):
        found |= imitation_calls(randn, with_gradients)
    if family in ("logit_distillation", None):
        found |= logit_calls(randn, with_gradients, generator)
    if family in ("roi_align", "roi_distillation", None):
        found |= roi_calls(randn)
    return found


def logit_calls(randn, with_gradients, generator):
    """Calls of the logit losses."""
    import torch

    from hkd_d2 import ops

    found = {}
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


def roi_calls(randn):
    """Calls of the RoI operators.

    Together they have more RoIs than a block looks at together, on one level and image; more bins
    than a tile; boxes with more samples than a pass, beside the map, upside down and not finite.
    """
    import torch

    from hkd_d2 import ops

    def boxes_of(count, side):
        corner = randn(count, 2) * 30 + 30
        odd = [[-80.0, 3.0, 300.0, 90.0], [60.0, 60.0, 20.0, 30.0], [float("nan"), 0.0, 9.0, 9.0]]
        return torch.cat(
            [
                torch.cat([corner, corner + side * (1 + randn(count, 2) ** 2)], 1),
                torch.tensor([*odd, [900.0, 900.0, 950.0, 950.0]]),
            ]
        )

    def maps(dtype, channels_last, channels, sizes, images=2):
        memory = torch.channels_last if channels_last else torch.contiguous_format
        return [
            randn(images, channels, *size, dtype=dtype).contiguous(memory_format=memory)
            for size in sizes
        ]

    def pooling(features, boxes, upstream, **options):
        def call(impl):
            leaves = [m.detach().requires_grad_() for m in features]
            pooled = ops.multilevel_roi_align(leaves, boxes, impl=impl, **options)
            return [pooled.detach(), *torch.autograd.grad(pooled, leaves, upstream)]

        return call

    found = {}
    sizes, strides = [(21, 35), (10, 17)], [4, 8]
    for dtype in (torch.float32, torch.float64, torch.float16):
        for channels_last in (False, True):
            for channels, count, bins, ratio in ((5, 12, (7, 7), 0), (72, 4, (3, 10), 2)):
                boxes = [boxes_of(count, 20.0), boxes_of(3, 70.0)]
                features = maps(dtype, channels_last, channels, sizes)
                rows = sum(map(len, boxes))
                found[f"pooling {dtype} {channels_last} {channels}"] = pooling(
                    features,
                    boxes,
                    randn(rows, channels, *bins, dtype=dtype),
                    strides=strides,
                    output_size=bins,
                    sampling_ratio=ratio,
                )
    found["pooling of many boxes, float32"] = pooling(
        maps(torch.float32, False, 3, sizes),
        [boxes_of(600, 10.0), boxes_of(300, 10.0)],
        randn(908, 3, 2, 2),
        strides=strides,
        output_size=2,
    )
    found["pooling of many images, float32"] = pooling(
        maps(torch.float32, False, 2, [(4, 5)], images=70),
        [boxes_of(1, 10.0) for _ in range(70)],
        randn(350, 2, 2, 2),
        strides=[4],
        output_size=2,
    )

    def distilling(student, teacher, boxes, adapters, **options):
        leaves = [*student, *(x for pair in adapters or [] for x in pair or () if x is not None)]

        def call(impl):
            for leaf in leaves:
                leaf.requires_grad_()
            loss = ops.roi_distillation_loss(
                student, teacher, boxes, strides=strides, adapter=adapters, impl=impl, **options
            )
            return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]

        return call

    # Boxes of which some pool to 0 would make a cosine's gradient divide by 1e-8.
    inside = [torch.tensor([[3.0, 5.0, 90.0, 60.0], [20.0, 9.0, 44.0, 77.0]]).repeat(20, 1)] * 2
    for dtype in (torch.float32, torch.float64, torch.float16):
        for channels, wide, distance, channels_last in (
            (5, 5, "mse", False),
            (72, 72, "smooth_l1", True),
            (5, 70, "l1", True),
            (5, 5, "cosine", False),
            (70, 5, "cosine", True),
        ):
            boxes = inside if distance == "cosine" else [boxes_of(9, 20.0), boxes_of(3, 70.0)]
            weights = [randn(wide, channels, dtype=dtype) for _ in sizes]
            biases = [randn(wide, dtype=dtype), None]
            found[f"distilling {dtype} {distance} {channels}"] = distilling(
                maps(dtype, channels_last, channels, sizes),
                maps(dtype, False, wide, sizes),
                boxes,
                None if channels == wide else list(zip(weights, biases, strict=True)),
                output_size=(3, 9) if distance == "smooth_l1" else 3,
                distance=distance,
            )
    # Levels of both routes, which add to their own maps alone.
    found["distilling levels of both routes, float32"] = distilling(
        maps(torch.float32, True, 8, sizes),
        maps(torch.float32, True, 8, sizes),
        [boxes_of(9, 20.0), boxes_of(3, 70.0)],
        [(randn(8, 8), randn(8)), None],
        output_size=3,
    )
    # More boxes than a slice of the sum over boxes has.
    found["distilling many boxes, float32"] = distilling(
        maps(torch.float32, True, 3, sizes),
        maps(torch.float32, True, 4, sizes),
        [boxes_of(60, 20.0), boxes_of(20, 20.0)],
        [(randn(4, 3), randn(4)), (randn(4, 3), randn(4))],
        output_size=2,
    )
    return found


def imitation_calls(randn, with_gradients):
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


def deterministic_orders(emulator):
    """The same where PyTorch is asked for deterministic algorithms."""
    import torch

    torch.use_deterministic_algorithms(True)
    return orders(emulator)


def is_same(a, b):
    """Whether two results of a call agree: in every bit, or but for the order of scattered sums."""
    import torch

    largest = max(b.abs().nan_to_num(0, 0, 0).flatten().tolist(), default=0)
    close = torch.allclose(a, b, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)
    return close if SCATTER else torch.equal(a, b)


def is_noticed(emulator, dropped, right):
    """Whether some call tells that a barrier is dropped, or gives another result than is right."""
    for seed in (0, 1, 2, 3):
        emulator.configure(seed, dropped)
        for name, call in calls().items():
            try:
                result = call("fused")
            except RuntimeError:
                return True
            if not all(map(is_same, result, right[name])):
                return True
    return False


def in_child(answer):
    """What ``answer()`` returns in a process of its own; True where that crashes.

    Without a barrier an index may be one that nothing has been written to.
    """
    child = os.fork()
    if child == 0:
        os._exit(0 if answer() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1


def barriers(emulator, *places):
    """Whether barriers of the kernels' text (all), dropped, change a result or are told."""
    from cuda_emulator.cuda_sources import CSRC

    emulator.configure(SHUFFLED)
    right = {name: call("fused") for name, call in calls().items()}

    found = {}
    for path in sorted((*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"))):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            dropped = path.relative_to(CSRC), number
            place = f"{dropped[0]}:{number}"
            if not re.search(r"__sync(threads|warp)\(", line) or (places and place not in places):
                continue
            found[place] = in_child(lambda d=dropped: is_noticed(emulator, d, right))
    return found


def launches(emulator):
    """{logit loss: [launches forward, launches backward]} in the sizes that training has."""
    import torch

    from hkd_d2 import ops

    def dense(*shapes):
        return [torch.rand(shape) for shape in shapes]

    def box_head(images):
        rows = 512 * images  # sampled boxes
        return {
            f"kl, {images} images": (
                lambda s: ops.kl_distillation_loss(s, torch.rand(rows, 2), impl="fused"),
                torch.rand(rows, 2),
            ),
            f"bounded, {images} images": (
                lambda s: ops.bounded_regression_loss(s, s + 1, s - 1, impl="fused"),
                torch.rand(rows, 4),
            ),
        }

    anchors = [(2, n, 1) for n in (6000, 1500, 400)]
    targets = dense(*anchors)
    losses = {
        **box_head(2),
        **box_head(4),
        "dense kl": (
            lambda s: ops.kl_distillation_loss(s, targets, activation="sigmoid", impl="fused"),
            dense(*anchors),
        ),
        "adaptive": (
            lambda s: ops.adaptive_distillation_loss(s, targets, impl="fused"),
            dense(*anchors),
        ),
    }
    found = {}
    for name, (loss, student) in losses.items():
        leaves = student if isinstance(student, list) else [student]
        for leaf in leaves:
            leaf.requires_grad_()
        value = []
        forward = emulator.launches(lambda f=loss, s=student, v=value: v.append(f(s)))
        backward = emulator.launches(lambda v=value, x=leaves: torch.autograd.grad(v[0], x))
        found[name] = [forward, backward]
    return found


def compare(emulator, family=None):
    """Names of the calls, of one family or all, whose result is not the reference's."""
    import torch

    wrong = []
    for name, call in calls(family).items():
        tolerance = 2e-3 if "float16" in name else 1e-5
        for a, b in zip(call("fused"), call("reference"), strict=True):
            largest = max(b.abs().flatten().tolist(), default=0)
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest):
                wrong.append(name)
                break
    return wrong


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[2]](Emulator(sys.argv[1]), *sys.argv[3:])))
