"""Detectron2's RPN, ROI heads and one-stage detectors with ignore regions.

Ground-truth instances may have a bool field ``gt_ignore``; rows that set it are regions where
neither an object nor background is learned. An anchor, point or proposal that matches no object and
has at least half of its own area inside one ignore box takes part in no loss; positives stay. The
area of a point of FCOS is the square of the stride's size about it. Without such rows every module
equals Detectron2's bit for bit.
"""

import torch
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    RetinaNet,
)
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from detectron2.utils.memory import retry_if_cuda_oom

from hkd_d2.modeling.fcos import FCOS

# An unmatched box is ignored from this share of its own area on.
IGNORE_SHARE = 0.5


def split_ignore(instances: Instances) -> tuple[Instances, Boxes]:
    """Return the objects, and the boxes of the rows that ``gt_ignore`` sets."""
    if not instances.has("gt_ignore"):
        return instances, Boxes(instances.gt_boxes.tensor[:0])
    ignore = instances.gt_ignore
    return instances[~ignore], instances.gt_boxes[ignore]


def covered_by_ignore(boxes: Boxes, ignore_boxes: Boxes) -> torch.Tensor:
    """(R,) bool: boxes with at least :data:`IGNORE_SHARE` of their area in one ignore box."""
    if len(ignore_boxes) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    share = retry_if_cuda_oom(pairwise_ioa)(ignore_boxes, boxes).amax(dim=0)
    return (share >= IGNORE_SHARE).to(boxes.device)


@torch.no_grad()
def label_anchors(rpn: RPN, anchors: list[Boxes], gt_instances: list[Instances]):
    """Labels of all anchors of an RPN, from before the sampling, ignore regions known.

    Returns:
        list[Tensor]: an image's labels (R,), 1 object, 0 background, -1 neither.
        list[Tensor]: the object of each anchor, (R, 4), not read where there is none.
    """
    every_anchor = Boxes.cat(anchors)
    labels, matched_boxes = [], []
    for instances in gt_instances:
        objects, ignore_boxes = split_ignore(instances)
        iou = retry_if_cuda_oom(pairwise_iou)(objects.gt_boxes, every_anchor)
        matches, label = retry_if_cuda_oom(rpn.anchor_matcher)(iou)
        label = label.to(every_anchor.device)  # matching may have moved to the CPU
        if rpn.anchor_boundary_thresh >= 0:
            inside = every_anchor.inside_box(objects.image_size, rpn.anchor_boundary_thresh)
            label[~inside] = -1
        label[(label == 0) & covered_by_ignore(every_anchor, ignore_boxes)] = -1
        labels.append(label)
        matched_boxes.append(
            objects.gt_boxes[matches].tensor
            if len(objects)
            else torch.zeros_like(every_anchor.tensor)
        )
    return labels, matched_boxes


@PROPOSAL_GENERATOR_REGISTRY.register()
class IgnoreAwareRPN(RPN):
    """RPN that samples no anchor of an ignore region as background."""

    @torch.no_grad()
    def label_and_sample_anchors(self, anchors, gt_instances):
        labels, matched_boxes = label_anchors(self, anchors, gt_instances)
        return [self._subsample_labels(label) for label in labels], matched_boxes


@ROI_HEADS_REGISTRY.register()
class IgnoreAwareROIHeads(StandardROIHeads):
    """Standard ROI heads that sample no proposal of an ignore region as background."""

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals, targets):
        objects, kept = [], []
        for boxes, instances in zip(proposals, targets, strict=True):
            image_objects, ignore_boxes = split_ignore(instances)
            if len(ignore_boxes):
                iou = pairwise_iou(image_objects.gt_boxes, boxes.proposal_boxes)
                _, label = self.proposal_matcher(iou)
                covered = covered_by_ignore(boxes.proposal_boxes, ignore_boxes)
                boxes = boxes[~(covered & (label == 0))]
            objects.append(image_objects)
            kept.append(boxes)
        return super().label_and_sample_proposals(kept, objects)


@ROI_HEADS_REGISTRY.register()
class IgnoreAwareCascadeROIHeads(IgnoreAwareROIHeads, CascadeROIHeads):
    """Cascade heads that learn no box of an ignore region as background, at any stage."""

    @torch.no_grad()
    def _match_and_label_boxes(self, proposals, stage, targets):
        objects, kept = [], []
        for boxes, instances in zip(proposals, targets, strict=True):
            image_objects, ignore_boxes = split_ignore(instances)
            if len(ignore_boxes):
                iou = pairwise_iou(image_objects.gt_boxes, boxes.proposal_boxes)
                _, label = self.proposal_matchers[stage](iou)
                covered = covered_by_ignore(boxes.proposal_boxes, ignore_boxes)
                boxes = boxes[~(covered & (label == 0))]
            objects.append(image_objects)
            kept.append(boxes)
        return super()._match_and_label_boxes(kept, stage, objects)


class IgnoreAwareDense:
    """Mixin of one-stage detectors: anchors of background in an ignore region have label -1."""

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        split = [split_ignore(x) for x in gt_instances]
        labels, matched_boxes = super().label_anchors(anchors, [objects for objects, _ in split])
        every_anchor = Boxes.cat(anchors)
        for label, (_, ignore_boxes) in zip(labels, split, strict=True):
            background = label == self.num_classes
            label[background & covered_by_ignore(every_anchor, ignore_boxes)] = -1
        return labels, matched_boxes


@META_ARCH_REGISTRY.register()
class IgnoreAwareRetinaNet(IgnoreAwareDense, RetinaNet):
    """RetinaNet that learns no anchor of an ignore region as background."""


@META_ARCH_REGISTRY.register()
class IgnoreAwareFCOS(IgnoreAwareDense, FCOS):
    """FCOS that learns no point of an ignore region as background."""

    # A logit at which the background costs nothing and has no slope, within half precision.
    SURE_BACKGROUND = -1e4

    def losses(self, anchors, pred_logits, gt_labels, *predictions):
        """As Detectron2's, which knows no label -1."""
        ignored = torch.stack(gt_labels) < 0
        if ignored.any():
            sizes = [x.shape[1] for x in pred_logits]
            pred_logits = [
                logits.masked_fill(mask[..., None], self.SURE_BACKGROUND)
                for logits, mask in zip(pred_logits, ignored.split(sizes, 1), strict=True)
            ]
            gt_labels = [torch.where(x < 0, self.num_classes, x) for x in gt_labels]
        return super().losses(anchors, pred_logits, gt_labels, *predictions)
