"""Advance a two-stage Detectron2 detector stage by stage.

Each function runs the detector's own modules in the order of its own ``forward`` and returns what
they produced, so that a distilled step computes what a plain step computes, once, and nothing is
hooked.
"""

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances

from hkd_d2.distillation.detector_pass import DenseOutputs, RegionOutputs
from hkd_d2.distillation.term import HIDDEN, POOLED, PREDICTIONS, DetectorSpec

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
) -> RegionOutputs:
    """Pool ``boxes`` and run the box branch as deep as ``needs`` asks."""
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
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
