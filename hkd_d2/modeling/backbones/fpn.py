"""Detectron2's FPN over any bottom-up body."""

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from hkd_d2.modeling.backbones.norm import resolve_norm


def attach_fpn(cfg: CfgNode, bottom_up: Backbone, *, one_stage: bool = False) -> FPN:
    """``bottom_up`` under an FPN.

    Reads ``MODEL.FPN``: IN_FEATURES, OUT_CHANNELS, NORM and FUSE_TYPE. For two-stage detectors
    p6 subsamples p5: res2 to res5 give p2 to p6. For one-stage detectors p6 and p7 are convolutions
    of res5, as in Detectron2's RetinaNet: res3 to res5 give p3 to p7. Each level is
    (N, OUT_CHANNELS, H / stride, W / stride).

    Args:
        cfg: config of the detector.
        bottom_up: the body; its features are named as in ``MODEL.FPN.IN_FEATURES``.
        one_stage: which of the two.

    Raises:
        ValueError: IN_FEATURES names a feature that the body does not put out, the body has no
            res5 for p6 and p7, or NORM is unknown.
    """
    available = bottom_up.output_shape()
    unknown = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in available]
    if unknown or not cfg.MODEL.FPN.IN_FEATURES:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(cfg.MODEL.FPN.IN_FEATURES)}, but the body puts out "
            f"{list(available)}: name some of these, finest first."
        )
    top_block = LastLevelMaxPool()
    if one_stage:
        if "res5" not in available:
            raise ValueError(
                f"p6 and p7 are made of res5, and the body puts out {list(available)}: add res5 to "
                "MODEL.RESNETS.OUT_FEATURES."
            )
        top_block = LastLevelP6P7(available["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=resolve_norm(cfg.MODEL.FPN.NORM, "MODEL.FPN.NORM"),
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
