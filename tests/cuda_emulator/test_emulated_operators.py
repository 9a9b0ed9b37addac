"""The CUDA kernels' own text, run on the CPU by the tests of the CPU kernels, and mutated."""

import json
import os
import re
import subprocess
import sys

import pytest

from cuda_emulator import cuda_sources
from helpers.rules import rule

pytestmark = rule(
    "CUDA kernels pass the CPU kernels' tests in an emulator, which sees every dropped barrier"
)

# Test files whose operators have CUDA kernels.
FILES = [
    "tests/ops/test_feature_imitation.py",
    "tests/ops/test_logit_distillation.py",
    "tests/ops/test_roi_operators.py",
]
# Their backward has two plans, of which HKD_ROI_BACKWARD chooses.
ROI_FILES = ["tests/ops/test_roi_operators.py"]
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
        "finish_loss_kernels.cu",
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
        "roi_align/roi_gradients.cuh",
        "range.bottom > tile.top &&",
        "range.bottom > tile.top + 4 &&",
    ),
    (
        "roi_align/roi_kernels.cuh",
        "end = min(begin + kSamples, range.count);",
        "end = min(begin + kSamples + 1, range.count);",
    ),
    (
        "roi_align/roi_gradients.cuh",
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
        "*value = scale * slope_of(distance, *value);",
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
# Of the scattering plan.
SCATTER_MUTATIONS = [
    (
        "roi_align/roi_gradients.cuh",
        "top < touched.bottom; top += kCellRows) {",
        "top < touched.bottom - kCellRows; top += kCellRows) {",
    ),
    (
        "roi_align/roi_gradients.cuh",
        "const bool whole_rows = width % 4 == 0",
        "const bool whole_rows = width % 4 >= 0",
    ),
    (
        "roi_align/roi_gradients.cuh",
        "weights.rows[own_row][bin_y] * of_column;",
        "weights.rows[own_row][bin_y];",
    ),
    (
        "roi_align/roi_gradients.cuh",
        "const int64_t y = top + own_row,",
        "const int64_t y = top + own_row + 1,",
    ),
    (
        "roi_align/roi_gradients.cuh",
        "if (!(levels >> roi.level & 1) ||",
        "if (",
    ),
    (
        "roi_align/roi_align_kernels.cu",
        "load_bins(upstream, sampling, row - begin, range, tile);\n      });\n}\n\n} // namespace",
        "load_bins(upstream, sampling, row, range, tile);\n      });\n}\n\n} // namespace",
    ),
    (
        "roi_distillation/roi_distillation_kernels.cu",
        "differentiate<4>(comparison.distance, load<float>(loss_scale), range, tile);",
        "differentiate<4>(comparison.distance, 1.0f, range, tile);",
    ),
]


def environment(library, tmp_path, plan="gather"):
    """Variables for a process that loads the emulated operators, sanitized or not."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(cuda_sources.ROOT), str(cuda_sources.ROOT / "tests")]),
        "HKD_EMULATED": str(library),
        "HKD_EMULATED_RAN": str(tmp_path / "ran.json"),
        "OMP_NUM_THREADS": "1",
        "HKD_ROI_BACKWARD": plan,
    }
    if b"__asan_init" in library.read_bytes():
        # ASan has to be there first, and finds the exceptions' library only if that is there too.
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        found = (cuda_sources.run(["g++", f"-print-file-name={n}"]).strip() for n in names)
        variables |= {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    return variables


def program(library, what, tmp_path, plan="gather"):
    """The finished process of ``emulated_operators.py``."""
    file = cuda_sources.ROOT / "tests" / "cuda_emulator" / "emulated_operators.py"
    return subprocess.run(
        [sys.executable, str(file), library, *what.split()],
        capture_output=True,
        text=True,
        env=environment(library, tmp_path, plan),
    )


def answer(library, what, tmp_path, plan="gather"):
    done = program(library, what, tmp_path, plan)
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
    ran = set()
    for plan, files in (("gather", FILES), ("scatter", ROI_FILES)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "cuda_emulator.emulated_operators",
                *files,
            ],
            capture_output=True,
            text=True,
            cwd=cuda_sources.ROOT,
            env=environment(library, tmp_path, plan),
        )
        assert done.returncode == 0, plan + done.stdout[-6000:] + done.stderr[-3000:]
        ran |= set(json.loads((tmp_path / "ran.json").read_text()))
    assert ran == names_of_kernels()


def test_no_result_depends_on_the_order_of_threads_and_blocks(tmp_path):
    assert answer(cuda_sources.emulated_operators(), "orders", tmp_path) == []


def test_scattering_gives_way_to_deterministic_algorithms(tmp_path):
    library = cuda_sources.emulated_operators()
    # Scattered sums do depend on the order: the plan is taken, and the emulator shows it.
    assert answer(library, "orders", tmp_path, "scatter")
    assert answer(library, "deterministic_orders", tmp_path, "scatter") == []


def test_logit_losses_take_few_launches(tmp_path):
    """One where a block does it all, as for two images; two where sums of blocks are added up."""
    assert answer(cuda_sources.emulated_operators(), "launches", tmp_path) == {
        "kl, 2 images": [1, 1],
        "bounded, 2 images": [1, 1],
        "kl, 4 images": [2, 1],
        "bounded, 4 images": [2, 1],
        "dense kl": [2, 1],
        "adaptive": [2, 1],
    }


def test_an_unknown_plan_is_refused(tmp_path):
    call = """
import sys
import torch
from cuda_emulator.emulated_operators import Emulator

Emulator(sys.argv[1])
pooled, boxes = torch.zeros(0, 1, 1, 1), torch.zeros(0, 4)
torch.ops.hkd_d2.multilevel_roi_align_backward(
    pooled, [boxes], [4.0], 0, [1], [1], [False], False
)
"""
    library = cuda_sources.emulated_operators()
    done = subprocess.run(
        [sys.executable, "-c", call, str(library)],
        capture_output=True,
        text=True,
        env=environment(library, tmp_path, "scattered"),
    )
    assert (
        done.returncode
        and "HKD_ROI_BACKWARD is 'scattered'; give gather, scatter or auto." in done.stderr
    )


def test_every_dropped_barrier_is_noticed(tmp_path):
    library = cuda_sources.emulated_operators()
    found = answer(library, "barriers", tmp_path)
    # Those of the scattering plan are reached by it alone.
    missed = [place for place, noticed in found.items() if not noticed]
    found |= answer(library, " ".join(["barriers", *missed]), tmp_path, "scatter") if missed else {}
    assert len(missed) in range(1, len(found)) and all(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["gather", "scatter"])
def test_the_small_calls_are_right_without_a_mutation(plan, tmp_path):
    assert answer(cuda_sources.emulated_operators(sanitize=True), "compare", tmp_path, plan) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, text, mutation, plan",
    [
        *((*mutation, "gather") for mutation in MUTATIONS),
        *((*mutation, "scatter") for mutation in SCATTER_MUTATIONS),
    ],
    ids=lambda value: value[:40],
)
def test_mutations_are_caught(file, text, mutation, plan, tmp_path):
    library = cuda_sources.emulated_operators(
        sanitize=True, replace=(cuda_sources.CSRC / file, text, mutation)
    )
    folder = file.rpartition("/")[0]
    done = program(library, f"compare {folder}", tmp_path, plan)
    told = "AddressSanitizer" in done.stderr or "runtime error" in done.stderr
    assert told or (done.returncode == 0 and json.loads(done.stdout) != []), done.stderr[-3000:]
