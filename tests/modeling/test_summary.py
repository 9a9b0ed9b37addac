"""Counts against Detectron2's own model, sums by hand and fvcore's counter."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from hkd_d2.config import add_hkd_config
from hkd_d2.modeling.summary import count_flops, count_parameters, image_size


def detector(**keys):
    """Detectron2's own two-stage FPN detector of one class, with one anchor shape a cell."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[2.44]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return build_model(cfg).eval()


@pytest.fixture(scope="module")
def resnet50():
    return detector()


def test_parameters_of_a_resnet50_detector_by_hand(resnet50):
    counts = count_parameters(resnet50)
    # ResNet-50 has 25557032; without the classifier (2048 * 1000 + 1000) 23508032 and without the
    # scale and bias of its norms, 2 * 26560 numbers that FrozenBN holds as buffers, 23454912.
    assert counts["body"] == 25557032 - 2049000 - 2 * 26560
    # Laterals (256 + 512 + 1024 + 2048) * 256 + 4 * 256, tails 4 * (256 * 256 * 9 + 256).
    assert counts["fpn"] == 3840 * 256 + 4 * 256 + 4 * (256 * 256 * 9 + 256)
    # 3x3 convolution, then one objectness and four deltas.
    assert counts["rpn"] == 256 * 256 * 9 + 256 + 5 * (256 + 1)
    # Two hidden layers, then two classes with background and four deltas.
    assert counts["box head"] == 12545 * 1024 + 1025 * 1024 + 6 * 1025
    assert counts["total"] == sum(p.numel() for p in resnet50.parameters())
    assert list(counts) == ["body", "fpn", "rpn", "box head", "total"]


def test_shared_and_own_parameters_count_once():
    model = nn.Module()
    model.a = nn.Linear(3, 4, bias=False)
    model.b = model.a
    model.c = nn.Sequential(model.a, nn.Linear(4, 5, bias=False))
    model.own = nn.Parameter(torch.zeros(7))
    assert count_parameters(model) == {"a": 12, "c": 20, "total": 39}


def test_flops_equal_fvcores_convolutions_and_products(resnet50):
    # 90 x 120 is padded to 96 x 128. fvcore runs the model, random weights and all; its RPN then
    # hands fewer boxes than it may to the box head, so that only the parts before are compared.
    ours = count_flops(resnet50, (90, 120))
    with torch.no_grad():
        theirs = FlopCountAnalysis(resnet50, [{"image": torch.zeros(3, 90, 120)}])
        theirs.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = theirs.by_module_and_operator()

    def gflops(name):
        return sum(by_module[name].get(op, 0) for op in ("conv", "addmm", "linear", "matmul")) / 1e9

    body, backbone = gflops("model.backbone.bottom_up"), gflops("model.backbone")
    assert ours["body"] == pytest.approx(body, rel=1e-6)
    assert ours["fpn"] == pytest.approx(backbone - body, rel=1e-6)
    assert ours["rpn"] == pytest.approx(gflops("model.proposal_generator"), rel=1e-6)


def test_box_head_counts_the_most_boxes_that_it_may_get(resnet50):
    # 10 boxes; inputs times outputs of the four linear layers.
    products = 12544 * 1024 + 1024 * 1024 + 1024 * 2 + 1024 * 4
    counts = count_flops(resnet50, (64, 64))
    assert counts["box head"] == pytest.approx(10 * products / 1e9, rel=1e-9)
    assert counts["total"] == pytest.approx(
        sum(counts[part] for part in ("body", "fpn", "rpn", "box head"))
    )


def test_counting_leaves_the_model_alone(resnet50):
    count_flops(resnet50.train(), (64, 64))
    assert resnet50.training and next(resnet50.parameters()).device.type == "cpu"
    resnet50.eval()


def test_one_stage_detector():
    model = detector(
        MODEL__META_ARCHITECTURE="RetinaNet",
        MODEL__BACKBONE__NAME="build_retinanet_resnet_fpn_backbone",
        MODEL__RESNETS__OUT_FEATURES=["res3", "res4", "res5"],
        MODEL__FPN__IN_FEATURES=["res3", "res4", "res5"],
        MODEL__RETINANET__NUM_CLASSES=1,
    )
    counts, gflops = count_parameters(model), count_flops(model, (128, 128))
    assert list(counts) == list(gflops) == ["body", "fpn", "head", "total"]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    # 8 convolutions of 256 to 256, one to 1 class and one to 4 deltas, for a single anchor a cell;
    # levels of 16, 8, 4, 2 and 1 cells a side have 341 cells.
    assert gflops["head"] == pytest.approx(341 * 9 * 256 * (8 * 256 + 5) / 1e9, rel=1e-9)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has neither an RPN"):
        count_flops(nn.Linear(2, 2), (64, 64))


def test_image_size_is_the_test_size():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 1024, 2048
    assert image_size(cfg) == (1024, 2048)
