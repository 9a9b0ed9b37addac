"""Detectron2's FPN over any bottom-up body."""

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from .norm import resolve_norm


def attach_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """``bottom_up`` under an FPN that adds p6 by subsampling p5.

    Reads ``MODEL.FPN``: IN_FEATURES, OUT_CHANNELS, NORM and FUSE_TYPE. For outputs at strides 4 to
    32 the result gives p2 to p6, each (N, OUT_CHANNELS, H / stride, W / stride).

    Args:
        cfg (CfgNode): config of the detector.
        bottom_up (Backbone): the body; its features are named as in ``MODEL.FPN.IN_FEATURES``.

    Raises:
        ValueError: IN_FEATURES names a feature that the body does not put out, or NORM is unknown.
    """
    available = bottom_up.output_shape()
    unknown = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in available]
    if unknown or not cfg.MODEL.FPN.IN_FEATURES:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(cfg.MODEL.FPN.IN_FEATURES)}, but the body puts out "
            f"{list(available)}: name some of these, finest first."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=resolve_norm(cfg.MODEL.FPN.NORM, "MODEL.FPN.NORM"),
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
