"""How the tests of the operators compare, record and repeat.

The rule for values and gradients: against the reference in float64, the fused operator errs by
at most twice as much as the reference run in the same precision.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

IMPLS = ["fused", "reference"]
HALF_AND_FULL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def loss_and_gradients(function, leaves, upstream=1.0):
    """``function(leaves)`` and the gradients with respect to copies of ``leaves``.

    Args:
        function (callable): takes the list of leaves and returns a scalar.
        leaves (list[Tensor]): what gets gradients; strides are kept.
        upstream (float): the gradient that the scalar receives.
    """
    # No clone: it would make an expanded or sliced tensor dense.
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves, torch.tensor(upstream).to(loss))


def assert_as_exact(function, leaves, dtype, upstream=3.0):
    """The rule above, for ``function(leaves, impl)``, of leaves given in ``dtype``.

    Four units in the last place of the loss are always allowed, and of a gradient a quarter of one
    (two where there are so few elements that their errors do not average).
    """
    exact, exact_gradients = loss_and_gradients(
        lambda x: function(x, "reference"), [x.double() for x in leaves], upstream
    )
    results = {}
    for impl in IMPLS:
        results[impl] = loss_and_gradients(lambda x, impl=impl: function(x, impl), leaves, upstream)
    (fused, gradients), (plain, plain_gradients) = results["fused"], results["reference"]
    assert fused.dtype == plain.dtype == torch.promote_types(dtype, torch.float32)
    unit = torch.finfo(fused.dtype).eps * exact.abs()
    assert (fused.double() - exact).abs() <= 2 * (plain.double() - exact).abs() + 4 * unit
    for x, g, plain_g, exact_g in zip(
        leaves, gradients, plain_gradients, exact_gradients, strict=True
    ):
        assert g.dtype == dtype and g.shape == x.shape
        error, plain_error = (g.double() - exact_g).norm(), (plain_g.double() - exact_g).norm()
        slack = 0.25 if x.numel() > 100 else 2
        assert error <= 2 * plain_error + slack * torch.finfo(dtype).eps * exact_g.norm()


def assert_same_for_any_number_of_threads(run, repeat=1):
    """``run()`` returns a tensor and a list of gradients that are equal bit for bit."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3) * repeat:
            torch.set_num_threads(count)
            value, gradients = run()
            results.append([value, *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class OperatorCalls(TorchDispatchMode):
    """Records the operators that run inside it, below autograd.

    Attributes:
        names (list[str]): for example ``aten.mul.Tensor`` or ``hkd_d2.kl_distillation_loss``.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def assert_one_operator_each_way(function, leaves, name):
    """One forward and one backward operator of ours, and nothing of PyTorch's that computes."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    upstream = torch.ones((), dtype=torch.promote_types(leaves[0].dtype, torch.float32))
    with OperatorCalls() as calls:
        torch.autograd.grad(function(leaves), leaves, upstream)
    views = {"detach", "view", "alias", "slice", "select", "unbind", "promote_types"}
    called = [n for n in calls.names if n.split(".")[1] not in views or n.startswith("hkd_d2")]
    assert called == [f"hkd_d2.{name}", f"hkd_d2.{name}_backward"]
