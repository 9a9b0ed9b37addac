"""The outputs of one forward pass of a detector, in the order in which they are computed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from detectron2.structures import Boxes, ImageList, Instances


@dataclass
class Targets:
    """Ground truth of a batch, on the device of the student.

    Attributes:
        boxes: an image's objects, (G, 4) float32 XYXY, pixels of the padded image.
        ignore_boxes: regions that are neither object nor background, as ``boxes``.
    """

    boxes: list[torch.Tensor]
    ignore_boxes: list[torch.Tensor]


@dataclass
class DenseOutputs:
    """Predictions of an RPN or a one-stage head, a list over levels, finest first.

    Attributes:
        logits: (N, H*W*A), or (N, H*W*A, K) for K classes. Anchor order: row,
            column, anchor of the cell, the order of ``anchors`` and of Detectron2's labels.
        deltas: (N, H*W*A, 4).
        anchors: (H*W*A, 4) XYXY, pixels of the padded image. FCOS has one a cell, a
            square of the stride's size about its point.
        centerness: (N, H*W, 1) logits of FCOS, else None.
        labels: the student's, one entry an image: (R,) int64 over all R
            anchors, 0 to K - 1 an object's class, K background, -1 neither. An RPN has K = 1 and
            its labels from before the sampling. None where no term reads them, and on the
            teacher's side.
        sampled_labels: of a two-stage student, as ``labels``, with -1 for
            the anchors that are not in the RPN's minibatch.
        matched_boxes: the student's, (R, 4) XYXY an image: the object of
            each anchor that has one.
        taps: of a one-stage head, of each level the class and
            the box tower's (N, C, H, W) between two convolutions, before the activation; where a
            term reads them.
        resume: of a one-stage teacher with ``taps``: runs its frozen head on
            from others of the teacher's shape, float32, and gives :class:`DenseOutputs`; gradients
            flow through it.
    """

    logits: list[torch.Tensor]
    deltas: list[torch.Tensor]
    anchors: list[Boxes]
    centerness: list[torch.Tensor] | None = None
    labels: list[torch.Tensor] | None = None
    sampled_labels: list[torch.Tensor] | None = None
    matched_boxes: list[torch.Tensor] | None = None
    taps: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    resume: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], "DenseOutputs"] | None = None


@dataclass
class RegionOutputs:
    """Outputs of the box branch on a list of boxes; R rows, image by image in box order.

    Of a cascade all but the class logits are of its first stage, the one that looks at these boxes.

    Attributes:
        boxes: the boxes, one entry an image.
        pooled: (R, C, P, P), output of the box pooler.
        hidden: (R, D), output of the box head; None where no term reads it.
        class_logits: (R, K + 1), the background last. Of a cascade the logarithm
            of the class probabilities averaged over its stages, as at inference.
        deltas: (R, 4) class-agnostic or (R, 4 K).
        stages: of a cascade, for each stage its predictor's output and the
            boxes (list[Instances]) that it looked at; None for other heads.
    """

    boxes: list[Boxes]
    pooled: torch.Tensor
    hidden: torch.Tensor | None = None
    class_logits: torch.Tensor | None = None
    deltas: torch.Tensor | None = None
    stages: list[tuple] | None = None


@dataclass
class DetectorPass:
    """One forward of a detector, filled stage by stage.

    Attributes:
        images: normalised and padded input, (N, 3, H, W).
        features: level name to (N, C, H_l, W_l).
        strides: level name to pixels a cell.
        dense: None where no term reads a teacher's.
        proposals: ``proposal_boxes``, best first: the RPN's, or a
            one-stage teacher's detections.
        sampled: a two-stage student's proposals sampled for training,
            labelled (``gt_classes``, ``gt_boxes``); on the teacher's side None.
        regions: both networks' outputs on the student's sampled boxes.
        run_backbone: features of other (N, 3, H, W) pixels, normalised as
            ``images``, in the detector's own precision and memory format; running statistics and
            random states stay as they were. With gradients on the student's side alone.
    """

    images: ImageList
    features: dict[str, torch.Tensor]
    strides: dict[str, int] = field(default_factory=dict)
    dense: DenseOutputs | None = None
    proposals: list[Instances] | None = None
    sampled: list[Instances] | None = None
    regions: RegionOutputs | None = None
    run_backbone: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
