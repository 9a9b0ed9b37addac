"""What only a GPU shows: streams, graphs, determinism, host synchronisation, memory, huge tensors.

That the kernels compute the right numbers, in every dtype and layout, is for the CPU kernels' tests
to say, on the GPU too: ``pytest -p cuda_emulator.operators_on_gpu tests/ops``. As a program this
file runs every operator once, for compute-sanitizer.
"""

import functools

import pytest
import torch

from hkd_d2 import ops
from hkd_d2.ops import _library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRIDES = [4, 8, 16, 32]


def maps(channels=64, dtype=torch.float32, seed=0, channels_last=True):
    generator = torch.Generator("cuda").manual_seed(seed)
    format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(2, channels, 64 >> i, 96 >> i, device="cuda", generator=generator)
        .to(dtype)
        .contiguous(memory_format=format)
        for i in range(4)
    ]


def boxes():
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(2, 60, 2, generator=generator) * torch.tensor([340.0, 220.0])
    size = torch.exp(torch.rand(2, 60, 2, generator=generator) * 4 + 1)
    return list(torch.cat([corner, corner + size], 2).cuda())


def logits(classes, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (50000,) if classes is None else (50000, classes)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def adapter():
    generator = torch.Generator("cuda").manual_seed(7)
    return [
        torch.randn(*shape, device="cuda", generator=generator) / 8 for shape in ((64, 64), (64,))
    ]


def calls(dtype=torch.float32, channels_last=True):
    """{name: (function of leaves, leaves)}: every operator, small, on the GPU."""
    student, teacher = (maps(64, dtype, seed, channels_last) for seed in (1, 2))
    rois = boxes()
    weight, bias = (x.to(dtype) for x in adapter())
    classes = [logits(5, dtype, seed) for seed in (1, 2)]
    objectness = [logits(None, dtype, 1), logits(None, dtype, 2).sigmoid()]
    deltas = [logits(4, dtype, seed) for seed in (1, 2, 3)]
    found = {
        "imitation dense": (lambda x: ops.feature_imitation_loss(x, teacher), student),
        "roi_align": (
            lambda x: ops.multilevel_roi_align(x, rois, strides=STRIDES).float().square().mean(),
            student,
        ),
        "kl": (lambda x: ops.kl_distillation_loss(x[0], classes[1]), classes[:1]),
        "cross-entropy": (lambda x: ops.soft_cross_entropy_loss(x[0], classes[1]), classes[:1]),
        "adaptive": (lambda x: ops.adaptive_distillation_loss(x[0], objectness[1]), objectness[:1]),
        "bounded": (lambda x: ops.bounded_regression_loss(x[0], *deltas[1:]), deltas[:1]),
    }
    for distance in ("mse", "cosine", "pkd"):
        options = {} if distance == "pkd" else {"boxes": rois, "strides": STRIDES}
        found[f"imitation {distance}"] = (
            lambda x, d=distance, o=options: ops.feature_imitation_loss(
                x, teacher, distance=d, **o
            ),
            student,
        )
    for distance in ("mse", "cosine"):
        found[f"roi {distance}"] = (
            lambda x, d=distance: ops.roi_distillation_loss(
                x, teacher, rois, strides=STRIDES, distance=d
            ),
            student,
        )
    found["imitation adapted"] = (
        lambda x: ops.feature_imitation_loss(
            x[:4], teacher, boxes=rois, strides=STRIDES, adapter=[tuple(x[4:])] * 4
        ),
        [*student, weight, bias],
    )
    found["roi adapted"] = (
        lambda x: ops.roi_distillation_loss(
            x[:4], teacher, rois, strides=STRIDES, adapter=[tuple(x[4:])] * 4
        ),
        [*student, weight, bias],
    )
    return found


every_call = pytest.mark.parametrize("name", list(calls()) if torch.cuda.is_available() else [None])


def run(function, leaves):
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_every_operator_has_a_cuda_kernel():
    assert {(name, "cuda") for name in _library.OPERATORS} <= _library.COMPILED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_call
def test_the_same_in_every_run(name, dtype):
    function, leaves = calls(dtype)[name]
    first = run(function, leaves)
    for _ in range(3):
        assert all(map(torch.equal, run(function, leaves), first))


@every_call
def test_nothing_waits_for_the_gpu(name):
    function, leaves = calls()[name]
    run(function, leaves)  # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_on_the_current_stream(name):
    """The inputs become what they are only after a while, on the stream that the operator joins."""
    function, leaves = calls()[name]
    expected = run(function, leaves)
    late = [torch.zeros_like(x) for x in leaves]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, leaves, strict=True):
            x.copy_(value)
        got = run(function, late)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@every_call
