"""The CUDA kernels' own text, run on the CPU by the tests of the CPU kernels, and mutated."""

import json
import os
import re
import subprocess
import sys

import cuda_sources
import pytest

# Test files whose operators have CUDA kernels.
FILES = [
    "tests/ops/test_feature_imitation.py",
    "tests/ops/test_logit_distillation.py",
    "tests/ops/test_roi_operators.py",
]
# (file, text that occurs in it once, mutation): what a slip of the pen would be.
MUTATIONS = [
    (
        "feature_imitation/cell_weights_kernels.cu",
        "column >= box.left && column < box.right;",
        "column >= box.left && column <= box.right;",
    ),
    (
        "feature_imitation/cell_weights_kernels.cu",
        "return cell < level.cells &&",
        "return cell <= level.cells &&",
    ),
    (
        "feature_imitation/feature_imitation_kernels.cu",
        "const int count = map.channels_last ? channels : limited(cells - cell);",
        "const int count = map.channels_last ? channels : kSide;",
    ),
    (
        "feature_imitation/feature_imitation_kernels.cu",
        "bits >= lanes; bits /= 2",
        "bits > lanes; bits /= 2",
    ),
    (
        "feature_imitation/feature_imitation_kernels.cu",
        "i < level.sum_count; i +=",
        "i <= level.sum_count; i +=",
    ),
    (
        "feature_imitation/adapter_kernels.cu",
        "if (row < count) {",
        "if (row <= count) {",
    ),
    (
        "feature_imitation/adapter_kernels.cu",
        "if (row < c_t && column < c_s) {",
        "if (row < c_t && column <= c_s) {",
    ),
    (
        "logit_distillation/adaptive_distillation_kernels.cu",
        "const int64_t count = stretch.end - i;",
        "const int64_t count = stretch.end - i + 1;",
    ),
    (
        "logit_distillation/bounded_regression_kernels.cu",
        "const bool inside = given < deltas.rows;",
        "const bool inside = given <= deltas.rows;",
    ),
    (
        "logit_distillation/soft_targets_kernels.cu",
        "const bool inside = row < stretch.end;",
        "const bool inside = row <= stretch.end;",
    ),
    (
        "logit_distillation/finish_loss_kernels.cu",
        "i < sums.count; i +=",
        "i <= sums.count; i +=",
    ),
    (
        "roi_align/roi_align_kernels.cu",
        "row >= lists.first_row[list + 1]",
        "row > lists.first_row[list + 1]",
    ),
    (
        "roi_align/roi_align_kernels.cu",
        "group_of(row) < group ? 1 : 0",
        "group_of(row) <= group ? 1 : 0",
    ),
    (
        "roi_align/roi_align_kernels.cu",
        "const bool own = row < end && group_of",
        "const bool own = row <= end && group_of",
    ),
    (
        "roi_align/roi_align_kernels.cu",
        "block.roi * bins.channels * sampling.bins() + bin * bins.bin_stride",
        "block.roi * bins.channels * sampling.bins() + bin * bins.bin_stride + 1",
    ),
    (
        "roi_align/roi_kernels.cuh",
        "range.bottom > tile.top &&",
        "range.bottom > tile.top + 4 &&",
    ),
    (
        "roi_align/roi_kernels.cuh",
        "end = min(begin + kSamples, range.count);",
        "end = min(begin + kSamples + 1, range.count);",
    ),
    (
        "roi_align/roi_kernels.cuh",
        "if (y >= height || x >= width) {",
        "if (y > height || x >= width) {",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "        side == 0 ? Acc(1) : Acc(-1),",
        "        Acc(1),",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "*value = scale * slope_of(comparison.distance, *value);",
        "*value = scale * slope_of(Distance::kMse, *value);",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "if (row < count && at < width_out) {",
        "if (row <= count && at < width_out) {",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "if (row < range.count * sampling.bins() &&",
        "if (row <= range.count * sampling.bins() &&",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "s[c] = scale * (cell.student * s[c] + cell.teacher * t[c]);",
        "s[c] = scale * (cell.student * t[c] + cell.teacher * t[c]);",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "return bin + k < bins && out + c < width_out ? gradients",
        "return bin + k <= bins && out + c < width_out ? gradients",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "for (int bin = warp; bin < bins; bin += kWarps) {",
        "for (int bin = warp; bin <= bins; bin += kWarps) {",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "sum += partial[slice * size + i];",
        "sum = partial[slice * size + i];",
    ),
]


def environment(library, tmp_path):
    """Variables for a process that loads the emulated operators, sanitized or not."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(cuda_sources.ROOT), str(cuda_sources.ROOT / "tests")]),
        "HKD_EMULATED": str(library),
        "HKD_EMULATED_RAN": str(tmp_path / "ran.json"),
        "OMP_NUM_THREADS": "1",
    }
    if b"__asan_init" in library.read_bytes():
        # ASan has to be there first, and finds the exceptions' library only if that is there too.
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        found = (cuda_sources.run(["g++", f"-print-file-name={n}"]).strip() for n in names)
        variables |= {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    return variables


def program(library, what, tmp_path):
    """The finished process of ``emulated_operators.py``."""
    return subprocess.run(
        [sys.executable, str(cuda_sources.ROOT / "tests" / "emulated_operators.py"), library, what],
        capture_output=True,
        text=True,
        env=environment(library, tmp_path),
    )


def answer(library, what, tmp_path):
    done = program(library, what, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def names_of_kernels():
    """Every __global__ function of csrc/."""
    pattern = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")
    return {name for path in cuda_sources.kernels() for name in pattern.findall(path.read_text())}


@pytest.mark.parametrize(
    "sanitize", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "sanitized"]
)
def test_the_cpu_kernels_tests_pass_and_run_every_kernel(sanitize, tmp_path):
    library = cuda_sources.emulated_operators(sanitize)
    variables = environment(library, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_operators", *FILES],
        capture_output=True,
        text=True,
        cwd=cuda_sources.ROOT,
        env=variables,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    ran = set(json.loads((tmp_path / "ran.json").read_text()))
    assert ran == names_of_kernels()


def test_no_result_depends_on_the_order_of_threads_and_blocks(tmp_path):
    assert answer(cuda_sources.emulated_operators(), "orders", tmp_path) == []


def test_every_dropped_barrier_is_noticed(tmp_path):
    found = answer(cuda_sources.emulated_operators(), "barriers", tmp_path)
    assert found and all(found.values()), found


@pytest.mark.slow
def test_the_small_calls_are_right_without_a_mutation(tmp_path):
    assert answer(cuda_sources.emulated_operators(sanitize=True), "compare", tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("file, text, mutation", MUTATIONS, ids=lambda value: value[:40])
def test_mutations_are_caught(file, text, mutation, tmp_path):
    library = cuda_sources.emulated_operators(
        sanitize=True, replace=(cuda_sources.CSRC / file, text, mutation)
    )
    done = program(library, "compare", tmp_path)
    told = "AddressSanitizer" in done.stderr or "runtime error" in done.stderr
    assert told or (done.returncode == 0 and json.loads(done.stdout) != []), done.stderr[-3000:]
