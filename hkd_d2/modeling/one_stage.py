"""Advance a one-stage Detectron2 detector, RetinaNet or FCOS, stage by stage.

The counterpart of :mod:`hkd_d2.modeling.two_stage`: functions over the detector's own modules in
the order of its own ``forward``, nothing hooked.
"""

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances

from hkd_d2.distillation.detector_pass import DenseOutputs, DetectorPass
from hkd_d2.distillation.term import DENSE, PROPOSALS, DenseSpec, DetectorSpec


def check_one_stage(model, role: str) -> None:
    """Raise ValueError unless ``model`` is a detector that this module can advance.

    Args:
        role (str): "student" or "teacher", for the sentence.
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
            "FCOS" if isinstance(model, FCOS) else "RetinaNet", model.anchor_generator, transform
        ),
        one_stage=True,
    )


def dense_stage(model: DenseDetector, features: dict[str, torch.Tensor]) -> DenseOutputs:
    """Run the head and put its maps into anchor order, as Detectron2 does."""
    maps = [features[name] for name in model.head_in_features]
    predictions = model.head(maps)
    sizes = [model.num_classes, 4, 1][: len(predictions)]
    logits, deltas, *centerness = model._transpose_dense_predictions(predictions, sizes)
    return DenseOutputs(
        logits=logits,
        deltas=deltas,
        anchors=model.anchor_generator(maps),
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
        found.dense = dense_stage(model, found.features)
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
        found.dense = dense_stage(model, found.features)
    if PROPOSALS in needs:
        found.proposals = proposal_stage(model, found.dense, found.images)
