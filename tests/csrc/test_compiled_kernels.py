"""What nvcc makes of the kernels: no warning, no spill, registers in budget, wide accesses.

``kernel_budgets.txt`` has what each kernel may use, the most over architectures and variants. A
variant that computes in double has a line of its own. Registers are counted in eights, as the
hardware allots them.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from cuda_emulator import cuda_sources
from helpers.rules import rule

pytestmark = rule("nvcc warns of nothing, spills nothing and stays within kernel_budgets.txt")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
BUDGETS = Path(__file__).with_name("kernel_budgets.txt")
# Kernels that read or write 16 bytes at a time in some variant, on every architecture.
WIDE_LOADS = {
    "adaptive_kernel",
    "adaptive_backward_kernel",
    "bounded_kernel",
    "bounded_backward_kernel",
    "distance_kernel",
    "moments_kernel",
    "gradient_kernel",
    "adapted_distance_kernel",
    "adapted_moments_kernel",
    "adapted_gradient_kernel",
    "roi_align_kernel",
    "roi_difference_kernel",
    "roi_difference_backward_kernel",
    "roi_difference_scatter_kernel",
}
WIDE_STORES = {
    "adaptive_backward_kernel",
    "bounded_backward_kernel",
    "gradient_kernel",
    "adapted_gradient_kernel",
    "input_gradient_kernel",
    "roi_align_backward_kernel",
    "roi_difference_backward_kernel",
}
# Add to memory by reductions, four numbers at once from sm_90 on.
SCATTER = {"roi_align_scatter_kernel", "roi_difference_scatter_kernel"}
# Compute in double what is a few numbers, sums that cancel, or boxes that are given in double; the
# losses of logits where a block that is alone finishes the loss.
DOUBLE = {
    "finish_loss_kernel",
    "adaptive_kernel",
    "bounded_kernel",
    "soft_targets_kernel",
    "cell_weights_kernel",
    "nearest_anchor_kernel",
    "correlation_kernel",
    "finish_imitation_kernel",
    "finish_adapters_kernel",
    "bias_gradient_kernel",
}


def demangled(names):
    """{symbol: (name, whether it computes in double)}"""
    texts = subprocess.run(
        ["c++filt", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kernels = {}
    for symbol, text in zip(names, texts, strict=True):
        name, arguments = re.search(r"(\w+)(<[^()]*>)?\((?!anonymous)", text).groups()
        kernels[symbol] = (name, "double" in (arguments or ""))
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """[(kernel, in double, architecture, registers, bytes of shared memory)], {(file, arch): cubin}

    Warnings, spills and local memory are errors here.
    """
    folder = tmp_path_factory.mktemp("cubin")
    cubins, commands = {}, []
    for source in cuda_sources.kernels():
        for architecture in ARCHITECTURES:
            cubin = folder / f"{source.stem}.{architecture}.cubin"
            cubins[source, architecture] = cubin
            commands.append(
                [
                    *(cuda_sources.nvcc(), "-std=c++17", f"-arch={architecture}", "-cubin"),
                    *(f"-I{cuda_sources.CSRC}", f"-I{cuda_sources.CSRC / 'include'}"),
                    *("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"),
                    *("-Xcompiler", "-Wall,-Werror", source, "-o", cubin),
                ]
            )
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?Used (\d+) registers([^\n]*)", re.DOTALL
    )
    found = [use for output in cuda_sources.run_all(commands) for use in pattern.findall(output)]
    names = demangled(sorted({symbol for symbol, *_ in found}))
    uses = [
        (*names[symbol], architecture, int(registers), int(shared.group(1)) if shared else 0)
        for symbol, architecture, registers, rest in found
        for shared in [re.search(r"(\d+) bytes smem", rest)]
    ]
    return uses, cubins


def test_every_kernel_compiles_for_every_architecture_within_its_budget(compiled):
    uses, _ = compiled
    most = defaultdict(lambda: (0, 0))
    architectures = defaultdict(set)
    for name, in_double, architecture, registers, shared in uses:
        key = f"{name}<double>" if in_double else name
        most[key] = tuple(map(max, most[key], (-(-registers // 8) * 8, shared)))
        architectures[key].add(architecture)
    assert all(compiled_for == set(ARCHITECTURES) for compiled_for in architectures.values())
    header, *lines = BUDGETS.read_text().splitlines()
    version = header.split()[-1]
    if f"release {version}," not in cuda_sources.run([cuda_sources.nvcc(), "--version"]):
        pytest.skip(f"the budgets are those of nvcc {version}")
    table = [f"{key} {registers} {shared}" for key, (registers, shared) in sorted(most.items())]
    budgets = {key: tuple(map(int, numbers)) for key, *numbers in map(str.split, lines)}
    within = budgets.keys() == most.keys() and all(
        used <= allowed
        for key in most
        for used, allowed in zip(most[key], budgets[key], strict=True)
    )
    assert within, f"in place of {BUDGETS.name}:\n" + "\n".join([header, *table])


@pytest.fixture(scope="module")
def instructions(compiled):
    """{(kernel, in double, architecture): set of instructions}"""
    cuobjdump, nvdisasm = map(cuda_sources.binary_tool, ("cuobjdump", "nvdisasm"))
    found = defaultdict(set)
    for (_, architecture), cubin in compiled[1].items():
        # cuobjdump looks for nvdisasm on the path.
        text = cuda_sources.run(
            [cuobjdump, "-sass", cubin], env={"PATH": str(Path(nvdisasm).parent)}
        )
        functions = re.split(r"Function : (\w+)", text)[1:]
        names = demangled(functions[::2]) if functions else {}
        for symbol, body in zip(functions[::2], functions[1::2], strict=True):
            found[(*names[symbol], architecture)].update(
                re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Za-z0-9_.]+)", body)
            )
    return found


def test_instructions(instructions):
    for (name, in_double, architecture), used in instructions.items():
        where = f"{name} on {architecture}"
        if not in_double and name not in DOUBLE:
            doubles = {i for i in used if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", i)}
            assert not doubles, f"{where} computes in double: {doubles}"
        assert not {i for i in used if re.match(r"ATOMS?G?\..*CAS", i)}, f"{where} has a CAS loop"
        assert not {i for i in used if re.match(r"(LDL|STL)", i)}, f"{where} uses local memory"


@pytest.mark.parametrize("kernels, pattern", [(WIDE_LOADS, "LDG"), (WIDE_STORES, "STG")])
def test_sixteen_bytes_at_once(instructions, kernels, pattern):
    for architecture in ARCHITECTURES:
        for kernel in kernels:
            used = instructions[kernel, False, architecture]
            wide = {i for i in used if re.match(rf"{pattern}\..*128", i)}
            assert wide, f"{kernel} on {architecture} has no 128-bit {pattern}"


def test_reductions_of_four_numbers(instructions):
    for (kernel, _, architecture), used in instructions.items():
        reductions = {i for i in used if re.match(r"(RED|ATOM)", i)}
        wide = {i for i in reductions if re.match(r"REDG\..*ADD\.F32x4\b", i)}
        where = f"{kernel} on {architecture}: {reductions}"
        assert bool(reductions) == (kernel in SCATTER), where
        assert bool(wide) == (kernel in SCATTER and architecture != "sm_80"), where
        # Nothing comes back from memory.
        assert all(i.startswith("RED") for i in reductions), where