def test_in_a_cuda_graph(name):
    function, leaves = calls()[name]
    static = [x.clone() for x in leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(function, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, static)
    changed = [x + 0.25 for x in leaves]
    expected = run(function, changed)
    for x, value in zip(static, changed, strict=True):
        x.copy_(value)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@every_call
def test_compiles_without_a_graph_break(name):
    function, leaves = calls()[name]
    expected = run(function, leaves)
    got = run(torch.compile(function, fullgraph=True), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_under_a_gradient_scaler():
    """Half precision gradients are those of the scaled loss, divided again."""
    function, leaves = calls(torch.float16)["imitation mse"]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    leaves = [x.detach().requires_grad_() for x in leaves]
    scaled = torch.autograd.grad(scaler.scale(function(leaves)), leaves)
    exact = run(function, [x.double() for x in leaves])[1:]
    for got, expected in zip(scaled, exact, strict=True):
        got = got.double() / scaler.get_scale()
        assert (got - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("name", ["imitation mse", "roi mse", "roi_align"])
def test_memory_beyond_the_gradients(name, channels_last):
    """Less than a hundredth of the maps."""
    teacher = [torch.randn(2, 256, 256 >> i, 512 >> i, device="cuda") for i in range(4)]
    if channels_last:
        teacher = [m.to(memory_format=torch.channels_last) for m in teacher]
    leaves = [m.clone().requires_grad_() for m in teacher]
    rois = [4 * b for b in boxes()]
    function = {
        "imitation mse": lambda: ops.feature_imitation_loss(
            leaves, teacher, boxes=rois, strides=STRIDES
        ),
        "roi mse": lambda: ops.roi_distillation_loss(leaves, teacher, rois, strides=STRIDES),
        "roi_align": lambda: ops.multilevel_roi_align(leaves, rois, strides=STRIDES),
    }[name]
    bytes_of_maps = sum(m.nbytes for m in leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = function()
    forward = torch.cuda.max_memory_allocated() - before - output.nbytes
    upstream = torch.ones_like(output)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(output, leaves, upstream)
    backward = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    assert max(forward, backward) < 0.01 * bytes_of_maps


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
def test_more_elements_than_an_int_counts(channels_last):
    """The last cells of maps of more than 2^31 elements are read and get their gradient."""
    side = 2912
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (1, 256, side, side)
    student = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=format)
    assert student.numel() > 2**31
    teacher = torch.zeros_like(student)
    teacher[..., -8:, -8:] = 1
    student.requires_grad_()
    end = 4.0 * side
    rois = [torch.tensor([[end - 32, end - 32, end, end]], device="cuda")]
    imitation = functools.partial(ops.feature_imitation_loss, boxes=rois, strides=[4])
    region = functools.partial(ops.roi_distillation_loss, boxes=rois, strides=[4])
    for loss in (imitation([student], [teacher]), region([student], [teacher])):
        (gradient,) = torch.autograd.grad(loss, [student])
        assert gradient[0, :, -4:, -4:].abs().min() > 0
        assert gradient[0, :, :64, :64].abs().max() == 0
        del gradient


if __name__ == "__main__":
    for channels_last in (True, False):
        for name, (function, leaves) in calls(channels_last=channels_last).items():
            print(name, run(function, leaves)[0].item())
