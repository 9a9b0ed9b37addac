"""Silence what newer PyTorch says of how Detectron2 uses it; for command lines, not for libraries.

import hkd_d2._quiet  # noqa: F401  isort: skip
"""

import logging
import warnings

warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
