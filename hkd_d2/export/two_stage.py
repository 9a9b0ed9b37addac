"""The inference of a two-stage detector with shapes that are known beforehand."""

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn

from hkd_d2.export.postprocess import (
    Anchors,
    DecodeDeltas,
    KeepByNms,
    Normalize,
    best,
    by_group,
    clip,
    dense,
    detections,
    has_area,
    keep_by_nms,
    positive,
)

# A box that no map reaches: RoIAlign gives zeros for it, after little work.
NOWHERE = -1.0e6


class TwoStageGraph(nn.Module):
    """A GeneralizedRCNN from uint8 images to detections, out of the detector's own parts.

    Proposals are as many as the RPN keeps at most, with a mask of those that count.

    Args:
        model: with an RPN and StandardROIHeads or CascadeROIHeads.
        keep: non-maximum suppression, as :func:`keep_by_nms`.

    Raises:
        ValueError: a part that has no counterpart here.
    """

    def __init__(self, model: GeneralizedRCNN, keep: KeepByNms = keep_by_nms):
        super().__init__()
        rpn, heads = model.proposal_generator, model.roi_heads
        self.keep = keep
        self.normalize = Normalize(model)
        self.backbone = model.backbone

        _check(rpn.anchor_generator, DefaultAnchorGenerator, "anchor generator")
        _check(rpn.box2box_transform, Box2BoxTransform, "box transform of the RPN")
        self.rpn_head = rpn.rpn_head
        self.rpn_features = list(rpn.in_features)
        self.anchors = Anchors(rpn.anchor_generator)
        self.decode_proposals = DecodeDeltas(rpn.box2box_transform)
        self.pre_nms = positive("MODEL.RPN.PRE_NMS_TOPK_TEST", rpn.pre_nms_topk[False])
        self.post_nms = positive("MODEL.RPN.POST_NMS_TOPK_TEST", rpn.post_nms_topk[False])
        self.rpn_iou, self.min_box_size = rpn.nms_thresh, float(rpn.min_box_size)

        cascade = isinstance(heads, CascadeROIHeads)
        self.box_features = list(heads.box_in_features)
        self.pooler = LevelPooler(heads.box_pooler)
        self.box_heads = nn.ModuleList(heads.box_head if cascade else [heads.box_head])
        self.predictors = nn.ModuleList(heads.box_predictor if cascade else [heads.box_predictor])
        for predictor in self.predictors:
            _check(predictor.box2box_transform, Box2BoxTransform, "box transform of the heads")
        self.decoders = nn.ModuleList(DecodeDeltas(p.box2box_transform) for p in self.predictors)
        last = self.predictors[-1]
        self.num_classes = heads.num_classes
        self.score_threshold, self.iou = last.test_score_thresh, last.test_nms_thresh
        # A negative number is Detectron2's word for all: each proposal in each class.
        every = self.post_nms * self.num_classes
        topk = last.test_topk_per_image
        self.max_detections = positive("TEST.DETECTIONS_PER_IMAGE", every if topk < 0 else topk)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`hkd_d2.export.postprocess.detections` for what (N, 3, H, W) uint8 give."""
        size = images.shape[-2:]
        features = self.backbone(self.normalize(images))
        boxes, valid = self.propose([features[name] for name in self.rpn_features], size)
        maps = [features[name] for name in self.box_features]
        number, rows = valid.shape
        probabilities = []
        for stage, decode in enumerate(self.decoders):
            if stage:  # the boxes of the stage before
                boxes = clip(boxes, *size)
            hidden = self.box_heads[stage](self.pooler(maps, boxes))
            predictor = self.predictors[stage]
            logits, deltas = predictor(hidden)
            by_sigmoid = getattr(predictor, "use_sigmoid_ce", False)
            probabilities.append(logits.sigmoid() if by_sigmoid else logits.softmax(-1))
            deltas = deltas.reshape(number, rows, -1, 4)
            boxes = decode(deltas, boxes[:, :, None].expand(-1, -1, deltas.shape[2], -1))
            if stage + 1 < len(self.decoders):
                boxes = boxes[:, :, 0]  # of a cascade boxes are the same for every class
        scores = sum(probabilities) * (1.0 / len(probabilities))
        scores = scores.reshape(number, rows, -1)
        finite = boxes.isfinite().all(-1).all(-1) & scores.isfinite().all(-1)
        scores = scores[..., : self.num_classes]
        boxes = clip(boxes, *size).expand(-1, -1, self.num_classes, -1)
        classes = torch.arange(self.num_classes, device=scores.device).expand(number, rows, -1)
        valid = (valid & finite)[..., None] & (scores > self.score_threshold)
        return detections(
            boxes.reshape(number, -1, 4),
            scores.reshape(number, -1),
            valid.reshape(number, -1),
            classes.reshape(number, -1),
            num_classes=self.num_classes,
            size=size,
            number=self.max_detections,
            iou=self.iou,
            keep=self.keep,
        )

    def propose(self, maps: list[Tensor], size: tuple) -> tuple[Tensor, Tensor]:
        """The RPN's boxes (N, post_nms, 4) and which of them count, (N, post_nms) bool."""
        boxes, scores, valid, levels = [], [], [], []
        per_level = zip(self.anchors(maps), *self.rpn_head(maps), strict=True)
        for level, (anchors, logits, deltas) in enumerate(per_level):
            logits, deltas = dense(logits, 1).squeeze(2), dense(deltas, 4)
            anchors = anchors.expand(logits.shape[0], -1, -1)
            logits, counts, deltas, anchors = best(
                logits, logits.isfinite(), self.pre_nms, deltas, anchors
            )
            boxes.append(self.decode_proposals(deltas, anchors))
            scores.append(logits)
            valid.append(counts)
            levels.append(torch.full_like(logits, level, dtype=torch.int64))
        boxes, scores, valid, levels = (torch.cat(v, 1) for v in (boxes, scores, valid, levels))
        finite = boxes.isfinite().all(-1)
        boxes = clip(boxes, *size)
        valid = valid & finite & has_area(boxes, self.min_box_size)
        valid = valid & self.keep(boxes, by_group(scores, valid, levels, len(maps)), self.rpn_iou)
        _, valid, boxes = best(scores, valid, self.post_nms, boxes)
        return boxes, valid


