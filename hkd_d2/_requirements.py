"""Says in one sentence how to install what pip cannot choose; imported before what needs it.

import hkd_d2._requirements  # noqa: F401  isort: skip
"""

import importlib

_COMMANDS = {
    "torch": "pip install torch torchvision",
    "torchvision": "pip install torchvision",
    "detectron2": "pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git'",
}

for _module, _command in _COMMANDS.items():
    try:
        importlib.import_module(_module)
    except ModuleNotFoundError as error:
        if error.name != _module:
            raise
        raise ImportError(
            f"hkd_d2 needs {_module}, which is not installed; install it with: {_command}"
        ) from None
