#!/usr/bin/env bash
# Install Detectron2 beside an interpreter that has PyTorch: from upstream's git, or, where git's
# host cannot be reached, upstream's code as a wheel of known checksum.
#
#   tools/install_detectron2.sh [python]
set -euo pipefail

py=${1:-python3}
upstream=https://github.com/facebookresearch/detectron2.git
wheel=sal-detectron2==0.7.2
sha256=491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561
say() { printf '\n== %s\n' "$*"; }
pip() { $py -m pip --disable-pip-version-check --quiet "$@"; }

if command -v git >/dev/null && GIT_TERMINAL_PROMPT=0 timeout 30 git ls-remote "$upstream" HEAD >/dev/null 2>&1; then
    say "Detectron2 from $upstream"
    if pip install --no-build-isolation "git+$upstream"; then
        exit
    fi
    say "Detectron2 from $upstream did not build"
fi

say "Detectron2: $upstream cannot be used here, so upstream's code is taken from the wheel $wheel"
echo "   (without Detectron2's own compiled operators, which this project does not use)"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# The wheel is tagged for one Python, but only its Python files are used.
pip download --no-deps --only-binary=:all: --python-version 3.10 --implementation cp --abi none \
    --platform any --dest "$folder" "$wheel"
file=$(echo "$folder"/*.whl)
found=$($py -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$file")
if [ "$found" != "$sha256" ]; then
    echo "The wheel $wheel has the sha256 $found instead of $sha256; it is not installed." >&2
    exit 1
fi
echo "   sha256 verified: $sha256"
pip install 'setuptools<81' fvcore iopath omegaconf hydra-core yacs pycocotools cloudpickle tabulate \
    termcolor tensorboard black pillow matplotlib
$py - "$file" <<'EOF'
import sys, sysconfig, zipfile

site = sysconfig.get_paths()["purelib"]
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [n for n in wheel.namelist() if n.startswith("detectron2/") and not n.endswith(".so")]
    wheel.extractall(site, names)
print(f"   {len(names)} files of detectron2 in {site}")
EOF
