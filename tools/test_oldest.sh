#!/usr/bin/env bash
# Run tests/ops on the oldest PyTorch that the operators are meant for and a newer Python than
# .venv's, with neither Detectron2 nor torchvision: with the modules compiled there, and, where this
# checkout has one, with its own hkd_d2/_C.abi3.so, since one build is to serve all.
# Takes minutes and gigabytes, in a temporary folder. Arguments go to pytest in place of tests/ops.
#
#   PYTHON   interpreter                                    (python3.12)
#   TORCH    what pip installs for PyTorch                   (torch==2.11.*)
#   VENV     environment to keep and use again               (a temporary one)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.12}
TORCH=${TORCH:-torch==2.11.*}
command -v "$PYTHON" >/dev/null || { echo "There is no $PYTHON; set PYTHON to a Python 3.12." >&2; exit 1; }
checkout=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
VENV=$(realpath -sm "${VENV:-$copy/venv}")

if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -m venv "$VENV"
fi
# shellcheck disable=SC2086
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $TORCH numpy pytest hypothesis \
    'setuptools>=77' wheel ninja pybind11

cp -r setup.py pyproject.toml README.md LICENSE csrc hkd_d2 tests "$copy"
cd "$copy"
rm -f hkd_d2/*.so
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HKD_NO_CUDA=1
run() {
    printf '\n== %s\n' "$1"
    "$VENV/bin/python" -m hkd_d2.ops
    "$VENV/bin/python" -m pytest -p no:cacheprovider -rs "${@:2}"
}
"$VENV/bin/python" setup.py build_ext --inplace >build.log || { cat build.log; exit 1; }
run "compiled with this PyTorch" "${@:-tests/ops}"
if [ -e "$checkout/hkd_d2/_C.abi3.so" ]; then
    rm -f hkd_d2/*.so
    cp "$checkout"/hkd_d2/*.so hkd_d2
    run "the operators as compiled in this checkout" "${@:-tests/ops}"
fi
