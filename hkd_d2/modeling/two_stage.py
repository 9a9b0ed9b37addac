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
from detectron2.modeling.roi_heads.cascade_rcnn import _ScaleGradient
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from hkd_d2.distillation.detector_pass import DenseOutputs, DetectorPass, RegionOutputs
from hkd_d2.distillation.spec import DenseSpec, DetectorSpec
from hkd_d2.distillation.term import DENSE, HIDDEN, POOLED, PREDICTIONS, PROPOSALS
from hkd_d2.modeling.ignore import label_anchors
from hkd_d2.ops import multilevel_roi_align

# What a training step needs of its own box branch.
WHOLE_BOX_BRANCH = frozenset({POOLED, HIDDEN, PREDICTIONS})


def check_two_stage(model, role: str) -> None:
    """Raise ValueError unless ``model`` is a detector that this module can advance.

    Args:
        role: "student" or "teacher", for the sentence.
    """
    if not (
        isinstance(model, GeneralizedRCNN) and type(model).forward is GeneralizedRCNN.forward
    ):  # a subclass with a forward of its own may have losses that these stages do not
        found = type(model).__name__
        wanted = "MODEL.META_ARCHITECTURE GeneralizedRCNN, RetinaNet or FCOS"
    elif not isinstance(model.proposal_generator, RPN):
        found, wanted = type(model.proposal_generator).__name__, "an RPN as proposal generator"
    elif not isinstance(model.roi_heads, StandardROIHeads):
        found = type(model.roi_heads).__name__
        wanted = "StandardROIHeads, CascadeROIHeads or a subclass"
    else:
        return
    raise ValueError(f"The {role} has {found}; distillation needs {wanted}.")


def check_fused_pooler(model: GeneralizedRCNN, role: str) -> None:
    """Raise ValueError unless ``multilevel_roi_align`` is what the detector's box pooler computes.

    Args:
        role: "student" or "teacher", for the sentence.
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
    heads, rpn = model.roi_heads, model.proposal_generator
    _, predictor = first_stage(heads)
    return DetectorSpec(
        levels=model.backbone.output_shape(),
        roi_levels=list(heads.box_in_features),
        pooler_resolution=heads.box_pooler.output_size[0],
        hidden_channels=predictor.cls_score.in_features,
        num_classes=heads.num_classes,
        class_agnostic_deltas=predictor.bbox_pred.out_features == 4,
        delta_weights=tuple(predictor.box2box_transform.weights),
        dense=DenseSpec.of("RPN", rpn.anchor_generator, rpn.box2box_transform),
    )


def first_stage(heads: StandardROIHeads):
    """The box head and predictor that look at the sampled boxes: of a cascade the first ones."""
    if isinstance(heads, CascadeROIHeads):
        return heads.box_head[0], heads.box_predictor[0]
    return heads.box_head, heads.box_predictor


def advance_student(
    model: GeneralizedRCNN, found: DetectorPass, instances, needs: frozenset, fused_pooler, stage
) -> dict[str, torch.Tensor]:
    """Fill a student's pass from its features on, in Detectron2's order.

    Args:
        instances: ground truth, on the student's device.
        needs: what terms read; the step itself needs everything but the labels.
        fused_pooler: see :func:`pool_boxes`.
        stage: context manager to enter, with its name, around each stage.

    Returns:
        dict[str, Tensor]: the losses of the RPN, which Detectron2 computes before the box branch.
    """
    rpn, heads = model.proposal_generator, model.roi_heads
    with stage("student.rpn"):
        found.dense = dense_stage(rpn, found.features)
        anchors = found.dense.anchors
        if DENSE in needs:
            found.dense.logits = joined(found.dense.logits)
            found.dense.deltas = joined(found.dense.deltas)
        labels, matched_boxes = rpn.label_and_sample_anchors(anchors, instances)
        losses = rpn.losses(anchors, found.dense.logits, labels, found.dense.deltas, matched_boxes)
        if DENSE in needs:
            unsampled, found.dense.matched_boxes = label_anchors(rpn, anchors, instances)
            found.dense.labels = as_classes(unsampled)
            found.dense.sampled_labels = as_classes(labels)
        found.proposals = proposal_stage(rpn, found.dense, found.images)
        found.sampled = heads.label_and_sample_proposals(found.proposals, instances)
    with stage("student.box_branch"):
        boxes = [x.proposal_boxes for x in found.sampled]
        found.regions = region_stage(heads, found.features, boxes, WHOLE_BOX_BRANCH, fused_pooler)
        if isinstance(heads, CascadeROIHeads):
            cascade_stages(
                heads, found.features, found.regions, found.sampled, fused_pooler, instances
            )
    return losses


def joined(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors as pieces of one.

    Terms then add their gradients to the pieces, and the head gets them in the layout that
    Detectron2's losses, which join the levels, give: layouts decide the last bit of its sums.
    """
    return list(torch.cat(levels, 1).split([x.shape[1] for x in levels], 1))


