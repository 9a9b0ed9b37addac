"""Models on a command line: [NAME=]FILE, and their config files."""

import os
from collections.abc import Sequence
from pathlib import Path

from hkd_d2.inference.detector import PROGRAMS


def named_models(texts: Sequence[str]) -> dict[str, str]:
    """Files by name; one without NAME is named as the file without its suffix.

    Raises:
        ValueError: an empty name or file, a '/' in a name, two of one name.
    """
    files = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or os.path.exists(text):  # a file whose own name has the sign
            name, file = Path(text).stem, text
        if not name or not file or "/" in name:
            raise ValueError(f"{text}: give a model as NAME=FILE with a name without '/'.")
        if name in files:
            raise ValueError(f"Two models are named '{name}'; name them by NAME=FILE.")
        files[name] = file
    return files


def named_configs(texts: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Config files by the model's name; with a single model NAME may be left out.

    Raises:
        ValueError: the name of no model.
    """
    configs = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign and len(models) == 1:
            name, file = models[0], text
        if name not in models:
            raise ValueError(
                f"--config-file {text}: give NAME=FILE with the name of a model: "
                f"{', '.join(models)}."
            )
        configs[name] = file
    return configs


def named_backend(file: str) -> str | None:
    """The backend of a file; who names a program on a command line wants it to run."""
    return "torch" if Path(file).suffix in PROGRAMS else None
