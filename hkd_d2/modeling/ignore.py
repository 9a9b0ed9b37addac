"""Detectron2's RPN and ROI heads with ignore regions.

Ground-truth instances may have a bool field ``gt_ignore``; rows that set it are regions where
neither an object nor background is learned. An anchor or proposal that matches no object and has at
least half of its own area inside one ignore box is left out of sampling; positives stay. Without
such rows both modules equal Detectron2's bit for bit.
"""

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from detectron2.utils.memory import retry_if_cuda_oom

# An unmatched box is ignored from this share of its own area on.
IGNORE_SHARE = 0.5


def split_ignore(instances: Instances) -> tuple[Instances, Boxes]:
    """Return the objects, and the boxes of the rows that ``gt_ignore`` sets."""
    if not instances.has("gt_ignore"):
        return instances, Boxes(instances.gt_boxes.tensor[:0])
    ignore = instances.gt_ignore
    return instances[~ignore], instances.gt_boxes[ignore]


def covered_by_ignore(boxes: Boxes, ignore_boxes: Boxes) -> torch.Tensor:
    """Which boxes have at least :data:`IGNORE_SHARE` of their area in one ignore box, (R,) bool."""
    if len(ignore_boxes) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    share = retry_if_cuda_oom(pairwise_ioa)(ignore_boxes, boxes).amax(dim=0)
    return (share >= IGNORE_SHARE).to(boxes.device)


@PROPOSAL_GENERATOR_REGISTRY.register()
class IgnoreAwareRPN(RPN):
    """RPN that samples no anchor of an ignore region as background."""

    @torch.no_grad()
    def label_and_sample_anchors(self, anchors, gt_instances):
        every_anchor = Boxes.cat(anchors)
        labels, matched_boxes = [], []
        for instances in gt_instances:
            objects, ignore_boxes = split_ignore(instances)
            iou = retry_if_cuda_oom(pairwise_iou)(objects.gt_boxes, every_anchor)
            matches, label = retry_if_cuda_oom(self.anchor_matcher)(iou)
            label = label.to(every_anchor.device)  # matching may have moved to the CPU
            if self.anchor_boundary_thresh >= 0:
                inside = every_anchor.inside_box(objects.image_size, self.anchor_boundary_thresh)
                label[~inside] = -1
            label[(label == 0) & covered_by_ignore(every_anchor, ignore_boxes)] = -1
            labels.append(self._subsample_labels(label))
            # Without objects every label is 0 or -1 and no box is read.
            matched_boxes.append(
                objects.gt_boxes[matches].tensor
                if len(objects)
                else torch.zeros_like(every_anchor.tensor)
            )
        return labels, matched_boxes


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
