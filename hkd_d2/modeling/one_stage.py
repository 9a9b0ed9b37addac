"""Advance a one-stage Detectron2 detector, RetinaNet or FCOS, stage by stage.

The counterpart of :mod:`hkd_d2.modeling.two_stage`: functions over the detector's own modules in
the order of its own ``forward``, nothing hooked.
"""

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from hkd_d2.distillation.detector_pass import DenseOutputs, DetectorPass
from hkd_d2.distillation.spec import DenseSpec, DetectorSpec
from hkd_d2.distillation.term import DENSE, PROPOSALS, reused_convs


def check_one_stage(model, role: str) -> None:
    """Raise ValueError unless ``model`` is a detector that this module can advance.

    Args:
        role: "student" or "teacher", for the sentence.
    """
    # A subclass with a forward of its own may have losses that these stages do not.
    known = isinstance(model, (RetinaNet, FCOS)) and type(model).forward is DenseDetector.forward
    if not known or type(model).forward_training not in (
        RetinaNet.forward_training,
        FCOS.forward_training,
    ):
        found, wanted = type(model).__name__, "GeneralizedRCNN, RetinaNet or FCOS"
        raise ValueError(
            f"The {role} has {found}; distillation needs MODEL.META_ARCHITECTURE {wanted}."
        )


def detector_spec(model: DenseDetector) -> DetectorSpec:
    """Read the shapes that terms need off a built detector."""
    transform = model.box2box_transform
    return DetectorSpec(
        levels=model.backbone.output_shape(),
        roi_levels=list(model.head_in_features),
        pooler_resolution=None,
        hidden_channels=None,
        num_classes=model.num_classes,
        class_agnostic_deltas=True,
        delta_weights=tuple(getattr(transform, "weights", (1.0,) * 4)),
        dense=DenseSpec.of(
            "FCOS" if isinstance(model, FCOS) else "RetinaNet",
            model.anchor_generator,
            transform,
            tower_channels(model.head),
        ),
        one_stage=True,
    )


def tower_channels(head: nn.Module) -> list[int] | None:
    """See :class:`~hkd_d2.distillation.spec.DenseSpec`."""
    if type(head).forward not in (RetinaNetHead.forward, FCOSHead.forward):
        return None
    convs = [m for m in head.cls_subnet if isinstance(m, nn.Conv2d)]
    return [(convs or [head.cls_score])[0].in_channels, *(m.out_channels for m in convs)]


def dense_stage(
    model: DenseDetector, features: dict[str, torch.Tensor], reused: int | None = None
) -> DenseOutputs:
    """Run the head and put its maps into anchor order, as Detectron2 does.

    Args:
        reused: keep what the towers have before this many of their last convolutions.
    """
    maps = [features[name] for name in model.head_in_features]
    anchors = model.anchor_generator(maps)
    if reused is None:
        return in_anchor_order(model, model.head(maps), anchors)
    (class_tower, _), (box_tower, _) = split_towers(model.head, reused)
    taps = [(class_tower(x), box_tower(x)) for x in maps]
    found = in_anchor_order(model, finish_head(model.head, taps, reused), anchors)
    found.taps = taps
    return found


def split_towers(head: RetinaNetHead, reused: int) -> list[tuple[nn.Sequential, nn.Sequential]]:
    """The class and the box tower in two: before and after the tap; modules are shared."""
    towers = []
    for tower in (head.cls_subnet, head.bbox_subnet):
        convs = [i for i, m in enumerate(tower) if isinstance(m, nn.Conv2d)]
        cut = convs[-reused] if reused else len(tower)
        cut = max(cut - 1, 0)  # the activation before that convolution comes after the tap
        towers.append((tower[:cut], tower[cut:]))
    return towers


def finish_head(head: RetinaNetHead, taps: list[tuple], reused: int) -> list[list[torch.Tensor]]:
    """Predictions of the head, lists over levels, from what its towers have at the tap."""
    (_, class_tower), (_, box_tower) = split_towers(head, reused)
    logits, deltas, centerness = [], [], []
    for class_tap, box_tap in taps:
        logits.append(head.cls_score(class_tower(class_tap)))
        box_map = box_tower(box_tap)
        deltas.append(head.bbox_pred(box_map))
        if isinstance(head, FCOSHead):
            centerness.append(head.ctrness(box_map))
    return [logits, deltas, centerness] if centerness else [logits, deltas]


def resume_head(model: DenseDetector, found: DenseOutputs, taps: list[tuple], reused: int):
    """Run the rest of the head on other ``taps`` than those of ``found``."""
    return in_anchor_order(model, finish_head(model.head, taps, reused), found.anchors)


def in_anchor_order(model: DenseDetector, predictions, anchors: list[Boxes]) -> DenseOutputs:
    """A head's maps, lists over levels, as :class:`DenseOutputs`."""
    sizes = [model.num_classes, 4, 1][: len(predictions)]
    logits, deltas, *centerness = model._transpose_dense_predictions(predictions, sizes)
    return DenseOutputs(
        logits=logits,
        deltas=deltas,
        anchors=anchors,
        centerness=centerness[0] if centerness else None,
    )


def proposal_stage(model: DenseDetector, dense: DenseOutputs, images: ImageList) -> list[Instances]:
    """The detections of each image as ``proposal_boxes`` and ``scores``, best first.

    Decoded, selected and suppressed as at inference, with the detector's own thresholds, then
    clipped to the image.
    """
    proposals = []
    for i, size in enumerate(images.image_sizes):
        scores = [x[i].sigmoid() for x in dense.logits]
        if dense.centerness is not None:
            scores = [
                (s * c[i].sigmoid()).sqrt() for s, c in zip(scores, dense.centerness, strict=True)
            ]
        found = model.inference_single_image(
            dense.anchors, scores, [x[i] for x in dense.deltas], size
        )
        boxes = Boxes(found.pred_boxes.tensor.float())
        boxes.clip(size)
        kept = boxes.nonempty()
        proposals.append(
            Instances(size, proposal_boxes=boxes[kept], scores=found.scores[kept].float())
        )
    return proposals


def advance_student(
    model: DenseDetector, found: DetectorPass, instances, needs: frozenset, fused_pooler, stage
) -> dict[str, torch.Tensor]:
    """Fill a student's pass from its features on; see ``two_stage.advance_student``.

    Returns:
        dict: empty; every loss is :func:`student_losses`'.
    """
    with stage("student.head"):
        found.dense = dense_stage(model, found.features, reused_convs(needs))
        found.dense.labels, found.dense.matched_boxes = model.label_anchors(
            found.dense.anchors, instances
        )
    return {}


def student_losses(model: DenseDetector, found: DetectorPass) -> dict[str, torch.Tensor]:
    """Detectron2's losses."""
    dense = found.dense
    centerness = [] if dense.centerness is None else [dense.centerness]
    return model.losses(
        dense.anchors, dense.logits, dense.labels, dense.deltas, dense.matched_boxes, *centerness
    )


def advance_teacher(
    model: DenseDetector, found: DetectorPass, boxes, needs: frozenset, fused_pooler: bool
) -> None:
    """Fill a teacher's pass as far as ``needs`` asks; it has no box branch to ask for."""
    if needs & {DENSE, PROPOSALS}:
        found.dense = dense_stage(model, found.features, reused_convs(needs))
    if PROPOSALS in needs:
        found.proposals = proposal_stage(model, found.dense, found.images)
