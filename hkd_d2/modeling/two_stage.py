"""Advance a two-stage Detectron2 detector stage by stage.

Each function runs the detector's own modules in the order of its own ``forward`` and returns what
they produced, so that a distilled step computes what a plain step computes, once, and nothing is
hooked.
"""

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances

from hkd_d2.distillation.detector_pass import DenseOutputs, RegionOutputs
from hkd_d2.distillation.term import HIDDEN, POOLED, PREDICTIONS, DetectorSpec
from hkd_d2.ops import multilevel_roi_align

# What a training step needs of its own box branch.
WHOLE_BOX_BRANCH = frozenset({POOLED, HIDDEN, PREDICTIONS})


def check_two_stage(model, role: str) -> None:
    """Raise ValueError unless ``model`` is a detector that this module can advance.

    Args:
        role (str): "student" or "teacher", for the sentence.
    """
    if not (
        isinstance(model, GeneralizedRCNN) and type(model).forward is GeneralizedRCNN.forward
    ):  # a subclass with a forward of its own may have losses that these stages do not
        found, wanted = type(model).__name__, "MODEL.META_ARCHITECTURE GeneralizedRCNN"
    elif not isinstance(model.proposal_generator, RPN):
        found, wanted = type(model.proposal_generator).__name__, "an RPN as proposal generator"
    elif not isinstance(model.roi_heads, StandardROIHeads) or isinstance(
        model.roi_heads, CascadeROIHeads
    ):
        found, wanted = type(model.roi_heads).__name__, "StandardROIHeads or a subclass"
    else:
        return
    raise ValueError(f"The {role} has {found}; distillation needs {wanted}.")


def check_fused_pooler(model: GeneralizedRCNN, role: str) -> None:
    """Raise ValueError unless ``multilevel_roi_align`` is what the detector's box pooler computes.

    Args:
        role (str): "student" or "teacher", for the sentence.
    """
    pooler = model.roi_heads.box_pooler
    levels = list(pooler.level_poolers) if type(pooler) is ROIPooler else []
    if not (levels and all(type(p) is ROIAlign and p.aligned for p in levels)):
        kind = type(levels[0] if levels else pooler).__name__
        found = f"pools boxes with {kind}, which is not ROIAlignV2"
    elif len(levels) > 1 and (pooler.canonical_box_size, pooler.canonical_level) != (224, 4):
        found = (
            f"assigns boxes of {pooler.canonical_box_size} pixels to level "
            f"{pooler.canonical_level} and not boxes of 224 pixels to level 4"
        )
    else:
        return
    raise ValueError(f"The {role} {found}; set HKD.POOLER to torchvision.")


def detector_spec(model: GeneralizedRCNN) -> DetectorSpec:
    """Read the shapes that terms need off a built detector."""
    heads = model.roi_heads
    return DetectorSpec(
        levels=model.backbone.output_shape(),
        roi_levels=list(heads.box_in_features),
        pooler_resolution=heads.box_pooler.output_size[0],
        hidden_channels=heads.box_predictor.cls_score.in_features,
        num_classes=heads.num_classes,
        class_agnostic_deltas=heads.box_predictor.bbox_pred.out_features == 4,
        delta_weights=tuple(heads.box_predictor.box2box_transform.weights),
    )


def dense_stage(rpn: RPN, features: dict[str, torch.Tensor]) -> DenseOutputs:
    """Run the RPN head and put its maps into anchor order.

    The head gives (N, A, H, W) and (N, A * 4, H, W), while anchors and labels run over rows,
    columns, then the anchors of a cell; comparing before this permutation pairs the wrong anchors.
    """
    maps = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(maps)
    logits, deltas = rpn.rpn_head(maps)
    box_dim = rpn.anchor_generator.box_dim
    return DenseOutputs(
        logits=[x.permute(0, 2, 3, 1).flatten(1) for x in logits],
        deltas=[
            x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas
        ],
        anchors=anchors,
    )


def proposal_stage(rpn: RPN, dense: DenseOutputs, images: ImageList) -> list[Instances]:
    """Decode, select and suppress the RPN's boxes as its mode (training or inference) says."""
    return rpn.predict_proposals(dense.anchors, dense.logits, dense.deltas, images.image_sizes)


def region_stage(
    heads: StandardROIHeads,
    features: dict[str, torch.Tensor],
    boxes: list[Boxes],
    needs: frozenset,
    fused_pooler: bool = False,
) -> RegionOutputs:
    """Pool ``boxes`` and run the box branch as deep as ``needs`` asks.

    Args:
        fused_pooler (bool): pool by :func:`hkd_d2.ops.multilevel_roi_align`, which
            :func:`check_fused_pooler` has to allow, instead of the detector's own pooler.
    """
    maps = [features[name] for name in heads.box_in_features]
    pooler = heads.box_pooler
    if fused_pooler:
        pooled = multilevel_roi_align(
            maps,
            [b.tensor for b in boxes],
            strides=[1 / p.spatial_scale for p in pooler.level_poolers],
            output_size=pooler.output_size,
            sampling_ratio=pooler.level_poolers[0].sampling_ratio,
        )
    else:
        pooled = pooler(maps, boxes)
    regions = RegionOutputs(boxes=boxes, pooled=pooled)
    if needs & {HIDDEN, PREDICTIONS}:
        regions.hidden = heads.box_head(pooled)
    if PREDICTIONS in needs:
        regions.class_logits, regions.deltas = heads.box_predictor(regions.hidden)
    return regions


def box_losses(
    heads: StandardROIHeads, regions: RegionOutputs, sampled: list[Instances]
) -> dict[str, torch.Tensor]:
    """Detectron2's losses of the box branch; as there, may move ``sampled`` to predicted boxes."""
    predictions = (regions.class_logits, regions.deltas)
    losses = heads.box_predictor.losses(predictions, sampled)
    if heads.train_on_pred_boxes:
        with torch.no_grad():
            predicted = heads.box_predictor.predict_boxes_for_gt_classes(predictions, sampled)
            for instances, boxes in zip(sampled, predicted, strict=True):
                instances.proposal_boxes = Boxes(boxes)
    return losses
