"""Which boxes no anchor can meet, against overlaps computed by hand and by Detectron2."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from torch import nn

from hkd_d2.config import add_hkd_config
from hkd_d2.data.anchors import (
    anchor_fit,
    anchor_sizes,
    best_overlap,
    report_anchors,
    resize_factors,
)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (200,), 1000
    cfg.HKD.DATA.MIN_HEIGHT = 20
    return cfg


class Detector(nn.Module):
    def __init__(self, sizes=((64,), (128,)), ratios=(2.0,)):
        super().__init__()
        self.proposal_generator = nn.Module()
        self.proposal_generator.anchor_generator = DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=[list(ratios)], strides=[8, 16][: len(sizes)]
        )


def records(*sizes, height=200, width=300):
    rows = [
        {"bbox": [5.0, 5.0, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        for w, h in sizes
    ]
    return [{"height": height, "width": width, "annotations": rows}]


def test_overlap_on_the_same_centre_is_detectron2s():
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = (torch.rand(n, 2, generator=generator) * 90 + 1 for n in (40, 7))
    centred = [Boxes(torch.cat([-s / 2, s / 2], 1)) for s in (boxes, anchors)]
    expected = pairwise_iou(*centred).max(1).values
    torch.testing.assert_close(best_overlap(boxes, anchors), expected)
    # By hand: 10 x 40 in 20 x 40, half of it.
    assert best_overlap(torch.tensor([[10.0, 40.0]]), torch.tensor([[20.0, 40.0]])).item() == 0.5


def test_sizes_of_a_detectors_anchors():
    # Area 64^2 and 128^2, twice as high as wide.
    sizes = anchor_sizes(Detector())
    expected = [[64 / 2**0.5, 64 * 2**0.5], [128 / 2**0.5, 128 * 2**0.5]]
    torch.testing.assert_close(sizes, torch.tensor(expected))
    assert anchor_sizes(nn.Linear(2, 2)) is None

    class IgnoreAwareFCOS(Detector):
        pass

    assert anchor_sizes(IgnoreAwareFCOS()) is None


def test_factors_of_resizing(cfg):
    assert resize_factors(cfg, 100, 300) == [2.0]
    assert resize_factors(cfg, 100, 1000) == [1.0]  # the long side is bounded
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    assert resize_factors(cfg, 100, 300) == [1.0]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (100, 300), "range"
    assert resize_factors(cfg, 100, 300) == [1.0, 2.0, 3.0]


def test_share_of_boxes_without_an_anchor(cfg):
    anchors = torch.tensor([[40.0, 80.0], [80.0, 160.0]])
    data = records((40, 80), (24, 48), (20, 40), (10, 22), (10, 15))  # the last does not count
    fit = anchor_fit(cfg, anchors, data)
    # Overlaps 1, 0.36, 0.25, 0.07.
    assert (fit.boxes, fit.unmet, fit.lowest_met) == (4, 0.75, 80)
    assert fit.box_heights == (22, 80) and fit.anchor_heights == (80, 160)
    # At half the size in the file, twice the size after resizing.
    fit = anchor_fit(cfg, anchors, records((20, 40), (12, 24), height=100, width=150))
    assert (fit.unmet, fit.lowest_met, fit.box_heights) == (0.5, 40, (48, 80))
    assert anchor_fit(cfg, anchors, records((5, 10))) is None


def test_much_is_a_warning_and_little_is_not(cfg, caplog):
    with caplog.at_level(logging.INFO):
        report_anchors(cfg, Detector(), {"mine": records((45, 90), (10, 22))})
        report_anchors(cfg, Detector(), {"fit": records((45, 90))})
        report_anchors(cfg, nn.Linear(2, 2), {"none": records((45, 90))})
    warning, info = caplog.records
    assert warning.levelno == logging.WARNING and info.levelno == logging.INFO
    assert "50.0 % of the boxes of 'mine'" in warning.getMessage()
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in warning.getMessage()
    assert "0.0 % of the boxes of 'fit'" in info.getMessage()
