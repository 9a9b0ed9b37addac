"""Says in one sentence how to install what pip cannot choose: imported before Detectron2 is.

import hkd_d2._requirements  # noqa: F401  isort: skip
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ImportError(
        "hkd_d2 needs Detectron2 for everything but hkd_d2.ops; install it with: pip install "
        "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    ) from None
