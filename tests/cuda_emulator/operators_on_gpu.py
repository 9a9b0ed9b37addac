"""The CUDA kernels of a GPU in place of the CPU kernels of this process.

As a pytest plugin (``-p cuda_emulator.operators_on_gpu``) it makes the CPU kernels' tests prove
them: an operator that gets tensors of the CPU copies them to the GPU, strides and all, runs there
and copies its results back.
"""

import torch
from torch.utils._pytree import tree_map_only


def to_gpu(tensor):
    """A copy with the strides of the tensor, also where these overlap or leave gaps."""
    storage = tensor.untyped_storage().cuda()
    empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def redirect():
    """Register the detour for every operator, and return what keeps it registered.

    Raises:
        RuntimeError: an operator has no CUDA kernel.
    """
    import hkd_d2._C  # noqa: F401  the schemas, and the kernels that are replaced
    import hkd_d2._C_cuda  # noqa: F401
    from hkd_d2.ops._library import OPERATORS

    library = torch.library.Library("hkd_d2", "IMPL")
    for operator in OPERATORS:
        for name in (operator, f"{operator}_backward"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"hkd_d2::{name}", "CUDA"):
                raise RuntimeError(f"hkd_d2::{name} has no CUDA kernel.")
            library.impl(name, detour(name), "CPU", allow_override=True)
    return library


def detour(name):
    """The operator for tensors of the CPU, by its CUDA kernel."""
    operator = getattr(torch.ops.hkd_d2, name).default

    def run(*args):
        results = operator(*tree_map_only(torch.Tensor, to_gpu, args))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)

    return run


def pytest_configure(config):
    config.operators_on_gpu = redirect()


def pytest_report_header(config):
    name = torch.cuda.get_device_name()
    return f"hkd_d2 operators: the CUDA kernels on {name} replace the CPU kernels"
