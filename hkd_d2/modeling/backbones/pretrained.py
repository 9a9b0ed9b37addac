"""ImageNet weights: when they are wanted, what they expect of the config, where they come from."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode

# Channel statistics of ImageNet in RGB order, in units of a pixel value from 0 to 255.
IMAGENET_MEAN = (123.675, 116.280, 103.530)
IMAGENET_STD = (58.395, 57.120, 57.375)


def wants_pretrained(cfg: CfgNode) -> bool:
    """Whether a body starts from ImageNet weights.

    ``MODEL.WEIGHTS`` would replace them at once, so that a trained detector is built without them
    and needs no network.
    """
    return cfg.HKD.BACKBONE.PRETRAINED and not cfg.MODEL.WEIGHTS


def require_pixels(
    cfg: CfgNode,
    body: str,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> None:
    """Check that the config feeds a pretrained body the pixels that it was trained on.

    Args:
        cfg: config of the detector.
        body: name of the body, for the message.
        mean, std: three floats each, RGB, in units of a pixel value from 0 to 255.

    Raises:
        ValueError: INPUT.FORMAT, MODEL.PIXEL_MEAN or MODEL.PIXEL_STD differs.
    """
    same = cfg.INPUT.FORMAT == "RGB" and all(
        len(ours) == 3 and np.allclose(ours, theirs, atol=0.01)
        for ours, theirs in ((cfg.MODEL.PIXEL_MEAN, mean), (cfg.MODEL.PIXEL_STD, std))
    )
    if not same:
        mean, std = ([round(float(value), 3) for value in row] for row in (mean, std))
        raise ValueError(
            f"The pretrained weights of {body} expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {mean} "
            f"and MODEL.PIXEL_STD {std}: set these, or HKD.BACKBONE.PRETRAINED to False."
        )


def load_torchvision_weights(model: str, version: str = "DEFAULT") -> dict[str, torch.Tensor]:
    """State dict of a torchvision classification model, from its cache or the network.

    Args:
        model: name as in :func:`torchvision.models.list_models`.
        version: member of the model's weights enum.

    Raises:
        FileNotFoundError: the file is neither in the cache nor to be downloaded.
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights(model)[version]
    try:
        return weights.get_state_dict(
            progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"The ImageNet weights {weights.url} could not be downloaded ({error}): put that file "
            f"into {torch.hub.get_dir()}/checkpoints, or set HKD.BACKBONE.PRETRAINED to False."
        ) from error
