"""What `import hkd_d2.ops` needs and gives, and how ``impl`` chooses."""

import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import hkd_d2._C  # noqa: F401  the suite fails where the compiled module is missing
from helpers.command import run_code, run_python
from helpers.rules import rule
from hkd_d2 import ops
from hkd_d2.ops import _library, reference

OPERATORS = [
    "adaptive_distillation_loss",
    "bounded_regression_loss",
    "feature_imitation_loss",
    "kl_distillation_loss",
    "multilevel_roi_align",
    "roi_distillation_loss",
    "soft_cross_entropy_loss",
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
    """
    return run_code(textwrap.dedent(prelude) + textwrap.dedent(code), status=None)


@rule("hkd_d2.ops needs PyTorch alone")
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
        ours = {m for m in sys.modules if m.startswith("hkd_d2.") and m.count(".") == 1}
        print(sorted(ours - {"hkd_d2._C_cuda", "hkd_d2._native"}))
        """,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0.0", "['hkd_d2._C', 'hkd_d2.ops']"]


@pytest.mark.parametrize(
    "missing, statement",
    [
        ("detectron2", "import hkd_d2.config"),
        ("detectron2", "from hkd_d2.data import PedestrianMapper"),
        ("detectron2", "import hkd_d2.engine"),
        ("detectron2", "import hkd_d2.modeling.meta_arch"),
        ("torchvision", "import hkd_d2.distillation"),
        ("torch", "import hkd_d2.config"),
        ("torch", "import hkd_d2.ops"),
    ],
)
def test_what_is_missing_is_one_sentence(missing, statement):
    if missing == "detectron2":
        pytest.importorskip("torchvision", reason="torchvision is missing, which is said first")
    result = run_without([missing], statement)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: hkd_d2") and "pip install" in last
    assert missing in last.lower() or "pytorch" in last.lower()


def test_without_the_compiled_module_the_references_run():
    result = run_without(
        [],
        """
        import torch
        for name in ("_C", "_C_cuda", "_native"):
            sys.modules[f"hkd_d2.{name}"] = None  # importing it raises ModuleNotFoundError
        from hkd_d2.ops import build_info, kl_distillation_loss
        x = torch.randn(3, 2)
        assert kl_distillation_loss(x, x).item() == 0
        try:
            kl_distillation_loss(x, x, impl="fused")
        except RuntimeError as error:
            print(error)
        info = build_info()
        assert not any(info["modules"].values()) and "compiler" not in info
        for runs in info["operators"].values():
            assert runs == {"cpu": "reference", "cuda": "reference"}
        import runpy
        runpy.run_module("hkd_d2.ops", run_name="__main__")
        """,
    )
    assert result.returncode == 0, result.stderr
    assert "kl_distillation_loss is not compiled for cpu in this installation" in result.stdout
    assert "hkd_d2._C is not built, or does not fit" in result.stdout


def test_a_module_that_does_not_fit_is_said(tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('undefined symbol')")
    result = run_without(
        [],
        f"""
        import hkd_d2
        hkd_d2.__path__.insert(0, {str(tmp_path)!r})
        print(hkd_d2.ops.build_info()["modules"]["_C"])
        """,
    )
    assert result.stdout.strip() == "False", result.stderr
    assert "hkd_d2._C does not fit PyTorch" in result.stderr
    assert "undefined symbol" in result.stderr


@rule("Every operator is compiled for the CPU")
def test_every_operator_is_compiled_for_the_cpu():
    assert {name for name, device in _library.COMPILED if device == "cpu"} == {*_library.OPERATORS}
    assert {runs["cpu"] for runs in ops.build_info()["operators"].values()} == {"fused"}


def test_build_info_is_that_of_this_build():
    info = ops.build_info()
    # Without the stable ABI of the operators, _native serves one version of Python.
    if not info["modules"]["_native"] and [*Path(hkd_d2.__file__).parent.glob("_native.*")]:
        pytest.skip("hkd_d2._native is built for another Python")
    assert info["modules"] == {"_C": True, "_C_cuda": info["cuda"] is not None, "_native": True}
    assert info["cxx_standard"] >= 17 and "-std=c++17" in info["flags"]
    assert info["compiler"].split()[0] in ("GCC", "Clang")
    assert info["cpu_isa"] in info["cpu_isas"] and info["cpu_isas"][0] == "baseline"
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


def test_the_command_prints_what_runs():
    # The machine's set can be lowered, never raised.
    result = run_python("-m", "hkd_d2.ops", HKD_CPU_ISA="baseline")
    rows = [line.split() for line in result.stdout.splitlines()]
    for name in _library.OPERATORS:
        cuda = "fused" if (name, "cuda") in _library.COMPILED else "reference"
        assert [name, "fused", cuda] in rows
    if ops.build_info()["modules"]["_native"]:
        assert ["instructions", "baseline", "of"] in [row[:3] for row in rows]


@rule("Fused and reference forms of an operator share signature and docstring")
@pytest.mark.parametrize("name", OPERATORS)
def test_reference_and_operator_share_signature_and_docstring(name):
    operator, plain = getattr(ops, name), getattr(reference, name)
    parameters = dict(inspect.signature(operator).parameters)
    assert parameters.pop("impl").default is None
    assert parameters == dict(inspect.signature(plain).parameters)
    assert operator.__doc__.startswith(plain.__doc__) and "``impl``" in operator.__doc__


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
def test_fused_insists(name, monkeypatch):
    monkeypatch.setattr(_library, "COMPILED", frozenset())
    maps = [torch.zeros(1, 2, 4, 4)]
    with pytest.raises(RuntimeError, match=f"{name} is not compiled for cpu"):
        getattr(ops, name)(maps, maps, impl="fused")


def test_submodules_are_lazy_and_unknown_names_are_refused():
    assert hkd_d2.ops is ops and "evaluation" in dir(hkd_d2)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hkd_d2.nothing  # noqa: B018