class LevelPooler(nn.Module):
    """Detectron2's ``ROIPooler`` without indices: each level pools every row, the others nowhere.

    Args:
        pooler: of ROIAlign.
    """

    def __init__(self, pooler: nn.Module):
        super().__init__()
        for aligned in pooler.level_poolers:
            _check(aligned, ROIAlign, "pooler")
        self.scales = [p.spatial_scale for p in pooler.level_poolers]
        first = pooler.level_poolers[0]
        self.output_size = tuple(pooler.output_size)
        self.sampling_ratio, self.aligned = first.sampling_ratio, first.aligned
        self.min_level, self.max_level = pooler.min_level, pooler.max_level
        self.canonical_size = float(pooler.canonical_box_size)
        self.canonical_level = float(pooler.canonical_level)

    def forward(self, maps: list[Tensor], boxes: Tensor) -> Tensor:
        """(N * R, C, P, P) features of (N, R, 4) boxes."""
        number, rows = boxes.shape[:2]
        levels = self.levels(boxes).reshape(-1)
        images = torch.arange(number, device=boxes.device, dtype=boxes.dtype)
        images = images[:, None].expand(number, rows).reshape(-1, 1)
        boxes = boxes.reshape(-1, 4)
        pooled = []
        for level, (feature, scale) in enumerate(zip(maps, self.scales, strict=True)):
            here = torch.where((levels == level)[:, None], boxes, NOWHERE)
            pooled.append(
                torch.ops.torchvision.roi_align(
                    feature,
                    torch.cat([images, here], dim=1),
                    scale,
                    *self.output_size,
                    self.sampling_ratio,
                    self.aligned,
                )
            )
        return sum(pooled)

    def levels(self, boxes: Tensor) -> Tensor:
        """Index of the level of each of (..., 4) boxes: FPN (Lin et al. 2017), equation 1."""
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        level = torch.floor(
            self.canonical_level + torch.log2(area.sqrt() / self.canonical_size + 1e-8)
        )
        return level.clamp(self.min_level, self.max_level).to(torch.int64) - self.min_level


def _check(part, kind, name):
    if type(part) is not kind:
        raise ValueError(
            f"The {name} is a {type(part).__name__} and export knows {kind.__name__} alone."
        )
