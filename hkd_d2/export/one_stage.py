"""The inference of RetinaNet and FCOS with shapes that are known beforehand."""

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from hkd_d2.export.postprocess import (
    Anchors,
    DecodeDeltas,
    DecodeDistances,
    KeepByNms,
    Normalize,
    best,
    dense,
    detections,
    keep_by_nms,
    positive,
)


class OneStageGraph(nn.Module):
    """A RetinaNet or FCOS from uint8 images to detections, out of the detector's own parts.

    Args:
        model: RetinaNet or FCOS.
        keep: non-maximum suppression, as :func:`keep_by_nms`.

    Raises:
        ValueError: a box transform that has no counterpart here.
    """

    def __init__(self, model: DenseDetector, keep: KeepByNms = keep_by_nms):
        super().__init__()
        self.keep = keep
        self.normalize = Normalize(model)
        self.backbone, self.head = model.backbone, model.head
        self.features = list(model.head_in_features)
        self.anchors = Anchors(model.anchor_generator)
        if isinstance(model.box2box_transform, Box2BoxTransformLinear):
            self.decode = DecodeDistances(model.box2box_transform)
        elif isinstance(model.box2box_transform, Box2BoxTransform):
            self.decode = DecodeDeltas(model.box2box_transform)
        else:
            found = type(model.box2box_transform).__name__
            raise ValueError(
                f"The box transform is a {found}; export knows Box2BoxTransform and "
                "Box2BoxTransformLinear."
            )
        self.num_classes = model.num_classes
        self.score_threshold, self.iou = model.test_score_thresh, model.test_nms_thresh
        self.topk = positive("MODEL.RETINANET.TOPK_CANDIDATES_TEST", model.test_topk_candidates)
        # Detectron2's one-stage detectors take a negative number to drop the last ones.
        self.max_detections = positive("TEST.DETECTIONS_PER_IMAGE", model.max_detections_per_image)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`hkd_d2.export.postprocess.detections` for what (N, 3, H, W) uint8 give."""
        features = self.backbone(self.normalize(images))
        maps = [features[name] for name in self.features]
        anchors = self.anchors(maps)
        logits, deltas, *centreness = self.head(maps)
        boxes, scores, valid, classes = [], [], [], []
        for level, source in enumerate(anchors):
            score = dense(logits[level], self.num_classes).sigmoid()
            if centreness:  # FCOS: https://arxiv.org/abs/2006.09214, equation 4
                score = torch.sqrt(score * dense(centreness[0][level], 1).sigmoid())
            number = score.shape[0]
            # Rows are (anchor, class); which anchor and class a row is follows from its place.
            score = score.reshape(number, -1)
            places = torch.arange(score.shape[1], device=score.device).expand(number, -1)
            score, counts, places = best(score, score > self.score_threshold, self.topk, places)
            rows = (places // self.num_classes)[..., None].expand(-1, -1, 4)
            delta = dense(deltas[level], 4).gather(1, rows)
            source = source.expand(number, -1, -1).gather(1, rows)
            boxes.append(self.decode(delta, source))
            scores.append(score)
            valid.append(counts)
            classes.append(places % self.num_classes)
        boxes, scores, valid, classes = (torch.cat(v, 1) for v in (boxes, scores, valid, classes))
        return detections(
            boxes,
            scores,
            valid & boxes.isfinite().all(-1),
            classes,
            num_classes=self.num_classes,
            size=images.shape[-2:],
            number=self.max_detections,
            iou=self.iou,
            keep=self.keep,
        )
