"""The public list of the package: lazy, complete, documented and visible to type checkers."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hkd_d2
from helpers.rules import rule

ROOT = Path(hkd_d2.__file__).parent


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )


@rule("import hkd_d2 imports nothing else")
def test_importing_the_package_imports_nothing_else():
    done = python(
        "import sys; before = set(sys.modules); import hkd_d2\n"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {*sys.stdlib_module_names})\n"
        "print([m for m in sys.modules if m.startswith('hkd_d2.')])"
    )
    assert done.stdout.splitlines() == ["{'hkd_d2'}", "[]"], done.stderr


def test_the_miss_rate_imports_neither_torch_nor_detectron2():
    done = python(
        "import sys, hkd_d2; hkd_d2.evaluate_miss_rate\n"
        "print([m for m in ('torch', 'detectron2', 'scipy') if m in sys.modules])"
    )
    assert done.stdout.split() == ["[]"], done.stderr


@pytest.mark.parametrize("name", hkd_d2.__all__)
def test_every_name_is_there_and_documented(name):
    value = getattr(hkd_d2, name)
    assert value is getattr(sys.modules[f"hkd_d2.{hkd_d2._PUBLIC[name]}"], name)
    assert name in dir(hkd_d2)
    text = value.__doc__ if name == "TERM_REGISTRY" else inspect.getdoc(value)
    inherited = inspect.isclass(value) and value.__doc__ is None
    # A dataclass without a docstring has its signature for one.
    assert text and not inherited and not text.startswith(f"{name}("), name
    if inspect.isfunction(value):
        hints = inspect.signature(value)
        assert hints.return_annotation is not inspect.Signature.empty, name
        for parameter in hints.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter}"


def test_the_lists_agree():
    """What runs, what `import *` gives and what a type checker sees."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    seen = {a.asname: n.module for n in block.body for a in n.names}
    assert seen == {name: f"hkd_d2.{module}" for name, module in hkd_d2._PUBLIC.items()}
    assert sorted(hkd_d2.__all__) == hkd_d2.__all__ == sorted(hkd_d2._PUBLIC)
    assert (ROOT / "py.typed").exists()


def test_packages_are_attributes():
    packages = [m.name for m in pkgutil.iter_modules(hkd_d2.__path__) if m.ispkg]
    assert {*packages, "config"} == {*hkd_d2._SUBMODULES}
    for name in hkd_d2._SUBMODULES:
        assert getattr(hkd_d2, name) is importlib.import_module(f"hkd_d2.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hkd_d2.nothing  # noqa: B018
