"""The row-wise losses: by hand, published values, gradients; compiled against the definition."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from hkd_d2.ops import (
    _library,
    adaptive_distillation_loss,
    bounded_regression_loss,
    kl_distillation_loss,
)

IMPLS = ["fused", "reference"]
HALF_AND_FULL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Student p = (3/4, 1/4), teacher q = (1/2, 1/2): KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
LN3, KL = math.log(3), 0.5 * math.log(4 / 3)


def random_logits(rows, classes, dtype=torch.float64, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pair = [
        torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
        for _ in range(2)
    ]
    return [x.to(dtype) for x in pair]


# ------------------------------------------------------------------------------------------ KL
def test_the_cpu_kernel_is_compiled():
    assert ("kl_distillation_loss", "cpu") in _library.COMPILED


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "student, teacher, options, expected",
    [
        ([[LN3, 0.0]], [[0.0, 0.0]], {}, KL),
        # logits over T = 2 are those above; T^2 = 4
        ([[2 * LN3, 0.0]], [[0.0, 0.0]], {"temperature": 2.0}, 4 * KL),
        # one Bernoulli variable with q = 1/2, p = 3/4, and a second where both are 1/2
        ([[LN3, 0.0]], [[0.0, 0.0]], {"activation": "sigmoid"}, KL),
        ([[2 * LN3] * 3], [[0.0] * 3], {"activation": "sigmoid", "temperature": 2.0}, 12 * KL),
        # mean of KL and 0
        ([[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 2, {}, KL / 2),
        # (2 KL + 1 * 0) / (2 + 1)
        ([[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 2, {"weights": [2.0, 1.0]}, 2 * KL / 3),
        # weights of 1/4 add up to less than 1, which divides
        ([[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 2, {"weights": [0.25, 0.25]}, KL / 4),
        # the teacher excludes the third class: it contributes 0
        ([[LN3, 0.0, -60.0]], [[0.0, 0.0, -math.inf]], {}, KL),
        # and so does the student
        ([[LN3, 0.0, -math.inf]], [[0.0, 0.0, -math.inf]], {}, KL),
        # the teacher is sure: q = (1, 0), KL = ln(4/3)
        ([[LN3, 0.0]], [[math.inf, 0.0]], {"activation": "sigmoid"}, math.log(4 / 3)),
    ],
)
def test_kl_by_hand(student, teacher, options, expected, impl):
    if "weights" in options:
        options = {**options, "weights": torch.tensor(options["weights"])}
    loss = kl_distillation_loss(
        torch.tensor(student, dtype=torch.float64),
        torch.tensor(teacher, dtype=torch.float64),
        impl=impl,
        **options,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_kl_gradcheck(activation, weighted, impl):
    student, teacher = random_logits(5, 4)
    weights = torch.tensor([0.0, 0.5, 2.0, 1.0, 0.1]) if weighted else None

    def loss(x):
        return kl_distillation_loss(
            x, teacher, temperature=1.7, weights=weights, activation=activation, impl=impl
        )

    assert gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows, classes", [(1, 1), (300, 2), (257, 81), (3, 9000)])
def test_compiled_kl_is_as_exact_as_pytorch(rows, classes, activation, dtype):
    """At most twice the error of the definition at the same precision, both against float64."""
    student, teacher = random_logits(rows, classes, dtype)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    options = {"temperature": 2.0, "weights": weights, "activation": activation}

    def run(impl, dtype):
        x = student.to(dtype).requires_grad_()
        loss = kl_distillation_loss(x, teacher.to(dtype), impl=impl, **options)
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(3.0).to(loss))
        return loss.detach(), gradient

    exact, exact_gradient = run("reference", torch.float64)
    fused, fused_gradient = run("fused", dtype)
    eager, eager_gradient = run("reference", dtype)
    assert fused.dtype == torch.float32 and fused_gradient.dtype == dtype
    # One unit in the last place of the result is always allowed.
    unit = torch.finfo(fused.dtype).eps * exact.abs()
    assert (fused - exact).abs() <= 2 * (eager - exact).abs() + 4 * unit
    error = (fused_gradient.double() - exact_gradient).norm()
    eager_error = (eager_gradient.double() - exact_gradient).norm()
    assert error <= 2 * eager_error + torch.finfo(dtype).eps * exact_gradient.norm() / 4

    # In float64 both are exact but for rounding.
    double, double_gradient = run("fused", torch.float64)
    torch.testing.assert_close(double, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(double_gradient, exact_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("student_dtype", HALF_AND_FULL)
@pytest.mark.parametrize("teacher_dtype", HALF_AND_FULL)
def test_compiled_kl_reads_each_side_as_stored(student_dtype, teacher_dtype):
    student, teacher = random_logits(20, 5)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    fused, plain = (kl_distillation_loss(student, teacher, impl=impl) for impl in IMPLS)
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_kl_of_any_leading_shape_and_strides(activation, impl):
    student, teacher = random_logits(24, 5)
    flat = kl_distillation_loss(student, teacher, activation=activation, impl=impl)
    x = student.view(2, 3, 4, 5).movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    assert not x.is_contiguous()
    strided = torch.stack([teacher, teacher], -1)[..., 0].view(2, 3, 4, 5)
    weights = torch.ones(2, 4, 3).transpose(1, 2)
    loss = kl_distillation_loss(x, strided, weights=weights, activation=activation, impl=impl)
    torch.testing.assert_close(loss, flat, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss, x)
    leaf = student.clone().requires_grad_()
    loss = kl_distillation_loss(leaf, teacher, activation=activation, impl=impl)
    torch.testing.assert_close(gradient.reshape(24, 5), torch.autograd.grad(loss, leaf)[0])
    # A single row without leading axes.
    assert kl_distillation_loss(student[0], teacher[0], impl=impl).item() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_kl_of_nothing_is_zero_with_a_graph(activation, shape, impl):
    student = torch.zeros(shape, requires_grad=True)
    for weights in (None, torch.ones(shape[:-1])):
        loss = kl_distillation_loss(
            student, torch.zeros(shape), weights=weights, activation=activation, impl=impl
        )
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].shape == shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", [0, 1])
def test_kl_lets_nan_through(side, impl):
    logits = random_logits(4, 3)
    logits[side][1, 2] = float("nan")
    for activation in ("softmax", "sigmoid"):
        x = logits[0].clone().requires_grad_()
        loss = kl_distillation_loss(x, logits[1], activation=activation, impl=impl)
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient[1].isnan().any() and gradient[0].isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_compiled_kl_does_not_depend_on_the_number_of_threads(activation):
    student, teacher = random_logits(5000, 7, torch.float32)
    weights = torch.rand(5000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = student.clone().requires_grad_()
            loss = kl_distillation_loss(
                x, teacher, weights=weights, activation=activation, impl="fused"
            )
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_kl_gives_the_teacher_and_the_weights_no_gradient():
    for impl in IMPLS:
        student, teacher = (x.requires_grad_() for x in random_logits(4, 3))
        weights = torch.ones(4, requires_grad=True)
        kl_distillation_loss(student, teacher, weights=weights, impl=impl).backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None and weights.grad is None


def opcheck_inputs():
    for dtype in HALF_AND_FULL:
        student, teacher = random_logits(6, 3, dtype)
        loss_dtype = torch.promote_types(dtype, torch.float32)
        yield student.requires_grad_(), teacher, torch.rand(6, dtype=loss_dtype), 2.0, False
        yield student.detach().T, teacher.T, None, 1.0, True
    yield torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3), None, 1.0, False


@pytest.mark.parametrize("inputs", list(opcheck_inputs()), ids=lambda i: f"{i[0].dtype}-{i[4]}")
def test_opcheck(inputs):
    torch.library.opcheck(torch.ops.hkd_d2.kl_distillation_loss.default, inputs)
    grad = torch.ones((), dtype=torch.promote_types(inputs[0].dtype, torch.float32))
    inputs = (grad, inputs[0].detach(), *inputs[1:])
    torch.library.opcheck(torch.ops.hkd_d2.kl_distillation_loss_backward.default, inputs)


def test_compiled_kl_has_no_second_derivative():
    student, teacher = random_logits(4, 3)
    loss = kl_distillation_loss(student.requires_grad_(), teacher, impl="fused")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; pass impl='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_compile_in_one_graph(impl):
    student, teacher = random_logits(6, 3)

    def step(x):
        return 2 * kl_distillation_loss(x, teacher, temperature=2.0, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = (student.clone().requires_grad_() for _ in range(2))
    compiled(a).backward()
    step(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_a_gpu_call_is_traced_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student = torch.empty(5, 3, device="cuda", dtype=torch.float16)
        loss = torch.ops.hkd_d2.kl_distillation_loss(student, student, None, 1.0, False)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"


def test_autocast_changes_nothing():
    student, teacher = random_logits(6, 3, torch.float32)
    for impl in IMPLS:
        plain = kl_distillation_loss(student, teacher, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kl_distillation_loss(student, teacher, impl=impl), plain)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher_logits": torch.zeros(4, 2)}, r"\(4, 3\) and teacher_logits is \(4, 2\)"),
        ({"student_logits": torch.zeros(4, 3).long()}, "student_logits is torch.int64"),
        ({"weights": torch.zeros(3)}, r"weights is \(3,\); .* make it \(4,\)"),
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose from softmax, sigmoid"),
    ],
)
def test_kl_errors_name_the_argument(change, message, impl):
    arguments = {"student_logits": torch.zeros(4, 3), "teacher_logits": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=message):
        kl_distillation_loss(**{**arguments, **change}, impl=impl)


# ---------------------------------------------------------------------------------- adaptive loss
@pytest.mark.parametrize(
    "outer, x, q, loss, gradient",
    [
        # values of the released kernel's formula at gamma 2, alpha 0.5, beta_c 0
        ("bce", 0.3, 0.7, 0.072691041, -0.034339735),
        ("bce", -4.0, 0.01, 0.000092787, 0.000037496),
        # values of the paper's form at beta 1
        ("kl", 0.3, 0.7, 0.007556364, None),
        ("kl", -4.0, 0.01, 0.000006856, None),
    ],
)
def test_adl_reference_values(outer, x, q, loss, gradient):
    logit = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = adaptive_distillation_loss(logit, torch.tensor([q], dtype=torch.float64), outer=outer)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    if gradient is not None:
        assert logit.grad.item() == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize(
    "gamma, alpha, beta_c", [(2.0, 0.5, 0.0), (1.0, 0.25, 1.0), (0.5, 0.3, 0.4)]
)
def test_adl_gradient_by_its_closed_form(gamma, alpha, beta_c):
    # dl/dx = -(gamma A^(gamma-1) e^-D (p-q) S + A^gamma (alpha q (1-p) - (1-alpha) (1-q) p)),
    # S = alpha q ln p + (1-alpha) (1-q) ln(1-p)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.rand(200, generator=generator, dtype=torch.float64)
    adaptive_distillation_loss(
        x, q, gamma=gamma, alpha=alpha, beta_c=beta_c, normalizer=None
    ).backward()
    p = x.detach().sigmoid()
    s = alpha * q * p.log() + (1 - alpha) * (1 - q) * (1 - p).log()
    d = -(q * p.log() + (1 - q) * (1 - p).log())
    d = d + beta_c * (q * q.log() + (1 - q) * (1 - q).log())
    a = 1 - torch.exp(-d)
    expected = -gamma * a ** (gamma - 1) * torch.exp(-d) * (p - q) * s
    expected = expected - a**gamma * (alpha * q * (1 - p) - (1 - alpha) * (1 - q) * p)
    torch.testing.assert_close(x.grad, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("outer", ["bce", "kl"])
def test_adl_gradcheck(outer):
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.randn(n, 2, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 3)
    ]
    probs = [torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (4, 3)]
    assert gradcheck(lambda *x: adaptive_distillation_loss(list(x), probs, outer=outer), levels)


def test_adl_normaliser_and_ignored_elements():
    # Four elements with q = 1: sum q^theta = 4 for every theta, ignored ones included. With gamma 0
    # and alpha 1 an element is -ln p, at x = 0 ln 2.
    logits, probs = torch.zeros(2, 2), torch.ones(2, 2)
    options = {"gamma": 0.0, "alpha": 1.0}
    ln2 = math.log(2)
    assert adaptive_distillation_loss(logits, probs, **options).item() == pytest.approx(ln2)
    total = adaptive_distillation_loss(logits, probs, normalizer=None, **options)
    assert total.item() == pytest.approx(4 * ln2)
    ignore = torch.tensor([[True, False], [False, False]])
    part = adaptive_distillation_loss(logits, probs, ignore=ignore, **options)
    assert part.item() == pytest.approx(3 * ln2 / 4)
    # Lists are one sum: levels of one and three elements are the same as all four.
    split = adaptive_distillation_loss(
        [logits[0, :1], logits.flatten()[1:]], [probs[0, :1], probs.flatten()[1:]], **options
    )
    assert split.item() == pytest.approx(ln2)
    # A small sum of q^theta is taken as 1.
    small = torch.full((2, 2), 0.1)
    assert torch.equal(
        adaptive_distillation_loss(logits, small),
        adaptive_distillation_loss(logits, small, normalizer=None),
    )


@pytest.mark.parametrize("outer", ["bce", "kl"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta_c", [0.0, 1.0])
def test_adl_is_finite_where_logarithms_and_powers_are_not(beta_c, gamma, outer):
    # q of exactly 0 and 1, a student that agrees exactly (A = 0), extreme logits, float32
    x = torch.tensor([0.0, 0.0, 0.0, 90.0, -90.0, 90.0, -90.0, 200.0], requires_grad=True)
    q = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.5])
    loss = adaptive_distillation_loss(x, q, gamma=gamma, beta_c=beta_c, outer=outer)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_adl_of_nothing_is_zero_with_a_graph():
    x = torch.randn(3, requires_grad=True)
    loss = adaptive_distillation_loss(x, torch.rand(3), ignore=torch.ones(3, dtype=torch.bool))
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].tolist() == [0, 0, 0]
    empty = torch.zeros(0, 2, requires_grad=True)
    assert adaptive_distillation_loss(empty, torch.zeros(0, 2)).item() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"teacher_probs": torch.zeros(3)},
            r"teacher_probs\[0\] is \(3,\) and student_logits\[0\]",
        ),
        ({"teacher_probs": [torch.zeros(2)] * 2}, "teacher_probs has 2 tensors and .* 1"),
        ({"ignore": torch.zeros(2)}, r"ignore\[0\] is torch.float32; give torch.bool"),
        ({"outer": "mse"}, "outer is 'mse'; choose from bce, kl"),
        ({"normalizer": "mean"}, "normalizer is 'mean'; choose from theta, None"),
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"student_logits": []}, "student_logits is an empty list"),
    ],
)
def test_adl_errors_name_the_argument(change, message):
    arguments = {"student_logits": torch.zeros(2), "teacher_probs": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        adaptive_distillation_loss(**{**arguments, **change})


# ------------------------------------------------------------------------------ bounded regression
def test_bounded_regression_by_hand():
    # squared errors of the student against target 0: 1, 4, 0.25 and 0.25;
    # of the teacher: 2 (the student is better, beyond the margin), 1, 0.255 and 0.27
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.5, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.255**0.5], [0.0, 0.27**0.5]])
    target = torch.zeros(4, 2)
    # 4 + 0.25 (within the margin of 0.01) of 4 boxes
    loss = bounded_regression_loss(student, teacher, target)
    assert loss.item() == pytest.approx(4.25 / 4)
    loss.backward()
    # 2 s / 4 for the boxes that count
    assert student.grad.tolist() == [[0, 0], [0, 1.0], [0.25, 0], [0, 0]]
    for options, expected in [
        ({"margin": 0.0}, 4 / 4),
        ({"margin": 2.0}, 5.5 / 4),
        ({"normalizer": 8}, 4.25 / 8),
        ({"normalizer": torch.tensor(0.5)}, 4.25),
    ]:
        value = bounded_regression_loss(student, teacher, target, **options)
        assert value.item() == pytest.approx(expected)


def test_bounded_regression_without_boxes_and_with_wrong_shapes():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = bounded_regression_loss(empty, torch.zeros(0, 4), torch.zeros(0, 4))
    assert loss.item() == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 4)
    with pytest.raises(ValueError, match=r"teacher_deltas is \(2, 3\)"):
        bounded_regression_loss(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"target_deltas is \(1, 4\)"):
        bounded_regression_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(1, 4))


def test_bounded_regression_gradcheck():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    assert gradcheck(
        lambda s: bounded_regression_loss(s, deltas[1], deltas[2]), deltas[0].requires_grad_()
    )
