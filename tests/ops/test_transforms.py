"""The operators beyond reverse mode: forward mode, torch.func, tracing, meta and fake tensors."""

import contextlib

import pytest
import torch
from ops.comparisons import IMPLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from hkd_d2 import ops
from hkd_d2.ops import _library

BOXES = [torch.tensor([[1.0, 1.0, 20.0, 28.0]]), torch.tensor([[3.0, 2, 10, 8], [0.0, 0, 30, 30]])]


def drawn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, Y, V = (drawn(6, 3, seed=seed) for seed in range(3))
S, T, U = (drawn(2, 4, 8, 8, seed=seed) for seed in range(3, 6))
Q = Y.sigmoid()
W = drawn(4, 4, seed=6), drawn(4, seed=7)
MASK = {"boxes": BOXES, "strides": [4], "background_weight": 0.5}

# A scalar function of the student's tensor, that tensor, and a tangent.
LOSSES = {
    "kl": (lambda x, impl=None: ops.kl_distillation_loss(x, Y, impl=impl), X, V),
    "cross-entropy": (lambda x, impl=None: ops.soft_cross_entropy_loss(x, Y, impl=impl), X, V),
    "adl": (lambda x, impl=None: ops.adaptive_distillation_loss([x], [Q], impl=impl), X, V),
    "bounded": (lambda x, impl=None: ops.bounded_regression_loss(x, Y, 0 * Y, impl=impl), X, V),
    "imitation": (lambda x, impl=None: ops.feature_imitation_loss([x], [T], impl=impl), S, U),
    "masked": (lambda x, impl=None: ops.feature_imitation_loss([x], [T], impl=impl, **MASK), S, U),
}
POOLED = {
    "roi_align": (
        lambda x, impl=None: (
            ops.multilevel_roi_align([x], BOXES, strides=[4], output_size=2, impl=impl)
            .square()
            .sum()
        ),
        S,
        U,
    ),
    "roi_distillation": (
        lambda x, impl=None: ops.roi_distillation_loss([x], [T], BOXES, strides=[4], impl=impl),
        S,
        U,
    ),
}
ALL = {**LOSSES, **POOLED}