def as_classes(rpn_labels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Detectron2's labels of an RPN, 1 object and 0 background, as classes: 0 and 1."""
    return [torch.where(x < 0, x, 1 - x).long() for x in rpn_labels]


def student_losses(model: GeneralizedRCNN, found: DetectorPass) -> dict[str, torch.Tensor]:
    """Detectron2's losses of the ROI heads."""
    heads = model.roi_heads
    losses = box_losses(heads, found.regions, found.sampled)
    losses.update(heads._forward_mask(found.features, found.sampled))
    losses.update(heads._forward_keypoint(found.features, found.sampled))
    return losses


def advance_teacher(
    model: GeneralizedRCNN, found: DetectorPass, boxes, needs: frozenset, fused_pooler: bool
) -> None:
    """Fill a teacher's pass as far as ``needs`` asks, on the student's ``boxes``."""
    rpn, heads = model.proposal_generator, model.roi_heads
    if needs & {DENSE, PROPOSALS}:
        found.dense = dense_stage(rpn, found.features)
    if PROPOSALS in needs:
        found.proposals = proposal_stage(rpn, found.dense, found.images)
    if needs & WHOLE_BOX_BRANCH:
        features = found.features
        if not fused_pooler:
            # Detectron2 rounds boxes to the precision of the features that it pools.
            features = {name: features[name].float() for name in heads.box_in_features}
        found.regions = region_stage(heads, features, boxes, needs, fused_pooler)
        if isinstance(heads, CascadeROIHeads) and PREDICTIONS in needs:
            given = [
                Instances(size, proposal_boxes=b)
                for size, b in zip(found.images.image_sizes, boxes, strict=True)
            ]
            cascade_stages(heads, features, found.regions, given, fused_pooler)


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


def pool_boxes(
    heads: StandardROIHeads,
    features: dict[str, torch.Tensor],
    boxes: list[Boxes],
    fused_pooler: bool = False,
) -> torch.Tensor:
    """Pool ``boxes`` from the levels of the box branch, (R, C, P, P).

    Args:
        fused_pooler: pool by :func:`hkd_d2.ops.multilevel_roi_align`, which
            :func:`check_fused_pooler` has to allow, instead of the detector's own pooler.
    """
    maps = [features[name] for name in heads.box_in_features]
    pooler = heads.box_pooler
    if not fused_pooler:
        return pooler(maps, boxes)
    return multilevel_roi_align(
        maps,
        [b.tensor for b in boxes],
        strides=[1 / p.spatial_scale for p in pooler.level_poolers],
        output_size=pooler.output_size,
        sampling_ratio=pooler.level_poolers[0].sampling_ratio,
    )


def region_stage(
    heads: StandardROIHeads,
    features: dict[str, torch.Tensor],
    boxes: list[Boxes],
    needs: frozenset,
    fused_pooler: bool = False,
) -> RegionOutputs:
    """Pool ``boxes`` and run the box branch, of a cascade its first stage, as deep as ``needs``."""
    regions = RegionOutputs(boxes=boxes, pooled=pool_boxes(heads, features, boxes, fused_pooler))
    head, predictor = first_stage(heads)
    if needs & {HIDDEN, PREDICTIONS}:
        regions.hidden = head(_stage_input(heads, regions.pooled))
    if PREDICTIONS in needs:
        regions.class_logits, regions.deltas = predictor(regions.hidden)
    return regions


def cascade_stages(
    heads: CascadeROIHeads,
    features: dict[str, torch.Tensor],
    regions: RegionOutputs,
    boxes: list[Instances],
    fused_pooler: bool = False,
    gt_instances: list[Instances] | None = None,
) -> None:
    """Run the later stages of a cascade, each on the boxes that the one before predicted.

    Fills ``regions.stages`` and puts the averaged classes into ``regions.class_logits``. In
    training Detectron2 drops boxes between stages; a row averages over the stages that saw it.

    Args:
        boxes: with ``proposal_boxes``, those of ``regions``.
        gt_instances: ground truth, in training.
    """
    predictions = regions.class_logits, regions.deltas
    regions.stages = [(predictions, boxes)]
    image_sizes = [x.image_size for x in boxes]
    log_probs = regions.class_logits.log_softmax(1)
    every_stage = [log_probs]
    rows = torch.arange(len(log_probs), device=log_probs.device).split([len(x) for x in boxes])
    for k in range(1, heads.num_cascade_stages):
        with torch.no_grad():
            refined = heads.box_predictor[k - 1].predict_boxes(predictions, boxes)
            boxes = heads._create_proposals_from_boxes(refined, image_sizes)
            if heads.training:
                rows = [
                    r[_stays(b, size)]
                    for r, b, size in zip(rows, refined, image_sizes, strict=True)
                ]
            for x, r in zip(boxes, rows, strict=True):
                x.row = r  # labelling may drop boxes of ignore regions
            if gt_instances is not None:
                boxes = heads._match_and_label_boxes(boxes, k, gt_instances)
            rows = [x.row for x in boxes]
        pooled = pool_boxes(heads, features, [x.proposal_boxes for x in boxes], fused_pooler)
        predictions = heads.box_predictor[k](heads.box_head[k](_stage_input(heads, pooled)))
        regions.stages.append((predictions, boxes))
        unseen = torch.full_like(log_probs, -torch.inf)
        every_stage.append(unseen.index_copy(0, torch.cat(rows), predictions[0].log_softmax(1)))
    every_stage = torch.stack(every_stage)
    seen = every_stage.isfinite().all(2).sum(0)
    regions.class_logits = every_stage.logsumexp(0) - seen.log()[:, None]


def _stage_input(heads: StandardROIHeads, pooled: torch.Tensor) -> torch.Tensor:
    """Input of a box head; in training the stages of a cascade share one gradient step on it."""
    if isinstance(heads, CascadeROIHeads) and heads.training:
        return _ScaleGradient.apply(pooled, 1.0 / heads.num_cascade_stages)
    return pooled


def _stays(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Mask of the boxes that a cascade in training passes on: those with an area in the image."""
    boxes = Boxes(boxes.detach())
    boxes.clip(image_size)
    return boxes.nonempty()


def box_losses(
    heads: StandardROIHeads, regions: RegionOutputs, sampled: list[Instances]
) -> dict[str, torch.Tensor]:
    """Detectron2's losses of the box branch; as there, may move ``sampled`` to predicted boxes."""
    if isinstance(heads, CascadeROIHeads):
        losses = {}
        for k, (predictions, boxes) in enumerate(regions.stages):
            with get_event_storage().name_scope(f"stage{k}"):
                of_stage = heads.box_predictor[k].losses(predictions, boxes)
            losses.update({f"{name}_stage{k}": loss for name, loss in of_stage.items()})
        return losses
    predictions = (regions.class_logits, regions.deltas)
    losses = heads.box_predictor.losses(predictions, sampled)
    if heads.train_on_pred_boxes:
        with torch.no_grad():
            predicted = heads.box_predictor.predict_boxes_for_gt_classes(predictions, sampled)
            for instances, boxes in zip(sampled, predicted, strict=True):
                instances.proposal_boxes = Boxes(boxes)
    return losses
