"""The parts of an exported graph, by hand and against Detectron2's own."""

import onnx
import onnxruntime
import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from helpers.rules import rule
from hkd_d2.export.onnx_operators import TRANSLATIONS, keep_by_nms_operator
from hkd_d2.export.postprocess import (
    LOWEST,
    Anchors,
    DecodeDeltas,
    DecodeDistances,
    best,
    by_group,
    dense,
    has_area,
    keep_by_nms,
)
from hkd_d2.export.two_stage import LevelPooler

pytestmark = rule("The parts of the exported graph equal Detectron2's")


def random_boxes(*shape, extent=100.0):
    corner = torch.rand(*shape, 2) * extent - 10  # some begin outside the image
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 60 + 1], dim=-1)


def onnx_nms(boxes, scores, iou):
    """What onnxruntime makes of the operator."""

    class Module(torch.nn.Module):
        def forward(self, boxes, scores):
            return keep_by_nms_operator(boxes, scores, iou)

    program = torch.onnx.export(
        Module().eval(),
        (boxes, scores),
        dynamo=True,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    onnx.checker.check_model(program.model_proto, full_check=True)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    fed = dict(zip(names, (boxes.numpy(), scores.numpy()), strict=True))
    return torch.from_numpy(session.run(None, fed)[0])


@pytest.mark.parametrize("implementation", [keep_by_nms, keep_by_nms_operator, onnx_nms])
def test_nms_by_hand(implementation):
    # Of the first two, IoU 80 / 120 = 0.667; the third is apart, the fourth in another group.
    boxes = torch.tensor([[0, 0, 10, 10], [2, 0, 12, 10], [30, 0, 40, 10], [0, 0, 10, 10.0]])
    boxes = boxes.expand(2, -1, -1).contiguous()
    scores = torch.tensor([[0.8, 0.9, 0.1, 0.7], [0.9, 0.8, 0.1, 0.7]])
    valid = torch.tensor([[True, True, True, True], [False, True, False, True]])
    groups = torch.tensor([0, 0, 0, 1]).expand(2, -1)
    scores = by_group(scores, valid, groups, 2)
    assert implementation(boxes, scores, 0.5).tolist() == [
        [False, True, True, True],
        [False, True, False, True],
    ]
    assert implementation(boxes, scores, 0.7).tolist() == valid.tolist()
    nothing = torch.full_like(scores, LOWEST)
    assert not implementation(boxes, nothing, 0.5).any()


@pytest.mark.parametrize("implementation", [keep_by_nms, onnx_nms])
def test_nms_is_detectron2s_in_every_image_and_group(implementation):
    boxes, scores = random_boxes(3, 400), torch.randn(3, 400)
    valid, groups = torch.rand(3, 400) < 0.7, torch.randint(0, 4, (3, 400))
    kept = implementation(boxes, by_group(scores, valid, groups, 4), 0.4)
    for i in range(3):
        rows = valid[i].nonzero().squeeze(1)
        wanted = rows[batched_nms(boxes[i, rows], scores[i, rows], groups[i, rows], 0.4)]
        assert 0 < len(wanted) < len(rows)
        assert kept[i].nonzero().squeeze(1).tolist() == sorted(wanted.tolist())


def test_far_images_are_suppressed_as_near_ones():
    """Places far out are not rounded: the last of 64 images of 8 levels keeps what the first does.

    In float32 a box of the last lies at some 512 * 4000 = 2e6, where numbers are 0.125 apart.
    """
    # A hundred pairs far from each other, moved sideways by d: IoU (100 - d) / (100 + d), which is
    # 0.7 at d = 17.647.
    corner = torch.stack([torch.arange(100) % 10, torch.arange(100) // 10], dim=1) * 400.0
    first = torch.cat([corner, corner + 100], dim=1)
    second = (
        first + torch.tensor([1.0, 0, 1, 0]) * (17.647 + torch.linspace(-0.1, 0.1, 100))[:, None]
    )
    boxes = torch.stack([first, second], dim=1).reshape(1, 200, 4)
    scores = torch.rand(1, 200).expand(64, -1)
    groups = torch.full((64, 200), 7)
    every = by_group(scores, torch.ones(64, 200, dtype=torch.bool), groups, 8)
    kept = keep_by_nms(boxes.expand(64, -1, -1).contiguous(), every, 0.7)
    wanted = batched_nms(boxes[0], scores[0], groups[0] * 0, 0.7)
    assert 130 < len(wanted) < 170
    for row in kept:
        assert row.nonzero().squeeze(1).tolist() == sorted(wanted.tolist())


def test_best_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.8]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    others = torch.arange(6).reshape(2, 3), torch.arange(12.0).reshape(2, 3, 2)
    found, counts, rows, columns = best(scores, valid, 2, *others)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.1], [0.8, 0.3]]))
    assert counts.tolist() == [[True, True], [True, True]]
    assert rows.tolist() == [[1, 0], [5, 3]]
    assert columns.tolist() == [[[2, 3], [0, 1]], [[10, 11], [6, 7]]]
    _, counts, rows = best(scores, valid, 5, others[0])
    assert counts.tolist() == [[True, True, False, False, False], [True] * 3 + [False] * 2]
    assert rows.shape == (2, 5)


