"""Building and installing: what is built where, and what is said where something is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

import hkd_d2
from helpers.rules import rule

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is installed, without anything built."""
    return copy_checkout(tmp_path / "checkout")


def copy_checkout(copy):
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("hkd_d2", "csrc", "configs"):
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


@pytest.fixture
def load_setup(checkout, monkeypatch):
    """A function that gives the checkout's setup.py as a module, as if without a GPU."""
    for name in (
        "FORCE_CUDA",
        "HKD_NO_CUDA",
        "TORCH_CUDA_ARCH_LIST",
        "DEBUG",
        "SANITIZE",
        "CXX",
        "CUDA_HOME",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(checkout)

    def load():
        spec = importlib.util.spec_from_file_location("setup_under_test", checkout / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def write_nvcc(folder, release):
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)


@pytest.mark.parametrize(
    "variable, gpu, pytorch, nvcc, expected",
    [
        (None, False, "13.0", "13.0", None),
        ("FORCE_CUDA", False, "13.0", "13.1", (13, 1)),
        (None, True, "13.0", "13.0", (13, 0)),
        ("HKD_NO_CUDA", True, "13.0", "13.0", None),
        # A GPU alone asks for nothing that is not there
        (None, True, "13.0", None, None),
        # but a request does,
        ("FORCE_CUDA", False, None, "13.0", "is built without CUDA: install a CUDA build"),
        ("FORCE_CUDA", False, "13.0", None, "there is no nvcc: set CUDA_HOME to a CUDA 13.0"),
        # and what is there has to fit.
        ("FORCE_CUDA", False, "13.0", "12.9", "is of CUDA 12.9, PyTorch .* of CUDA 13.0; set"),
        (None, True, "12.6", "13.0", "is of CUDA 13.0, PyTorch .* of CUDA 12.6; set"),
    ],
)
def test_cuda_kernels_are_built_where_they_can_be(
    variable, gpu, pytorch, nvcc, expected, load_setup, monkeypatch, tmp_path
):
    module = load_setup()
    if nvcc:
        write_nvcc(tmp_path / "cuda", nvcc)
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(module, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", pytorch)
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=expected):
            module.cuda_toolkit()
    else:
        assert module.cuda_toolkit() == expected


@rule("Every source file is in a module that is built")
@pytest.mark.parametrize(
    "toolkit, architectures",
    [((12, 6), "8.0;9.0+PTX"), ((13, 0), "8.0;9.0;10.0;12.0+PTX")],
)
def test_every_source_has_its_module(toolkit, architectures, load_setup, checkout, monkeypatch):
    module = load_setup()
    monkeypatch.setattr(module, "cuda_toolkit", lambda: toolkit)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(checkout))
    cpu, cuda, native = module.extensions()
    assert [e.name for e in (cpu, cuda, native)] == [
        "hkd_d2._C",
        "hkd_d2._C_cuda",
        "hkd_d2._native",
    ]
    assert {p.suffix for p in map(Path, cuda.sources)} == {".cu", ".cpp"}
    assert "csrc/cuda_module.cpp" in cuda.sources and "cudart_static" in cuda.libraries
    assert "csrc/native.cpp" in native.sources
    assert all(path.startswith(("csrc/native", "csrc/evaluation/")) for path in native.sources)
    assert "-ffp-contract=off" in native.extra_compile_args  # NumPy rounds every step
    files = [
        str(p.relative_to(checkout)) for p in checkout.glob("csrc/**/*.c*") if p.suffix != ".cuh"
    ]
    assert sorted(cpu.sources + cuda.sources + native.sources) == sorted(files)
    assert not any("cuda" in path or path.endswith(".cu") for path in cpu.sources)
    # Options of one do not reach another.
    assert ("USE_CUDA", None) in cuda.define_macros and len(cpu.define_macros) == 1
    assert str(Path(torch.__file__).parent / "include") not in native.include_dirs
    version = "{}.{}".format(*toolkit)
    facts = {
        ("HKD_BUILD_CUDA", f'"{version}"'),
        ("HKD_BUILD_CUDA_ARCHITECTURES", f'"{architectures}"'),
    }
    assert facts <= {*native.define_macros}


