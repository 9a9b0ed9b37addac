#!/usr/bin/env bash
# Run tests/ops and the tests of the compiled miss rate with the modules under AddressSanitizer and
# UndefinedBehaviorSanitizer, which end the run at the first access out of bounds, overflow or float
# that does not fit its integer. Takes minutes. Builds in a temporary copy. Arguments go to pytest in
# place of these tests; HKD_CPU_ISA chooses the instruction set.
#
#   PYTHON   interpreter with PyTorch and pytest (.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE csrc hkd_d2 tests "$copy"
cd "$copy"
rm -f hkd_d2/*.so
SANITIZE=1 HKD_NO_CUDA=1 "$PYTHON" setup.py build_ext --inplace >build.log || { cat build.log; exit 1; }

# The runtime has to be there before Python allocates, and the C++ library before the runtime looks
# for its exceptions. Python itself leaks by design.
cxx=${CXX:-c++}
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
"$PYTHON" - <<'END'
from hkd_d2.ops import build_info

flags = build_info()["flags"]
assert "-fsanitize=address,undefined" in flags, flags
END
# A report goes to the terminal, not into pytest's capture, which would end with the process.
[ $# -gt 0 ] || set -- tests/ops tests/evaluation/test_native_miss_rate.py
"$PYTHON" -m pytest --capture=sys -p no:cacheprovider "$@"