def test_what_has_area():
    boxes = torch.tensor(
        [[0, 0, 2, 3], [0, 0, 0, 3], [2, 0, 1, 3], [0, 0, float("nan"), 3], [0, 0, 1e38 * 10, 3]]
    )
    assert has_area(boxes).tolist() == [True, False, False, False, False]
    assert not has_area(boxes[:1], smallest=2.0).any()


def test_anchors_and_rows_are_detectron2s():
    generator = DefaultAnchorGenerator(
        sizes=[[16, 22], [32, 44]], aspect_ratios=[[1.0, 2.44]], strides=[4, 8], offset=0.5
    )
    maps = [torch.randn(2, 8, 5, 7), torch.randn(2, 8, 3, 4)]
    for ours, theirs in zip(Anchors(generator)(maps), generator(maps), strict=True):
        torch.testing.assert_close(ours, theirs.tensor, rtol=0, atol=0)
    # Channel a * K + k of cell (y, x) is column k of row (y * W + x) * A + a.
    prediction = torch.arange(2 * 8 * 5 * 7).reshape(2, 8, 5, 7)
    rows = dense(prediction, 4)
    assert rows[1, (3 * 7 + 2) * 2 + 1].tolist() == prediction[1, 4:8, 3, 2].tolist()


def test_boxes_are_decoded_as_by_detectron2():
    boxes, deltas = random_boxes(50), torch.randn(50, 4)
    deltas[:5] *= 20  # beyond the clamp
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    wanted = transform.apply_deltas(deltas, boxes)
    torch.testing.assert_close(DecodeDeltas(transform)(deltas, boxes), wanted)
    for by_size in (True, False):
        transform = Box2BoxTransformLinear(normalize_by_size=by_size)
        wanted = transform.apply_deltas(deltas, boxes)
        torch.testing.assert_close(DecodeDistances(transform)(deltas, boxes), wanted)


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_pools_as_detectron2(kind, ratio):
    pooler = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], ratio, kind)
    maps = [torch.randn(2, 5, 64 // k, 96 // k) for k in (1, 2, 4)]
    sizes = torch.linspace(3, 300, 40)[None, :, None]  # every level has boxes
    corner = torch.rand(2, 40, 2) * 100
    boxes = torch.cat([corner, corner + sizes * (0.5 + torch.rand(2, 40, 2))], dim=-1)
    ours = LevelPooler(pooler)
    assert set(ours.levels(boxes).flatten().tolist()) == {0, 1, 2}
    wanted = pooler(maps, [Boxes(b) for b in boxes])
    torch.testing.assert_close(ours(maps, boxes), wanted)
