"""Search for config files: the working directory first, then those of the package."""

import os
from pathlib import Path


def packaged_configs() -> Path:
    """Folder of the configs that come with the package: of a wheel, or of a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def find_config(name: str | Path, beside: str | Path | None = None) -> Path:
    """Find a config file by its path or by its name among the packaged ones.

    Args:
        name: a path, or a path inside the packaged ``configs`` folder, whose own name may lead it:
            ``hkd_citypersons.yaml``, ``methods/adl.yaml``, ``configs/methods/adl.yaml``.
        beside: the config file that names this one; its folder is looked into first.

    Raises:
        FileNotFoundError: the file is in none of the places.
    """
    inside = Path(name)
    if inside.parts[:1] == ("configs",):
        inside = inside.relative_to("configs")
    packaged = packaged_configs()
    candidates = [Path(beside).parent / name] if beside is not None else []
    candidates += [Path(name), packaged / inside]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"The config file '{name}' is neither in {os.getcwd()} nor in {packaged}; give an existing "
        "file, such as hkd_citypersons.yaml."
    )