def test_without_a_compiler_the_build_says_so(load_setup, monkeypatch):
    module = load_setup()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="needs a C.* compiler, .* no no-such-compiler; install"):
        module.Build(Distribution()).build_extensions()


def test_without_pybind11_the_build_says_so(load_setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match="needs pybind11, .* pip install pybind11"):
        load_setup()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(folder / "checkout")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", folder, "."], cwd=folder / "checkout", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_is_for_one_python_and_the_operators_for_all(wheel):
    tag = "cp{0}{1}-cp{0}{1}-".format(*sys.version_info)
    assert f"-{tag}" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"hkd_d2/_C.abi3.so", f"hkd_d2/_native{suffix}"} <= {*names}
    configs = {f"hkd_d2/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs == {name for name in names if name.endswith(".yaml")}
    workshop = ("benchmarks/", "experiments/", "tests/", "tools/", "configs/")
    assert not [name for name in names if name.startswith(workshop)]


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(wheel, environment, tmp_path):
    # PyTorch, Detectron2 and the dependencies of this environment, but not its hkd_d2.
    this = sysconfig.get_paths()["purelib"]
    (environment.site_packages / "parent.pth").write_text(f"{this}\n")
    install = environment("-m", "pip", "install", "--no-deps", wheel)
    assert install.returncode == 0, install.stdout + install.stderr
    work = tmp_path / "work"
    work.mkdir()
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = environment.site_packages.parents[2] / "bin" / "hkd"

    def hkd(*words):
        done = subprocess.run(
            [command, *words], cwd=work, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = environment("-c", "import hkd_d2; print(hkd_d2.__file__)", cwd=work, env=variables)
    assert Path(where.stdout.strip()).is_relative_to(environment.site_packages)
    assert "_C, " in hkd("info")
    assert "student_citypersons at 1024x2048" in hkd("count", "student_citypersons.yaml")
    size = ("--num-train", "2", "--num-val", "2")
    hkd("data", "streets", "--out", "streets", "--workers", "1", *size)
    hkd("data", "view", "citypersons", "streets", "val", "--out", "samples.png")
    entries = [[f"streets_{s}", "citypersons", "streets", s] for s in ("train", "val")]
    options = ["HKD.DATA.REGISTER", str(entries), "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"]
    hkd("train", "--config-file", "quickstart/student.yaml", "--out", "run", *options)
    model = ("--model", "run/model_final.pth")
    hkd("evaluate", *model, "--data", "citypersons", "streets", "val", "--out", "evaluated")
    assert (work / "evaluated" / "inference").is_dir()
    said = hkd("export", *model, "--format", "onnx", "--out", "ship")
    assert said.startswith("ship/model.onnx: ") and "drawn streets" in said
    said = hkd("detect", "--model", "ship/model.onnx", "streets/leftImg8bit/val", "--out", "found")
    assert said.startswith("2 frames; 2 annotated copies and 1 COCO files in found")
    hkd("data", "check", "citypersons", "streets", "val", "--write-coco")
    truth = "streets/annotations/val_gt.json"
    hkd("score", truth, "evaluated/inference/detections_citypersons_streets_val.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "isolation", [[], ["--no-build-isolation"]], ids=["isolated", "not isolated"]
)
def test_editable_install(isolation, checkout, environment, tmp_path):
    # The new environment sees PyTorch and setuptools of this one, but not its own hkd_d2.
    this = sysconfig.get_paths()["purelib"]
    (environment.site_packages / "parent.pth").write_text(f"{this}\n")
    install = environment("-m", "pip", "install", "--no-deps", *isolation, "-e", checkout)
    if "No matching distribution found for setuptools" in install.stdout + install.stderr:
        pytest.skip("build isolation needs a package index")
    assert install.returncode == 0, install.stdout + install.stderr

    program = (
        "import torch, hkd_d2, hkd_d2._C, hkd_d2._native; "
        "from hkd_d2.ops import kl_distillation_loss as kl; "
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
