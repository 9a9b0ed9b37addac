"""The formats of data sets that are a root folder with splits; each loader enters itself.

A loader of another format is one module with a function under :func:`folder_format`: in this
package it is found by its place, outside by ``HKD.IMPORTS``.
"""

from collections.abc import Callable

Loader = Callable[..., list[dict]]

# By the format's name: its splits, and load(root, split, *, check_images=True).
FOLDERS: dict[str, tuple[tuple[str, ...], Loader]] = {}


def folder_format(name: str, splits: tuple[str, ...]) -> Callable[[Loader], Loader]:
    """Decorate the loader of a format, ``load(root, split, *, check_images=True)``.

    The loader returns records (see :mod:`hkd_d2.data.datasets.records`) of the one class
    pedestrian. Its module may have besides: ``PUBLISHED`` (counts by split), ``FORMS``,
    ``prepare(root, split)`` and ``to_coco(records)``, which ``hkd data check`` looks for.

    Args:
        name: the format's, for HKD.DATA.REGISTER and the command line.
        splits: of the data set.

    Raises:
        ValueError: the name is taken by another loader.
    """

    def enter(load: Loader) -> Loader:
        known = FOLDERS.get(name)
        same = known and (known[1].__module__, known[1].__qualname__) == (
            load.__module__,
            load.__qualname__,
        )
        if name == "coco" or (known and not same):
            taken = f"{known[1].__module__}.{known[1].__qualname__}" if known else "COCO JSON"
            raise ValueError(f"The data format '{name}' is taken by {taken}; choose another name.")
        FOLDERS[name] = (tuple(splits), load)
        return load

    return enter
