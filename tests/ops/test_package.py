"""What `import hkd_d2.ops` needs and gives, and how ``impl`` chooses."""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hkd_d2 import ops
from hkd_d2.ops import _library, reference

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    "adaptive_distillation_loss",
    "feature_imitation_loss",
    "kl_distillation_loss",
    "multilevel_roi_align",
    "roi_distillation_loss",
]


def run_without(blocked, code):
    """Run code in a new interpreter where importing ``blocked`` packages fails."""
    prelude = f"""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {set(blocked)!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Block())
        sys.path.insert(0, {str(ROOT)!r})
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_ops_work_with_pytorch_alone():
    blocked = ["detectron2", "torchvision", "fvcore", "cv2", "scipy", "matplotlib", "pycocotools"]
    result = run_without(
        blocked,
        """
        import hkd_d2
        assert "torch" not in sys.modules
        import torch
        ops = hkd_d2.ops
        maps = [torch.randn(1, 2, 8, 8, requires_grad=True)]
        boxes = [torch.tensor([[1.0, 1.0, 20.0, 20.0]])]
        ops.roi_distillation_loss(maps, [maps[0] + 1], boxes, strides=[4]).backward()
        print(ops.kl_distillation_loss(torch.zeros(1, 2), torch.ones(1, 2), impl="fused").item())
        print(sorted(m for m in sys.modules if m.startswith("hkd_d2.") and m.count(".") == 1))
        """,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0.0", "['hkd_d2._C', 'hkd_d2.ops']"]


@pytest.mark.parametrize(
    "missing, module",
    [
        ("detectron2", "hkd_d2.config"),
        ("detectron2", "hkd_d2.data"),
        ("detectron2", "hkd_d2.engine"),
        ("detectron2", "hkd_d2.modeling.meta_arch"),
        ("torchvision", "hkd_d2.distillation"),
        ("torch", "hkd_d2.config"),
        ("torch", "hkd_d2.ops"),
    ],
)
def test_what_is_missing_is_one_sentence(missing, module):
    result = run_without([missing], f"import {module}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: hkd_d2") and "pip install" in last
    assert missing in last.lower() or "pytorch" in last.lower()


def test_without_the_compiled_module_the_definitions_run():
    result = run_without(
        [],
        """
        import builtins, torch
        sys.modules["hkd_d2._C"] = None  # importing it raises ModuleNotFoundError
        from hkd_d2.ops import kl_distillation_loss
        x = torch.randn(3, 2)
        assert kl_distillation_loss(x, x).item() == 0
        try:
            kl_distillation_loss(x, x, impl="fused")
        except RuntimeError as error:
            print(error)
        """,
    )
    assert result.returncode == 0, result.stderr
    assert "kl_distillation_loss is not compiled for cpu in this installation" in result.stdout


@pytest.mark.parametrize("name", OPERATORS)
def test_definition_and_operator_share_signature_and_docstring(name):
    operator, definition = getattr(ops, name), getattr(reference, name)
    parameters = dict(inspect.signature(operator).parameters)
    assert parameters.pop("impl").default is None
    assert parameters == dict(inspect.signature(definition).parameters)
    assert operator.__doc__.startswith(definition.__doc__) and "``impl``" in operator.__doc__


def test_impl_chooses(monkeypatch):
    x = torch.randn(3, 2, requires_grad=True)
    nodes = {
        impl: type(ops.kl_distillation_loss(x, x.detach() + 1, impl=impl).grad_fn).__name__
        for impl in (None, "fused", "reference")
    }
    assert "hkd_d2" in nodes["fused"] and nodes[None] == nodes["fused"]
    assert "hkd_d2" not in nodes["reference"]
    with pytest.raises(ValueError, match="impl is 'eager'; choose from None, fused, reference"):
        ops.kl_distillation_loss(x, x, impl="eager")
    monkeypatch.setattr(_library, "COMPILED", frozenset())
    assert "hkd_d2" not in type(ops.kl_distillation_loss(x, x + 1).grad_fn).__name__


@pytest.mark.parametrize("name", OPERATORS)
def test_fused_insists(name):
    if (name, "cpu") in _library.COMPILED:
        pytest.skip("compiled for the CPU")
    maps = [torch.zeros(1, 2, 4, 4)]
    with pytest.raises(RuntimeError, match=f"{name} is not compiled for cpu"):
        getattr(ops, name)(maps, maps, impl="fused")


def test_submodules_are_lazy_and_unknown_names_are_refused():
    import hkd_d2

    assert hkd_d2.ops is ops and "evaluation" in dir(hkd_d2)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hkd_d2.nothing  # noqa: B018
