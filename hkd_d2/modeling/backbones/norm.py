"""Normalisation layers for channel counts that a width multiplier makes small."""

from collections.abc import Callable

from torch import nn

_NAMES = ("BN", "SyncBN", "FrozenBN", "GN", "")


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with as many groups, up to 32, as leave each at least 8 channels.

    Detectron2's ``GN`` has 32 groups for any layer, so that it fails where 32 does not divide the
    channels and is instance norm at 32 of them. Both have 32 groups from 256 channels on, where 32
    divides them. At most 15 channels make a single group.

    Args:
        channels: channels of the layer.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))
    return nn.GroupNorm(groups, channels)


def resolve_norm(name: str, key: str) -> str | Callable[[int], nn.Module]:
    """The ``norm`` argument of Detectron2's blocks and FPN, with :func:`group_norm` for ``"GN"``.

    Args:
        name: ``BN``, ``SyncBN``, ``FrozenBN``, ``GN`` or empty for none.
        key: the config key that holds ``name``, for the message.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in _NAMES:
        raise ValueError(f'{key} is {name!r}; choose one of BN, SyncBN, FrozenBN, GN or "".')
    return group_norm if name == "GN" else name
