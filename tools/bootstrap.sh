#!/usr/bin/env bash
# Make .venv at the root of the repository: PyTorch, Detectron2, and this package with its compiled
# operators. Safe to run again; what is there is kept.
#
#   PYTHON   interpreter to start from, 3.11 or newer       (python3)
#   TORCH    what pip installs for PyTorch and torchvision   (torch==2.14.1 torchvision==0.29.1)
#   EXTRAS   extras of this package                          (dev,timm)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.14.1 torchvision==0.29.1}
EXTRAS=${EXTRAS:-dev,timm}
VENV=.venv
say() { printf '\n== %s\n' "$*"; }

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$PYTHON is older than Python 3.11; set PYTHON to a newer interpreter." >&2
    exit 1
fi
if [ ! -x $VENV/bin/python ]; then
    say "virtual environment $VENV"
    "$PYTHON" -m venv $VENV
fi
py=$VENV/bin/python
pip() { $py -m pip --disable-pip-version-check --quiet "$@"; }
if ! $py -c 'import pkg_resources, wheel, ninja, pybind11' 2>/dev/null; then
    # setuptools 81 dropped pkg_resources, which Detectron2 imports.
    pip install --upgrade pip 'setuptools<81' wheel ninja pybind11
fi

if ! $py -c 'import torch, torchvision' 2>/dev/null; then
    say "PyTorch ($TORCH): the largest part, some minutes on a slow line"
    # shellcheck disable=SC2086
    pip install $TORCH
fi

if ! $py -c 'import detectron2' 2>/dev/null; then
    tools/install_detectron2.sh $py
fi

say "hkd_d2 with its compiled operators"
pip install --no-build-isolation --editable ".[$EXTRAS]"
$py -c "import hkd_d2.config, hkd_d2._C, hkd_d2._native"
say "ready in .venv"
$py -m hkd_d2.ops
