"""Configs: read, and with everything registered that they can name.

Importing this module registers the meta-architecture, the backbones, the ignore-aware heads, the
distillation terms and the built-in datasets, so a tool needs nothing but::

    from hkd_d2.config import load_config

    cfg = load_config("configs/hkd_citypersons.yaml")

The keys are in :mod:`hkd_d2.configuration.keys`, and each term's in the file of its class.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip
import importlib
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

# Registrations: importing these modules is all they need.
import hkd_d2.data.datasets  # noqa: F401
import hkd_d2.distillation  # noqa: F401
import hkd_d2.modeling.backbones  # noqa: F401
import hkd_d2.modeling.fcos  # noqa: F401
import hkd_d2.modeling.ignore  # noqa: F401
import hkd_d2.modeling.meta_arch  # noqa: F401
from hkd_d2.configuration.files import find_config
from hkd_d2.configuration.keys import add_hkd_config, default_config, load_mentioned_config
from hkd_d2.configuration.merge import (
    COMMAND_LINE,
    imports_of,
    merge_options,
    merge_section,
    module_names,
    read_config_file,
)
from hkd_d2.configuration.safe_yaml import Section

__all__ = [
    "add_hkd_config",
    "default_config",
    "load_config",
    "load_mentioned_config",
    "student_config",
]


def load_config(file: str | Path | None = None, options: Sequence = ()) -> CfgNode:
    """Read a config file that the user names.

    The modules under ``HKD.IMPORTS`` of this very file, or of the options, are imported first, so
    that the terms, data sets and detectors in them are known. Nothing else in the file, in its
    bases or in the options runs code.

    Args:
        file: YAML, with a ``_BASE_`` or without; see :func:`find_config` for where it may lie.
            None for the defaults alone.
        options: keys and values by turns, applied last.

    Returns:
        Detectron2's defaults, this package's, the file's values and the options.

    Raises:
        FileNotFoundError: the file or one of its bases does not exist.
        OSError: a file cannot be read.
        ValueError: a mistake in the file or the options; the sentence names file, line and key.
        ImportError: a module under ``HKD.IMPORTS`` that cannot be imported.
    """
    options = list(options)
    section = Section()
    if file is not None:
        file = find_config(file)
        section = read_config_file(file, may_import=True)
    modules = imports_of(section)
    for key, value in zip(options[::2], options[1::2], strict=False):
        if key == "HKD.IMPORTS":
            modules = module_names(value, COMMAND_LINE)
    _import_modules(modules)
    cfg = default_config()
    if file is not None:
        merge_section(cfg, section, file)
    merge_options(cfg, options)
    return cfg


def _import_modules(names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ImportError(
                    f"HKD.IMPORTS: '{name}' needs the module '{error.name}', which is missing; "
                    "install it."
                ) from error
            raise ImportError(
                f"HKD.IMPORTS names '{name}', and Python finds no module '{error.name}'; install "
                "it, or add the folder that it is in to PYTHONPATH."
            ) from error
        except (TypeError, ValueError) as error:
            raise ImportError(
                f"HKD.IMPORTS names '{name}', which is no absolute module name; write it as in "
                "an import statement, such as my_team.my_term."
            ) from error


def student_config(cfg: CfgNode) -> CfgNode:
    """The student alone: a copy of ``cfg`` without teacher and terms' meta-architecture.

    A config of a plain detector comes back as it is, as a copy.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "HKDDetector":
        cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE
    return cfg
