"""Installing into an environment that has PyTorch, or lacks it. Slow: each case compiles."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import hkd_d2

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is installed, without anything built."""
    copy = tmp_path / "checkout"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("hkd_d2", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=built)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture
def environment(tmp_path):
    """A new virtual environment; call it with commands for its Python."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"

    def run(*command, **options):
        return subprocess.run([python, *command], capture_output=True, text=True, **options)

    run.site_packages = Path(run("-c", "import site; print(site.getsitepackages()[0])").stdout[:-1])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "shared"])
def test_editable_install(isolation, checkout, environment, tmp_path):
    # The new environment sees PyTorch and setuptools of this one, but not its own hkd_d2.
    this = sysconfig.get_paths()["purelib"]
    (environment.site_packages / "parent.pth").write_text(f"{this}\n")
    install = environment("-m", "pip", "install", "--no-deps", *isolation, "-e", checkout)
    if "No matching distribution found for setuptools" in install.stdout + install.stderr:
        pytest.skip("build isolation needs a package index")
    assert install.returncode == 0, install.stdout + install.stderr

    program = (
        "import torch, hkd_d2, hkd_d2._C; from hkd_d2.ops import kl_distillation_loss as kl; "
        "print(hkd_d2.__version__, hkd_d2.__file__, hkd_d2._C.__file__); "
        "print(kl(torch.zeros(1, 2), torch.zeros(1, 2), impl='fused').item())"
    )
    result = environment("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    version, package, module, loss = result.stdout.split()
    assert version == hkd_d2.__version__ and float(loss) == 0
    assert Path(package).parent == checkout / "hkd_d2"
    assert Path(module).parent == checkout / "hkd_d2"


@pytest.mark.slow
def test_without_pytorch_the_build_says_how_to_install_it(checkout, environment):
    install = environment("-m", "pip", "install", "--no-deps", "-e", checkout)
    output = install.stdout + install.stderr
    if "No matching distribution found for setuptools" in output:
        pytest.skip("build isolation needs a package index")
    assert install.returncode != 0
    assert "which this environment lacks; install it first: pip install torch" in output


def test_the_version_is_in_one_place():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip().splitlines()[-1] == hkd_d2.__version__ == "0.1.0"
