"""Ignore regions in anchor and proposal sampling, against stock Detectron2 and by hand."""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from helpers.rules import rule
from helpers.small_detectors import make_batch
from hkd_d2.modeling.ignore import IgnoreAwareROIHeads, IgnoreAwareRPN, covered_by_ignore

pytestmark = rule(
    "Ignore: half of a box's own area in one ignore box leaves it out, and positives stay"
)


def test_share_is_of_the_boxs_own_area_and_half_counts():
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.5], [0, 0, 40, 40], [3, 3, 4, 4]]))
    regions = Boxes(torch.tensor([[0.0, 0, 10, 5], [2, 2, 8, 8]]))
    # 50 / 100 = 0.5 counts; 50 / 105 does not; a large box around a region does not; inside does
    assert covered_by_ignore(boxes, regions).tolist() == [True, False, False, True]
    # Two regions of 0.3 each do not add up.
    halves = Boxes(torch.tensor([[0.0, 0, 10, 3], [0, 7, 10, 10]]))
    assert covered_by_ignore(boxes[:1], halves).tolist() == [False]
    assert covered_by_ignore(boxes, regions[:0]).tolist() == [False] * 4


def test_without_ignore_rows_labels_equal_stock_detectron2(student_cfg, build):
    stock = build(student_cfg)
    student_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "IgnoreAwareRPN"
    student_cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    aware = build(student_cfg)
    assert isinstance(aware.proposal_generator, IgnoreAwareRPN)
    assert isinstance(aware.roi_heads, IgnoreAwareROIHeads)
    for boundary in (-1, 0):
        for model in (stock, aware):
            model.proposal_generator.anchor_boundary_thresh = boundary
        found = []
        for model in (stock, aware):
            torch.manual_seed(0)
            with EventStorage(0):
                found.append((model(make_batch()), torch.get_rng_state()))
        (losses, state), (losses_aware, state_aware) = found
        assert all(torch.equal(losses_aware[k], v) for k, v in losses.items())
        assert torch.equal(state, state_aware)


def _rpn(**kwargs):
    return IgnoreAwareRPN(
        in_features=["p2"],
        head=torch.nn.Identity(),
        anchor_generator=torch.nn.Identity(),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=None,
        batch_size_per_image=100,
        positive_fraction=0.5,
        pre_nms_topk=(10, 10),
        post_nms_topk=(10, 10),
        **kwargs,
    )


def _instances(objects, ignore):
    rows = objects + ignore
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([0] * len(objects) + [-1] * len(ignore))
    instances.gt_ignore = torch.tensor([False] * len(objects) + [True] * len(ignore))
    return instances


def test_anchors_of_ignore_regions_are_not_background():
    anchors = [
        Boxes(
            torch.tensor(
                [
                    [0.0, 0, 10, 20],  # the object itself: positive although inside the region
                    [20, 0, 30, 20],  # inside the region: ignored
                    [40, 40, 50, 60],  # elsewhere: negative
                    [25, 0, 45, 20],  # a quarter inside: negative
                ]
            )
        )
    ]
    with_objects = _instances([[0, 0, 10, 20]], [[0, 0, 30, 30]])
    labels, boxes = _rpn().label_and_sample_anchors(anchors, [with_objects])
    assert labels[0].tolist() == [1, -1, 0, 0]
    assert boxes[0][0].tolist() == [0, 0, 10, 20]
    # The same regions without any object: nothing is positive, the regions stay ignored.
    labels, boxes = _rpn().label_and_sample_anchors(anchors, [_instances([], [[0, 0, 30, 30]])])
    assert labels[0].tolist() == [-1, -1, 0, 0]
    assert boxes[0].shape == (4, 4)


def test_proposals_of_ignore_regions_are_not_sampled(student_cfg, build):
    student_cfg.MODEL.ROI_HEADS.NAME = "IgnoreAwareROIHeads"
    heads = build(student_cfg).roi_heads

    def sample(instances):
        proposals = Instances((64, 64))
        proposals.proposal_boxes = Boxes(
            torch.tensor([[0.0, 0, 10, 20], [20, 0, 30, 20], [40, 40, 50, 60], [25, 0, 45, 20]])
        )
        proposals.objectness_logits = torch.zeros(4)
        with EventStorage(0):
            (sampled,) = heads.label_and_sample_proposals([proposals], [instances])
        boxes, labels = sampled.proposal_boxes.tensor.tolist(), sampled.gt_classes.tolist()
        return sorted(zip(boxes, labels, strict=True))

    # class 0 is the object (twice: ground truth is appended), 1 the background
    assert sample(_instances([[0, 0, 10, 20]], [[0, 0, 30, 30]])) == [
        ([0, 0, 10, 20], 0),
        ([0, 0, 10, 20], 0),
        ([25, 0, 45, 20], 1),
        ([40, 40, 50, 60], 1),
    ]
    assert sample(_instances([], [[0, 0, 30, 30]])) == [
        ([25, 0, 45, 20], 1),
        ([40, 40, 50, 60], 1),
    ]
