"""The logit losses: by hand, published values, gradients; fused against the reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.comparisons import (
    HALF_AND_FULL,
    IMPLS,
    assert_as_exact,
    assert_one_operator_each_way,
    assert_same_for_any_number_of_threads,
    loss_and_gradients,
)
from torch.autograd import gradcheck

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from helpers.command import run_code
from helpers.rules import rule
from hkd_d2.ops import (
    _library,
    adaptive_distillation_loss,
    bounded_regression_loss,
    kl_distillation_loss,
    soft_cross_entropy_loss,
)

OPERATORS = [
    "adaptive_distillation_loss",
    "bounded_regression_loss",
    "kl_distillation_loss",
    "soft_cross_entropy_loss",
]
ROW_LOSSES = [kl_distillation_loss, soft_cross_entropy_loss]
ACTIVATIONS = ["softmax", "sigmoid"]
# Student p = (3/4, 1/4), teacher q = (1/2, 1/2): KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
LN3, KL = math.log(3), 0.5 * math.log(4 / 3)
# and the halves of the cross-entropy, 1/2 ln(4/3) and 1/2 ln 4
CE = 0.5 * math.log(4 / 3), 0.5 * math.log(4)


def random_logits(rows, classes, dtype=torch.float64, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pair = [
        torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
        for _ in range(2)
    ]
    return [x.to(dtype) for x in pair]


def random_levels(sizes, dtype=torch.float64, seed=0):
    """Logits of a dense detector, mostly background, and a teacher's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    draws = [
        [torch.randn(s, generator=generator, dtype=torch.float64) * 2 - 3 for s in sizes]
        for _ in range(2)
    ]
    return [x.to(dtype) for x in draws[0]], [x.sigmoid().to(dtype) for x in draws[1]]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cpu_kernels_are_compiled(name):
    assert (name, "cpu") in _library.COMPILED