def directional(function, x, tangent):
    """The derivative of the fused operator by its gradient in reverse mode."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, "fused"), x)
    return (gradient * tangent).sum()


def test_forward_mode_by_hand():
    """The mean square of (1, 2, 3, 4) - 0 has the derivative 2 / 4 (1 t1 + ... + 4 t4)."""
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
    tangent = torch.tensor([1.0, 0, 0, 2]).view(1, 1, 2, 2)
    run = lambda s: ops.feature_imitation_loss([s], [torch.zeros(1, 1, 2, 2)])  # noqa: E731
    assert [v.item() for v in jvp(run, (x,), (tangent,))] == [7.5, 4.5]


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_the_derivative(name):
    function, x, tangent = LOSSES[name]
    expected = directional(function, x, tangent)
    value, derivative = jvp(function, (x,), (tangent,))
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(derivative, expected)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        # Without a dual tensor the fused operator runs inside a level, too.
        assert forward_ad.unpack_dual(function(x, "fused")).tangent is None


@pytest.mark.parametrize("name", POOLED)
def test_forward_mode_of_pooling_is_refused(name):
    function, x, tangent = POOLED[name]
    with pytest.raises(NotImplementedError, match="does not support it"):
        jvp(function, (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="does not support it"):
        function(forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("name", ALL)
def test_fused_refuses_what_it_has_no_rule_for(name):
    function, x, tangent = ALL[name]
    fused = lambda x: function(x, "fused")  # noqa: E731
    for run in (
        lambda: jvp(fused, (x,), (tangent,)),
        lambda: grad(fused)(x),
        lambda: vmap(fused)(torch.stack([x, x])),
    ):
        with pytest.raises(RuntimeError, match="has reverse-mode derivatives alone.*impl=None"):
            run()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse-mode"):
        fused(forward_ad.make_dual(x, tangent))


def test_tangents_of_adapters_and_of_what_has_no_gradient():
    options = dict(boxes=BOXES, strides=[4], background_weight=0.5)
    loss = lambda w, b: ops.feature_imitation_loss([S], [T], adapter=(w, b), **options)  # noqa: E731
    weight, bias = (x.detach().requires_grad_() for x in W)
    gradients = torch.autograd.grad(loss(weight, bias), (weight, bias))
    tangents = drawn(4, 4, seed=8), drawn(4, seed=9)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(jvp(loss, W, tangents)[1], expected)
    # The teacher has no gradient in reverse mode, and no tangent in forward mode.
    for name, of_teacher in {
        "kl": lambda t: ops.kl_distillation_loss(X, t),
        "cross-entropy": lambda t: ops.soft_cross_entropy_loss(X, t),
        "adl": lambda t: ops.adaptive_distillation_loss(X, t.sigmoid()),
        "bounded": lambda t: ops.bounded_regression_loss(X, t, 0 * X),
    }.items():
        assert jvp(of_teacher, (Y,), (V,))[1].item() == 0, name
    for of_teacher in (
        lambda t: ops.feature_imitation_loss([S], [t]),
        lambda t: ops.roi_distillation_loss([S], [t], BOXES, strides=[4]),
    ):
        assert jvp(of_teacher, (T,), (U,))[1].item() == 0


@pytest.mark.parametrize("name", ALL)
def test_grad_vjp_and_vmap(name):
    function, x, tangent = ALL[name]
    expected = directional(function, x, tangent)
    torch.testing.assert_close((grad(function)(x) * tangent).sum(), expected)
    value, pull = vjp(function, x)
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close((pull(torch.ones_like(value))[0] * tangent).sum(), expected)
    if name != "masked":  # chooses the active cells
        batch = torch.stack([x, x + 1])
        torch.testing.assert_close(vmap(function)(batch), torch.stack([*map(function, batch)]))


@pytest.mark.parametrize("name", LOSSES)
def test_hessian_is_that_of_the_gradient(name):
    """Against differences of the fused gradient, along one direction."""
    function, x, tangent = LOSSES[name]
    along = (hessian(function)(x).flatten(x.dim()) @ tangent.flatten()).view_as(x)
    step = 1e-5
    ends = []
    for end in (x + step * tangent, x - step * tangent):
        end.requires_grad_()
        ends.append(torch.autograd.grad(function(end, "fused"), end)[0])
    torch.testing.assert_close(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_advice_about_second_derivatives_helps(name):
    function, x, _ = ALL[name]

    def second(impl):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, impl), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    if name == "roi_align":
        assert second("fused").abs().sum() > 0
        return
    with pytest.raises(RuntimeError) as error:
        second("fused")
    if name == "roi_distillation":
        assert "reference" not in str(error.value)
        assert "compare the tensors of two multilevel_roi_align" in str(error.value)
    else:
        assert "pass impl='reference'" in str(error.value)
        assert second("reference").abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_compiled_transforms_are_right_or_refused(name):
    function, x, tangent = ALL[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: jvp(function, (x,), (t,))[1], backend="aot_eager", fullgraph=True
    )
    try:
        derivative = compiled(x, tangent)
    except Exception:  # chooses by values, which a whole graph cannot
        assert name in ("masked", *POOLED)
        return
    torch.testing.assert_close(derivative, directional(function, x, tangent))


@pytest.mark.parametrize("name", ALL)
def test_compiled_checkpointed_and_traced(name):
    function, x, tangent = ALL[name]
    expected = directional(function, x, tangent)
    torch._dynamo.reset()
    for run in (
        torch.compile(lambda x: function(x, None), backend="aot_eager", fullgraph=True),
        lambda x: checkpoint(function, x, use_reentrant=False),
        lambda x: checkpoint(function, x, use_reentrant=True),
    ):
        leaf = x.detach().requires_grad_()
        run(leaf).backward()
        torch.testing.assert_close((leaf.grad * tangent).sum(), expected)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x: function(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert "torch.ops.hkd_d2." in graph.code
        torch.testing.assert_close(graph(x + 1), function(x + 1))


def test_functional_call():
    class Loss(torch.nn.Linear):
        def forward(self, x):
            return ops.kl_distillation_loss(super().forward(x), Y)

    module = Loss(3, 3, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(module(X), [*parameters.values()])
    actual = torch.autograd.grad(functional_call(module, parameters, X), [*parameters.values()])
    torch.testing.assert_close(actual, expected)
    by_func = grad(lambda p: functional_call(module, p, X))(
        {name: p.detach() for name, p in parameters.items()}
    )
    torch.testing.assert_close(tuple(by_func.values()), expected)


# ---------------------------------------------------------------------- shapes without numbers
def by(impl):
    """Inside it, operators without ``impl`` run this implementation. Both are there on ``meta``."""
    return contextlib.nullcontext() if impl == "fused" else _library.reference_only()


def shapes_of_all(device):
    empty = lambda *shape, dtype=torch.float32: torch.empty(  # noqa: E731
        shape, device=device, dtype=dtype
    )
    maps, teacher = [empty(2, 4, 8, 8), empty(2, 4, 4, 4)], [empty(2, 6, 8, 8), empty(2, 6, 4, 4)]
    boxes, adapter = [empty(3, 4), empty(0, 4)], (empty(6, 4), empty(6))
    rows, half = [empty(5, 3), empty(2, 7, 3)], empty(5, 3, dtype=torch.float16)
    options = {"strides": [4, 8], "adapter": adapter}
    return [
        ops.multilevel_roi_align(maps, boxes, strides=[4, 8], output_size=(7, 3)),
        ops.roi_distillation_loss(maps, teacher, boxes, **options),
        ops.feature_imitation_loss(maps, teacher, boxes=boxes, ignore_boxes=boxes, **options),
        ops.feature_imitation_loss(maps, teacher, distance="pkd", adapter=adapter),
        ops.kl_distillation_loss(rows, rows, weights=[empty(5), empty(2, 7)]),
        ops.soft_cross_entropy_loss(half, half, class_weights=empty(3)),
        ops.adaptive_distillation_loss(rows, rows, ignore=[r.bool() for r in rows]),
        ops.bounded_regression_loss(half, half, half, normalizer=empty()),
    ]


@pytest.mark.parametrize("where", ["meta", "reference on meta", "fake cpu", "default meta"])
def test_shapes_without_numbers(where):
    if where == "meta":
        results = shapes_of_all("meta")
    elif where == "reference on meta":
        with by("reference"):
            results = shapes_of_all("meta")
    elif where == "default meta":
        with torch.device("meta"):
            results = shapes_of_all(None)
    else:
        with FakeTensorMode():
            results = shapes_of_all("cpu")
    assert [tuple(r.shape) for r in results] == [(3, 4, 7, 3), *[()] * 7]
    assert {r.dtype for r in results} == {torch.float32}
    assert {r.device.type for r in results} == {"cpu" if where == "fake cpu" else "meta"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ALL)
def test_gradients_on_meta(name, impl):
    function, x, _ = ALL[name]
    run = {
        "roi_align": lambda x: ops.multilevel_roi_align(
            [x], [b.to("meta") for b in BOXES], strides=[4]
        ),
        "roi_distillation": lambda x: ops.roi_distillation_loss(
            [x], [T.to("meta")], [b.to("meta") for b in BOXES], strides=[4]
        ),
        "imitation": lambda x: ops.feature_imitation_loss([x], [T.to("meta")]),
        "masked": lambda x: ops.feature_imitation_loss(
            [x], [T.to("meta")], boxes=[b.to("meta") for b in BOXES], strides=[4]
        ),
        "kl": lambda x: ops.kl_distillation_loss(x, Y.to("meta")),
        "cross-entropy": lambda x: ops.soft_cross_entropy_loss(x, Y.to("meta")),
        "adl": lambda x: ops.adaptive_distillation_loss(x, Q.to("meta")),
        "bounded": lambda x: ops.bounded_regression_loss(x, Y.to("meta"), Y.to("meta")),
    }[name]
    leaf = x.to("meta").requires_grad_()
    with by(impl):
        (gradient,) = torch.autograd.grad(run(leaf).sum(), leaf)
    assert gradient.shape == x.shape and gradient.dtype == x.dtype and gradient.is_meta


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_an_adapter_on_meta(impl):
    maps, teacher = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 6, 8, 8, device="meta")
    boxes = [b.to("meta") for b in BOXES]
    adapter = [torch.empty(*n, device="meta", requires_grad=True) for n in ((6, 4), (6,))]
    options = {"boxes": boxes, "strides": [4], "adapter": tuple(adapter), "impl": impl}
    for loss in (ops.roi_distillation_loss, ops.feature_imitation_loss):
        gradients = torch.autograd.grad(loss([maps], [teacher], **options), adapter)
        assert [g.shape for g in gradients] == [(6, 4), (6,)]
        assert all(g.is_meta for g in gradients)


# ------------------------------------------------------------------------------- wrong devices
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("elsewhere", ["meta", "cuda"])
def test_a_tensor_on_another_device_is_refused(impl, elsewhere):
    mode = FakeTensorMode()

    def there(x):
        if elsewhere == "meta":
            return x.to("meta")
        with mode:
            return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    maps, teacher, weight, bias = [S], [T], *W
    boxes = {"boxes": BOXES, "strides": [4]}
    cases = {
        "weight of level 0": [
            lambda: ops.feature_imitation_loss(
                maps, teacher, adapter=(there(weight), bias), impl=impl
            ),
            lambda: ops.roi_distillation_loss(
                maps, teacher, BOXES, strides=[4], adapter=(there(weight), None), impl=impl
            ),
        ],
        "bias of level 0": [
            lambda: ops.feature_imitation_loss(
                maps, teacher, adapter=[(weight, there(bias))], impl=impl
            )
        ],
        r"teacher\[0\]": [
            lambda: ops.feature_imitation_loss(maps, [there(T)], impl=impl),
            lambda: ops.roi_distillation_loss(maps, [there(T)], BOXES, strides=[4], impl=impl),
        ],
        r"boxes\[0\]": [
            lambda: ops.multilevel_roi_align(maps, [*map(there, BOXES)], strides=[4], impl=impl),
            lambda: ops.feature_imitation_loss(
                maps, teacher, impl=impl, **{**boxes, "boxes": [*map(there, BOXES)]}
            ),
            lambda: ops.feature_imitation_loss(
                maps, teacher, impl=impl, ignore_boxes=[*map(there, BOXES)], strides=[4]
            ),
        ],
        r"anchors\[0\]": [
            lambda: ops.feature_imitation_loss(
                maps,
                teacher,
                rasterize="fgfi",
                anchors=[there(torch.ones(1, 2))],
                impl=impl,
                **boxes,
            )
        ],
        r"weights\[0\]": [
            lambda: ops.feature_imitation_loss(
                maps, teacher, spatial_weights=[there(torch.ones(2, 8, 8))], impl=impl
            ),
            lambda: ops.feature_imitation_loss(
                maps, teacher, channel_weights=[there(torch.ones(2, 4))], impl=impl
            ),
            lambda: ops.kl_distillation_loss(X, Y, weights=there(torch.ones(6)), impl=impl),
        ],
        r"teacher_logits\[0\]": [
            lambda: ops.kl_distillation_loss(X, there(Y), impl=impl),
            lambda: ops.soft_cross_entropy_loss(X, there(Y), impl=impl),
        ],
        "class_weights": [
            lambda: ops.soft_cross_entropy_loss(X, Y, class_weights=there(torch.ones(3)), impl=impl)
        ],
        r"teacher_probs\[0\]": [lambda: ops.adaptive_distillation_loss(X, there(Q), impl=impl)],
        r"ignore\[0\]": [
            lambda: ops.adaptive_distillation_loss(X, Q, ignore=there(Q > 0.5), impl=impl)
        ],
        "target_deltas": [lambda: ops.bounded_regression_loss(X, Y, there(Y), impl=impl)],
        "normalizer": [
            lambda: ops.bounded_regression_loss(
                X, Y, Y, normalizer=there(torch.tensor(2.0)), impl=impl
            )
        ],
    }
    for name, calls in cases.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"{name} is on {elsewhere}.*move them to one"):
                call()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_an_adapter_that_is_no_floating_tensor_is_refused(kind):
    weight, bias = W
    adapter = (weight.long(), bias) if kind == "weight" else (weight, [0.0] * 4)
    with pytest.raises(ValueError, match=f"{kind} of level 0 is .*floating-point tensor"):
        ops.feature_imitation_loss([S], [T], adapter=adapter)
