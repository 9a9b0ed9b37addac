"""The emulator of CUDA that the kernels are tested with: what it computes and what it detects."""

import re
import subprocess

import pytest

from cuda_emulator import cuda_sources

SOURCE = cuda_sources.EMULATOR / "self_test.cu"
SEEDS = range(4)  # ascending, descending, two shuffled orders


def compiled(tmp_path_factory, kind):
    program = tmp_path_factory.getbasetemp() / f"self_test_{kind}"
    if not program.exists():
        flags = cuda_sources.SANITIZE if kind == "sanitized" else ()
        cuda_sources.run([*cuda_sources.emulated("-O1", *flags), SOURCE, "-o", program])
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return compiled(tmp_path_factory, "plain")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return compiled(tmp_path_factory, "sanitized")


@pytest.fixture(params=["plain", "sanitized"])
def program(request):
    return request.getfixturevalue(request.param)


def outcome(program, case, seed=0, *dropped):
    done = subprocess.run(
        [str(program), case, str(seed), *map(str, dropped)],
        capture_output=True,
        text=True,
        # Threads that an error leaves behind in a kernel leak what they hold.
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def expected(case):
    if case == "sum_rows":
        return [sum(i % 7 for i in range(r * 301, (r + 1) * 301)) for r in range(3)]
    if case == "reverse_twice":
        return [i + 2 for i in range(64)]
    if case.startswith("axpy"):
        return [2 * i + 0.5 for i in range(70)]
    if case == "count_odd":
        numbers = [i * i % 11 for i in range(96)]
        return [sum(n % 2 for n in numbers), sum(numbers), 96, 0, -sum(numbers)]
    assert case == "shuffles"
    groups = [10000 * (lane % 8 + 1) + 100 * 8 + min(lane + 1, 31) for lane in range(32)]
    return [n + 1000000 * (lane < 16) for lane, n in enumerate(groups)]


@pytest.mark.parametrize(
    "case", ["sum_rows", "reverse_twice", "axpy_half", "axpy_bfloat16", "count_odd", "shuffles"]
)
def test_right_kernels_compute_the_same_in_every_order(program, case):
    for seed in SEEDS:
        code, output = outcome(program, case, seed)
        # bfloat16 keeps 8 bits
        exact = case != "axpy_bfloat16"
        assert code == 0, output
        assert list(map(float, output.split())) == (
            expected(case) if exact else pytest.approx(expected(case), rel=2**-8)
        )


def barriers(kernel):
    """Line numbers of the barriers in a kernel's text."""
    lines = SOURCE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"{kernel}(" in line)
    end = next(i for i in range(start, len(lines)) if lines[i] == "}")
    return [i + 1 for i in range(start, end) if "__syncthreads()" in lines[i]]


@pytest.mark.parametrize("kernel, count", [("sum_rows", 1), ("reverse_twice", 2)])
def test_every_dropped_barrier_changes_the_result(plain, kernel, count):
    lines = barriers(kernel)
    assert len(lines) == count
    for line in lines:
        outputs = {outcome(plain, kernel, seed, SOURCE.name, line) for seed in SEEDS}
        assert len(outputs) > 1


@pytest.mark.parametrize(
    "case, message",
    [
        ("returns_before_barrier", "thread 0 waits at __syncthreads of .*, thread 5 has returned"),
        ("two_barriers", "thread 0 waits at __syncthreads of .*, thread 32 at __syncthreads"),
        ("shuffle_without_a_lane", "waits at __shfl_xor_sync of .*, thread 3 has returned"),
        ("shuffle_from_outside", "takes from lane [0-9]+, outside the mask"),
        ("empty_grid", "refuses a grid of 0 x 1 x 1 blocks"),
        ("tall_grid", "refuses a grid of 1 x 65536 x 1 blocks"),
        ("wide_block", "refuses blocks of 2048 threads"),
        ("much_shared", "refuses 49153 bytes of shared memory"),
    ],
)
def test_wrong_synchronisation_and_launches_are_told(program, case, message):
    for seed in SEEDS:
        code, output = outcome(program, case, seed)
        assert code == 1
        assert re.search(message, output), output


@pytest.mark.parametrize(
    "case", ["writes_past_the_end", "reads_past_static_shared", "reads_past_dynamic_shared"]
)
def test_sanitizers_tell_accesses_out_of_bounds(sanitized, case):
    code, output = outcome(sanitized, case)
    assert code != 0 and ("buffer-overflow" in output or "out of bounds" in output), output


@pytest.mark.parametrize(
    "case", ["reads_unwritten_static_shared", "reads_unwritten_dynamic_shared"]
)
def test_shared_memory_that_nobody_wrote_is_nan(plain, case):
    code, output = outcome(plain, case)
    numbers = output.split()
    assert code == 0 and set(numbers[:32]) == {"1"} and set(numbers[32:]) <= {"nan", "-nan"}
