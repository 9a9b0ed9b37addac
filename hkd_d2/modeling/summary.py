"""Parameters and multiply-adds of each part of a detector."""

import copy
import math

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Parts of Detectron2's detectors by the name of the module that holds them; any other module goes
# under its own name, and an FPN's backbone is split into body and fpn.
_PARTS = {"proposal_generator": "rpn", "roi_heads": "box head"}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable and frozen parameters of each part of a detector.

    Counts ``model.parameters()``, each shared one once, and no buffers: the scale and bias of
    FrozenBN are buffers, so that a frozen ResNet-50 counts 23.45 M and one with BN 23.51 M.

    Args:
        model: a Detectron2 detector.

    Returns:
        dict[str, int]: body, fpn, rpn and box head for a two-stage detector; body, fpn and head for
        a one-stage one; then total.
    """
    seen: set[int] = set()

    def count(module: nn.Module) -> int:
        new = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen.update(new)
        return sum(new.values())

    counts = {}
    for name, module in model.named_children():
        if isinstance(module, FPN):
            counts["body"] = count(module.bottom_up)
            counts["fpn"] = count(module)
        else:
            counts[_PARTS.get(name, name)] = count(module)
    counts = {name: n for name, n in counts.items() if n}
    counts["total"] = sum(counts.values()) + count(model)
    return counts


def count_flops(model: nn.Module, size: tuple[int, int]) -> dict[str, float]:
    """Multiply-adds of each part of a detector for one image at inference, in 1e9 ("GFLOPs").

    A multiply-add counts as one, as fvcore counts and papers on detection report; convolutions and
    matrix products count, while normalisation, activations, upsampling, RoIAlign and NMS do not.
    How many boxes a two-stage detector looks at depends on the image and on training. Here its box
    head counts ``MODEL.RPN.POST_NMS_TOPK_TEST`` boxes, the most that it ever gets, so that the
    number needs neither weights nor an image. Mask and keypoint heads do not count. Nothing is
    computed: a copy of the model runs on tensors without data.

    Args:
        model: a GeneralizedRCNN with an RPN and standard or cascade heads, every stage
            of which looks at these boxes, or a one-stage detector with ``head`` and
            ``head_in_features``.
        size: height and width of the image in pixels; padded to the backbone's
            size divisibility as at inference.

    Returns:
        dict[str, float]: parts as in :func:`count_parameters`, then total.

    Raises:
        ValueError: a detector of another make.
    """
    rpn, roi_heads = (getattr(model, name, None) for name in ("proposal_generator", "roi_heads"))
    if not (hasattr(rpn, "rpn_head") and hasattr(roi_heads, "box_head")) and not (
        hasattr(model, "head") and hasattr(model, "head_in_features")
    ):
        raise ValueError(
            f"{type(model).__name__} has neither an RPN with a box head nor a dense head: its "
            "multiply-adds cannot be counted by part."
        )
    model = copy.deepcopy(model).to("meta").eval()
    backbone = model.backbone
    unit = backbone.size_divisibility or 1
    height, width = (math.ceil(side / unit) * unit for side in size)
    image = torch.empty(1, 3, height, width, device="meta")

    gflops = {}
    if isinstance(backbone, FPN):
        gflops["body"], _ = _run(backbone.bottom_up, image)
        gflops["fpn"], features = _run(backbone, image)
        gflops["fpn"] -= gflops["body"]
    else:
        gflops["backbone"], features = _run(backbone, image)
    if hasattr(model, "roi_heads"):
        rpn, roi_heads = model.proposal_generator, model.roi_heads
        gflops["rpn"], _ = _run(rpn.rpn_head, [features[name] for name in rpn.in_features])
        boxes = rpn.post_nms_topk[False]
        channels = backbone.output_shape()[roi_heads.box_in_features[0]].channels
        pooled = torch.empty(boxes, channels, *roi_heads.box_pooler.output_size, device="meta")
        cascade = isinstance(roi_heads, CascadeROIHeads)
        stages = (
            zip(roi_heads.box_head, roi_heads.box_predictor, strict=True)
            if cascade
            else [(roi_heads.box_head, roi_heads.box_predictor)]
        )
        gflops["box head"] = 0.0
        for head, predictor in stages:
            hidden, features = _run(head, pooled)
            predictions, _ = _run(predictor, features)
            gflops["box head"] += hidden + predictions
    else:
        gflops["head"], _ = _run(model.head, [features[name] for name in model.head_in_features])
    gflops["total"] = sum(gflops.values())
    return gflops


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width, in pixels, of a landscape image of the config's test size.

    The shorter side is ``INPUT.MIN_SIZE_TEST`` and the longer ``INPUT.MAX_SIZE_TEST``.
    """
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST


def _run(module: nn.Module, x: torch.Tensor | list[torch.Tensor]):
    """Multiply-adds of ``module(x)`` in 1e9, and its output."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = module(x)
    # torch counts a multiply-add as two.
    return counter.get_total_flops() / 2e9, output