# ---------------------------------------------------------------------- KL and soft cross-entropy
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
@pytest.mark.parametrize(
    "student, options, expected",
    [
        ([[LN3, 0.0]], {}, CE[0] + CE[1]),
        ([[2 * LN3, 0.0]], {"temperature": 2.0}, 4 * (CE[0] + CE[1])),
        # background, the last class, counts 1.5 times
        ([[LN3, 0.0]], {"class_weights": [1.0, 1.5]}, CE[0] + 1.5 * CE[1]),
        # a class weight does not divide; (2 ... + 1 ln 2 with weights 0 and 3 of two equal classes)
        (
            [[LN3, 0.0], [0.0, 0.0]],
            {"class_weights": [0.0, 3.0], "weights": [2.0, 1.0]},
            (2 * 3 * CE[1] + 3 * 0.5 * math.log(2)) / 3,
        ),
        # the student excludes a class without weight
        ([[-math.inf, 0.0]], {"class_weights": [0.0, 1.0]}, 0.0),
        # p = 3/4 and q = 1/2 in the first class: both halves; the second is ln 2, weighted 1.5
        (
            [[LN3, 0.0]],
            {"activation": "sigmoid", "class_weights": [1.0, 1.5]},
            CE[0] + CE[1] + 1.5 * math.log(2),
        ),
    ],
)
def test_soft_cross_entropy_by_hand(student, options, expected, impl):
    tensors = ("class_weights", "weights")
    options = {k: torch.tensor(v) if k in tensors else v for k, v in options.items()}
    student = torch.tensor(student, dtype=torch.float64)
    loss = soft_cross_entropy_loss(student, torch.zeros_like(student), impl=impl, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_soft_cross_entropy_gradient_by_its_closed_form():
    # dL/dx_j = T (p_j sum_k c_k q_k - c_j q_j) / R
    (student, teacher), c = random_logits(7, 5), torch.rand(5, dtype=torch.float64)
    p, q = ((x / 1.7).softmax(-1) for x in (student, teacher))
    expected = 1.7 * (p * (c * q).sum(-1, keepdim=True) - c * q) / 7
    for impl in IMPLS:
        _, (gradient,) = loss_and_gradients(
            lambda x, impl=impl: soft_cross_entropy_loss(
                x[0], teacher, temperature=1.7, class_weights=c, impl=impl
            ),
            [student],
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", ROW_LOSSES)
def test_row_losses_gradcheck(function, activation, weighted, impl):
    student, teacher = random_logits(5, 4)
    options = {"temperature": 1.7, "activation": activation, "impl": impl}
    if weighted:
        options["weights"] = torch.tensor([0.0, 0.5, 2.0, 1.0, 0.1])
    if weighted and function is soft_cross_entropy_loss:
        options["class_weights"] = torch.tensor([0.0, 1.0, 1.5, 0.2])

    assert gradcheck(lambda x: function(x, teacher, **options), student.requires_grad_())


@rule("Fused operators are as exact as PyTorch")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "rows, classes", [(1, 1), (300, 2), (33, 9), (257, 81), (40, 128), (31, 129), (3, 9000)]
)
def test_row_losses_are_as_exact_as_pytorch(rows, classes, activation, dtype):
    student, teacher = random_logits(rows, classes, dtype)
    generator = torch.Generator().manual_seed(1)
    weights, c = (torch.rand(n, generator=generator) for n in (rows, classes))
    for function, temperature in itertools.product(ROW_LOSSES, (2.0, 1.7)):
        options = {"temperature": temperature, "weights": weights, "activation": activation}
        if function is soft_cross_entropy_loss:
            options["class_weights"] = c

        def run(x, impl, function=function, options=options):
            return function(x[0], teacher, impl=impl, **options)

        assert_as_exact(run, [student], dtype)
        # In float64 both are exact but for rounding.
        double, exact = (
            loss_and_gradients(lambda x, impl=impl: run(x, impl), [student.double()])
            for impl in IMPLS
        )
        torch.testing.assert_close(double, exact, rtol=1e-11, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=3),
    classes=st.sampled_from([0, 1, 2, 3, 31, 33, 127, 129, 257]),
    options=st.fixed_dictionaries(
        {"activation": st.sampled_from(ACTIVATIONS), "temperature": st.sampled_from([1.0, 3.0])}
    ),
    weighted=st.booleans(),
    cross_entropy=st.booleans(),
    strided=st.booleans(),
)
def test_row_losses_of_lists_of_any_shape(
    shapes, classes, options, weighted, cross_entropy, strided
):
    """A list is its rows concatenated, whatever their number, class count and strides."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    student, teacher = ([6 * draw(*s, classes) - 3 for s in shapes] for _ in range(2))
    if strided:
        student = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in student]
        teacher = [torch.stack([x, x], -1)[..., 0] for x in teacher]
    function = soft_cross_entropy_loss if cross_entropy else kl_distillation_loss
    if cross_entropy and weighted:
        options = {**options, "class_weights": draw(classes)}
    weights = [draw(*s) for s in shapes] if weighted else None

    def joined(tensors, *last):
        return torch.cat(
            [t.reshape(math.prod(s), *last) for s, t in zip(shapes, tensors, strict=True)]
        )

    loss, gradients = loss_and_gradients(
        lambda x: function(x, teacher, weights=weights, impl="fused", **options), student
    )
    expected, (gradient,) = loss_and_gradients(
        lambda x: function(
            x[0],
            joined(teacher, classes),
            weights=joined(weights) if weighted else None,
            impl="reference",
            **options,
        ),
        [joined(student, classes)],
    )
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-14)
    assert [g.shape for g in gradients] == [x.shape for x in student]
    torch.testing.assert_close(joined(gradients, classes), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("student_dtype", HALF_AND_FULL)
@pytest.mark.parametrize("teacher_dtype", HALF_AND_FULL)
def test_row_losses_read_each_side_as_stored(student_dtype, teacher_dtype):
    student, teacher = random_logits(20, 5)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    for function in ROW_LOSSES:
        fused, plain = (function(student, teacher, impl=impl) for impl in IMPLS)
        assert fused.dtype == plain.dtype
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_row_losses_of_nothing_are_zero_with_a_graph(activation, shape, impl):
    for function, weights in itertools.product(ROW_LOSSES, (None, torch.ones(shape[:-1]))):
        loss, (gradient,) = loss_and_gradients(
            lambda x, function=function, weights=weights: function(
                x[0], torch.zeros(shape), weights=weights, activation=activation, impl=impl
            ),
            [torch.zeros(shape)],
        )
        assert loss.item() == 0 and gradient.shape == shape


@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", [0, 1])
def test_row_losses_let_nan_through(side, impl, classes):
    logits = random_logits(4, classes)
    logits[side][1, 2] = float("nan")
    for function, activation in itertools.product(ROW_LOSSES, ACTIVATIONS):
        loss, (gradient,) = loss_and_gradients(
            lambda x, function=function, activation=activation: function(
                x[0], logits[1], activation=activation, impl=impl
            ),
            [logits[0]],
        )
        assert loss.isnan()
        assert gradient[1].isnan().any() and gradient[0].isfinite().all()


def test_only_the_student_gets_a_gradient():
    for impl, function in itertools.product(IMPLS, ROW_LOSSES):
        student, teacher = (x.requires_grad_() for x in random_logits(4, 3))
        weights = torch.ones(4, requires_grad=True)
        function(student, teacher, weights=weights, impl=impl).backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None and weights.grad is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("function", ROW_LOSSES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher_logits": torch.zeros(4, 2)}, r"teacher_logits\[0\] is \(4, 2\) and student_log"),
        ({"student_logits": torch.zeros(4, 3).long()}, r"student_logits\[0\] is torch.int64"),
        ({"weights": torch.zeros(3)}, r"weights\[0\] is \(3,\); .* make it \(4,\)"),
        ({"weights": [torch.zeros(4)] * 2}, "weights has 2 tensors and student_logits 1"),
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose from softmax, sigmoid"),
        (
            dict.fromkeys(["student_logits", "teacher_logits"], [torch.zeros(4, 3), torch.ones(2)]),
            r"student_logits\[1\] has 2 classes and student_logits\[0\] has 3",
        ),
        ({"student_logits": [], "teacher_logits": []}, "student_logits is an empty list"),
    ],
)
def test_row_losses_errors_name_the_argument(change, message, function, impl):
    arguments = {"student_logits": torch.zeros(4, 3), "teacher_logits": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change}, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_class_weights_are_one_a_class(impl):
    x = torch.zeros(4, 3)
    for wrong, shown in ((torch.ones(2), r"\(2,\)"), ([1.0, 1.0, 1.5], "list")):
        with pytest.raises(ValueError, match=f"class_weights is {shown}; give .* shape \\(3,\\)"):
            soft_cross_entropy_loss(x, x, class_weights=wrong, impl=impl)


# ------------------------------------------------------------------ adaptive distillation loss
@pytest.mark.parametrize("impl", IMPLS)
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
def test_adl_reference_values(outer, x, q, loss, gradient, impl):
    logit = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = adaptive_distillation_loss(
        logit, torch.tensor([q], dtype=torch.float64), outer=outer, impl=impl
    )
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    if gradient is not None:
        assert logit.grad.item() == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "gamma, alpha, beta_c", [(2.0, 0.5, 0.0), (1.0, 0.25, 1.0), (0.5, 0.3, 0.4)]
)
def test_adl_gradient_by_its_closed_form(gamma, alpha, beta_c, impl):
    # dl/dx = -(gamma A^(gamma-1) e^-D (p-q) S + A^gamma (alpha q (1-p) - (1-alpha) (1-q) p)),
    # S = alpha q ln p + (1-alpha) (1-q) ln(1-p)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.rand(200, generator=generator, dtype=torch.float64)
    adaptive_distillation_loss(
        x, q, gamma=gamma, alpha=alpha, beta_c=beta_c, normalizer=None, impl=impl
    ).backward()
    p = x.detach().sigmoid()
    s = alpha * q * p.log() + (1 - alpha) * (1 - q) * (1 - p).log()
    d = -(q * p.log() + (1 - q) * (1 - p).log())
    d = d + beta_c * (q * q.log() + (1 - q) * (1 - q).log())
    a = 1 - torch.exp(-d)
    expected = -gamma * a ** (gamma - 1) * torch.exp(-d) * (p - q) * s
    expected = expected - a**gamma * (alpha * q * (1 - p) - (1 - alpha) * (1 - q) * p)
    torch.testing.assert_close(x.grad, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gamma", [2.0, 1.3])
@pytest.mark.parametrize("outer", ["bce", "kl"])
def test_adl_gradcheck(outer, gamma, impl):
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.randn(n, 2, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 3)
    ]
    probs = [torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (4, 3)]
    options = {"outer": outer, "gamma": gamma, "beta_c": 0.3, "impl": impl}
    options["ignore"] = [torch.rand(p.shape, generator=generator) < 0.3 for p in probs]
    assert gradcheck(lambda *x: adaptive_distillation_loss(list(x), probs, **options), levels)


@pytest.mark.parametrize("impl", IMPLS)
def test_adl_normaliser_and_ignored_elements(impl):
    # Four elements with q = 1: sum q^theta = 4 for every theta, ignored ones included. With gamma 0
    # and alpha 1 an element is -ln p, at x = 0 ln 2.
    logits, probs = torch.zeros(2, 2), torch.ones(2, 2)
    options = {"gamma": 0.0, "alpha": 1.0, "impl": impl}
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
        adaptive_distillation_loss(logits, small, impl=impl),
        adaptive_distillation_loss(logits, small, normalizer=None, impl=impl),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outer", ["bce", "kl"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta_c", [0.0, 1.0])
def test_adl_at_the_edges(beta_c, gamma, outer, dtype):
    """q of exactly 0 and 1, a student that agrees (A = 0), extreme and infinite logits, NaN."""
    finite = [0.0, 90.0, -90.0, 200.0, -200.0]
    x = torch.tensor([*finite, math.inf, -math.inf, math.nan], dtype=dtype)
    q = torch.tensor([0.0, 1.0, 0.5, 1e-30, math.nan], dtype=dtype)
    pairs = torch.cartesian_prod(x, q)
    options = {"gamma": gamma, "beta_c": beta_c, "outer": outer, "normalizer": None}

    def run(impl):
        losses, gradients = zip(
            *(
                loss_and_gradients(
                    lambda x, b=b: adaptive_distillation_loss(x[0], b, impl=impl, **options), [a]
                )
                for a, b in pairs
            ),
            strict=True,
        )
        return torch.stack(losses), torch.cat([g[0][None] for g in gradients])

    fused, expected = run("fused"), run("reference")
    # F.softplus is rounded to x above 20, which is 2e-9 off in float64.
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-8, equal_nan=True)
    sane = pairs[:, 0].abs().le(200) & pairs[:, 1].isfinite()
    assert fused[0][sane].isfinite().all() and fused[1][sane].isfinite().all()


@rule("Fused operators are as exact as PyTorch")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outer", ["bce", "kl"])
@pytest.mark.parametrize("gamma, theta", [(2.0, 1.8), (1.0, 1.0), (0.5, 0.7), (3.3, 2.5)])
def test_adl_is_as_exact_as_pytorch(gamma, theta, outer, dtype):
    logits, probs = random_levels([(50, 41), (1000,), (1,)], dtype)
    options = {"gamma": gamma, "theta": theta, "alpha": 0.3, "beta_c": 0.2, "outer": outer}

    def run(x, impl):
        return adaptive_distillation_loss(x, probs, impl=impl, **options)

    assert_as_exact(run, logits, dtype)
    double, exact = (
        loss_and_gradients(lambda x, impl=impl: run(x, impl), [x.double() for x in logits])
        for impl in IMPLS
    )
    torch.testing.assert_close(double, exact, rtol=1e-11, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 35), max_size=4), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
    layout=st.sampled_from(["permuted alike", "permuted apart", "sliced", "expanded"]),
    ignoring=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_adl_of_any_shapes_and_strides(shapes, order, layout, ignoring, dtype):
    logits, probs = random_levels(shapes, dtype)

    def laid_out(x, axes):
        if layout == "sliced":
            return torch.stack([x, x], -1)[..., 0]
        if layout == "expanded" and x.dim():
            return x[:1].expand(x.shape)
        return x.permute(axes).contiguous().permute([axes.index(a) for a in range(x.dim())])

    for i, x in enumerate(logits):
        axes, other = (order.sample(range(x.dim()), x.dim()) for _ in range(2))
        logits[i] = laid_out(x, axes)
        probs[i] = laid_out(probs[i], axes if layout == "permuted alike" else other)
    ignore = [p > 0.1 for p in probs] if ignoring else None

    def run(x, impl):
        return adaptive_distillation_loss(x, probs, ignore=ignore, impl=impl)

    fused, expected = (
        loss_and_gradients(lambda x, impl=impl: run(x, impl), logits) for impl in IMPLS
    )
    torch.testing.assert_close(fused, expected, rtol=2e-5, atol=1e-9)
    for x, gradient in zip(logits, fused[1], strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("theta", [0.0, 0.01, 1.0, 1.8, 7.0])
def test_adl_normaliser_of_any_exponent(theta):
    logits = torch.linspace(-3, 3, 40)
    probs = torch.tensor([0.0, 1.0, 0.5, 1e-30, 0.3]).repeat(8)
    fused, expected = (
        adaptive_distillation_loss(logits, probs, theta=theta, impl=impl) for impl in IMPLS
    )
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=0)


def test_adl_ignored_elements_may_be_nan():
    logits, probs = random_levels([(6, 5)], torch.float32)
    ignore = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    logits[0][ignore] = math.nan
    fused, expected = (
        loss_and_gradients(
            lambda x, impl=impl: adaptive_distillation_loss(x, probs, ignore=[ignore], impl=impl),
            logits,
        )
        for impl in IMPLS
    )
    torch.testing.assert_close(fused, expected)
    assert fused[0].isfinite() and fused[1][0][ignore].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_adl_of_nothing_is_zero_with_a_graph(impl):
    x = torch.randn(3, requires_grad=True)
    everything = torch.ones(3, dtype=torch.bool)
    loss = adaptive_distillation_loss(x, torch.rand(3), ignore=everything, impl=impl)
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].tolist() == [0, 0, 0]
    empty = torch.zeros(0, 2, requires_grad=True)
    loss = adaptive_distillation_loss(empty, torch.zeros(0, 2), impl=impl)
    assert loss.item() == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 2)


@pytest.mark.parametrize("impl", IMPLS)
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
def test_adl_errors_name_the_argument(change, message, impl):
    arguments = {"student_logits": torch.zeros(2), "teacher_probs": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        adaptive_distillation_loss(**{**arguments, **change}, impl=impl)


# ------------------------------------------------------------------------------ bounded regression
@pytest.mark.parametrize("impl", IMPLS)
def test_bounded_regression_by_hand(impl):
    # squared errors of the student against target 0: 1, 4, 0.25 and 0.25;
    # of the teacher: 2 (the student is better, beyond the margin), 1, 0.255 and 0.27
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.5, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.255**0.5], [0.0, 0.27**0.5]])
    target = torch.zeros(4, 2)
    # 4 + 0.25 (within the margin of 0.01) of 4 boxes
    loss = bounded_regression_loss(student, teacher, target, impl=impl)
    assert loss.item() == pytest.approx(4.25 / 4)
    loss.backward()
    # 2 s / 4 for the boxes that count
    assert student.grad.tolist() == [[0, 0], [0, 1.0], [0.25, 0], [0, 0]]
    for options, expected in [
        ({"margin": 0.0}, 4 / 4),
        ({"margin": 2.0}, 5.5 / 4),
        ({"normalizer": 8}, 4.25 / 8),
        ({"normalizer": torch.tensor(0.5)}, 4.25),
        ({"normalizer": torch.tensor(8)}, 4.25 / 8),
        ({"normalizer": torch.tensor(8.0, dtype=torch.float64)}, 4.25 / 8),
    ]:
        value = bounded_regression_loss(student, teacher, target, impl=impl, **options)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_bounded_regression_without_boxes_and_with_wrong_shapes(impl):
    for shape in ((0, 4), (3, 0), (0, 0)):
        loss, (gradient,) = loss_and_gradients(
            lambda x, shape=shape: bounded_regression_loss(
                x[0], torch.zeros(shape), torch.zeros(shape), impl=impl
            ),
            [torch.zeros(shape)],
        )
        assert loss.item() == 0 and gradient.shape == shape
    for shapes, options, message in [
        (((2, 4), (2, 3), (2, 4)), {}, r"teacher_deltas is \(2, 3\)"),
        (((2, 4), (2, 4), (1, 4)), {}, r"target_deltas is \(1, 4\)"),
        (((4,), (4,), (4,)), {}, r"student_deltas is \(4,\); give \(R, D\)"),
        (((2, 4),) * 3, {"normalizer": torch.ones(1)}, r"normalizer has the shape \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            bounded_regression_loss(*map(torch.zeros, shapes), impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_bounded_regression_gradcheck(impl):
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    assert gradcheck(
        lambda s: bounded_regression_loss(s, deltas[1], deltas[2], impl=impl),
        deltas[0].requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, size", [(1, 4), (9000, 4), (257, 1), (33, 5), (20, 64)])
def test_bounded_regression_is_as_exact_as_pytorch(rows, size, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher, target = torch.randn(3, rows, size, generator=generator).to(dtype)
    # Away from the switch, where precision decides.
    near = (student - target).square().sum(1) - (teacher - target).square().sum(1) + 0.01
    assert near.abs().min() > 1e-4
    if size == 4:
        target = torch.stack([target, target], -1)[..., 1]  # strided
    assert_as_exact(
        lambda x, impl: bounded_regression_loss(
            x[0], teacher, target, normalizer=torch.tensor(77.0), impl=impl
        ),
        [student],
        dtype,
    )


# ------------------------------------------------------------------------------- every operator
def cases(dtype=torch.float32, size=20):
    """Of every compiled operator: its name, a function of the leaves, the leaves."""
    student, teacher = random_logits(size, 5, dtype)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(size, generator=generator).to(torch.promote_types(dtype, torch.float32))
    levels, probs = random_levels([(size, 7), (size,)], dtype)
    ignore = [p > 0.2 for p in probs]
    deltas = torch.randn(2, size, 5, generator=generator).to(dtype)
    z = torch.tensor(9.0)
    return [
        (
            "kl_distillation_loss",
            lambda x, **k: kl_distillation_loss(
                x, [teacher] * 2, temperature=2.0, weights=[weights] * 2, **k
            ),
            [student, student.flip(0)],
        ),
        (
            "soft_cross_entropy_loss",
            lambda x, **k: soft_cross_entropy_loss(
                x, [teacher] * 2, class_weights=weights[:5], activation="sigmoid", **k
            ),
            [student, student.flip(0)],
        ),
        (
            "adaptive_distillation_loss",
            lambda x, **k: adaptive_distillation_loss(x, probs, ignore=ignore, **k),
            levels,
        ),
        (
            "bounded_regression_loss",
            lambda x, **k: bounded_regression_loss(x[0], *deltas, normalizer=z, **k),
            [student],
        ),
    ]


every_operator = pytest.mark.parametrize("index", range(len(OPERATORS)), ids=OPERATORS)


@rule("A call is one operator forward and one backward")
@every_operator
def test_one_operator_each_way(index):
    name, function, leaves = cases()[index]
    assert_one_operator_each_way(function, leaves, name)


def test_other_floating_types_are_refused():
    x = torch.zeros(4, 3)
    low = x.to(torch.float8_e4m3fn)
    for function in (*ROW_LOSSES, adaptive_distillation_loss):
        with pytest.raises(RuntimeError, match="teacher_.*; give float16, bfloat16, float32"):
            function(x, low, impl="fused")


@every_operator
def test_the_number_of_threads_changes_nothing(index):
    _, function, leaves = cases(size=20000)[index]
    assert_same_for_any_number_of_threads(
        lambda: loss_and_gradients(lambda x: function(x, impl="fused"), leaves)
    )


@every_operator
def test_the_upstream_gradient_scales(index):
    _, function, leaves = cases(torch.float64)[index]
    one, seven, none = (
        loss_and_gradients(lambda x: function(x, impl="fused"), leaves, upstream)[1]
        for upstream in (1.0, 7.0, 0.0)
    )
    for a, b, c in zip(one, seven, none, strict=True):
        torch.testing.assert_close(7 * a, b, rtol=1e-12, atol=0)
        assert a.abs().sum() > 0 and c.abs().sum() == 0


@every_operator
def test_compiled_operators_have_no_second_derivative(index):
    name, function, leaves = cases()[index]
    leaves = [x.requires_grad_() for x in leaves]
    gradient, *_ = torch.autograd.grad(function(leaves, impl="fused"), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second .*; pass impl='reference'"):
        gradient.sum().backward()


@every_operator
@pytest.mark.parametrize("impl", IMPLS)
def test_torch_compile_in_one_graph(index, impl):
    _, function, leaves = cases()[index]
    step = torch.compile(lambda x: 2 * function(x, impl=impl), fullgraph=True, backend="aot_eager")
    compiled = loss_and_gradients(step, leaves)
    plain = loss_and_gradients(lambda x: 2 * function(x, impl=impl), leaves)
    torch.testing.assert_close(compiled, plain)


@every_operator
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(index, impl):
    _, function, leaves = cases()[index]
    plain = function(leaves, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(leaves, impl=impl), plain)


@every_operator
def test_a_gpu_call_is_traced_without_a_gpu(index):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_gpu(value):
        if isinstance(value, list):
            return [on_gpu(v) for v in value]
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )
        return value

    operator, inputs, _ = opcheck_cases(torch.float16)[index]
    with FakeTensorMode():
        outputs = operator(*on_gpu(list(inputs)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output in outputs:
            assert output.shape == () and output.dtype == torch.float32
            assert output.device.type == "cuda"


def opcheck_cases(dtype):
    """Per operator: itself, its arguments, those of its backward after the gradient."""
    student, teacher = random_logits(6, 3, dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    weights, one = torch.rand(6, dtype=accumulate), torch.ones((), dtype=accumulate)
    rows = [student, student.T.reshape(3, 2, 3).transpose(0, 1)], [teacher, teacher.view(2, 3, 3)]
    weights = [weights, weights.view(2, 3)]
    probs = [x.float().sigmoid().to(dtype) for x in rows[1]]
    ops = torch.ops.hkd_d2
    kl = (*rows, weights, 2.0, False)
    ce = (*rows, [], torch.rand(3, dtype=accumulate), 1.0, True)
    ignore = [p > 0.7 for p in probs]
    options = 1.5, 0.5, 0.0
    bounded = student, teacher, teacher.flip(0), 0.01, torch.tensor(7), 1.0
    return [
        (ops.kl_distillation_loss.default, kl, (one, *kl)),
        (ops.soft_cross_entropy_loss.default, ce, (one, *ce)),
        (
            ops.adaptive_distillation_loss.default,
            (rows[0], probs, ignore, *options, 1.8, True),
            (one, rows[0], probs, ignore, *options, True),
        ),
        (ops.bounded_regression_loss.default, bounded, bounded),
    ]


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("index", range(len(OPERATORS)))
def test_opcheck(index, dtype):
    operator, inputs, backward_inputs = opcheck_cases(dtype)[index]
    differentiable = [x.detach().requires_grad_() for x in inputs[0]]
    if isinstance(inputs[0], torch.Tensor):
        differentiable = inputs[0].detach().requires_grad_()
    torch.library.opcheck(operator, (differentiable, *inputs[1:]))
    backward = getattr(torch.ops.hkd_d2, f"{operator._opname}_backward").default
    grad = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(backward, (grad, *backward_inputs))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_agree(isa):
    """What this machine's own set computes is tested above; it is chosen once a process."""
    program = """
        import torch
        from ops.test_logit_distillation import cases, loss_and_gradients
        for _, function, leaves in cases(size=100):
            fused, plain = (
                loss_and_gradients(lambda x: function(x, impl=impl), leaves)
                for impl in ("fused", "reference")
            )
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-8)
    """
    run_code(program, HKD_CPU_ISA=isa)
