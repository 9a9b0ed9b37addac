"""Detectron2's FCOS from a config."""

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS, which has no config of its own there, built from one.

    It reads ``MODEL.RETINANET`` as Detectron2's RetinaNet does, of which Detectron2 makes its FCOS
    as well: IN_FEATURES, NUM_CLASSES, NUM_CONVS, NORM, PRIOR_PROB, FOCAL_LOSS_ALPHA and
    FOCAL_LOSS_GAMMA, SCORE_THRESH_TEST (0.2 there), TOPK_CANDIDATES_TEST and NMS_THRESH_TEST (0.6
    there); and ``HKD.FCOS``.
    """

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        maps = [shapes[name] for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": fcos.FCOSHead(
                input_shape=maps,
                num_classes=node.NUM_CLASSES,
                conv_dims=[maps[0].channels] * node.NUM_CONVS,
                norm=node.NORM,
                prior_prob=node.PRIOR_PROB,
            ),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": cfg.HKD.FCOS.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, *others):
        """As Detectron2's, under autocast as well: its GIoU takes boxes of one precision only."""
        pred_anchor_deltas = [x.float() for x in pred_anchor_deltas]
        return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, *others)
