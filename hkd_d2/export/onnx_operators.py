"""Non-maximum suppression as an operator of its own, which ONNX has for whole batches."""

import torch
from onnxscript import opset18 as op
from onnxscript.onnx_types import BOOL, FLOAT
from torch import Tensor

from hkd_d2.export.postprocess import LOWEST, keep_by_nms

_MOST = 2**31 - 1


@torch.library.custom_op("hkd_d2::keep_by_nms", mutates_args=())
def keep_by_nms_operator(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """:func:`keep_by_nms`, opaque to the exporter."""
    return keep_by_nms(boxes, scores, iou)


@keep_by_nms_operator.register_fake
def _(boxes, scores, iou):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def onnx_keep_by_nms(boxes: FLOAT, scores: FLOAT, iou: float) -> BOOL:
    """The same in ONNX: rows (image, group, box) that stay, scattered into a mask."""
    stay = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[_MOST]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[LOWEST / 2]),
    )
    places = op.Gather(stay, op.Constant(value_ints=[0, 2]), axis=1)
    zeros = op.Mul(op.ReduceMax(scores, op.Constant(value_ints=[1]), keepdims=0), 0.0)
    ones = op.Add(op.Mul(op.Cast(op.Gather(stay, 0, axis=1), to=1), 0.0), 1.0)
    return op.Greater(op.ScatterND(zeros, places, ones), 0.5)


TRANSLATIONS = {torch.ops.hkd_d2.keep_by_nms.default: onnx_keep_by_nms}
