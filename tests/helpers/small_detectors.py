"""Detectors small enough to build and train in a test, and batches to feed them."""

from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from hkd_d2.config import add_hkd_config

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
# Boxes (XYXY) of the objects of the two images of a batch, and of an ignore region in each.
OBJECTS = [[[8, 10, 30, 60], [50, 5, 68, 50]], [[20, 12, 44, 62], [60, 20, 76, 58]]]
IGNORE = [[[70, 0, 96, 64]], [[0, 0, 16, 64]]]


def small_config(channels=16, hidden=24, width=0.25):
    """Config of a one-class FPN Faster R-CNN with stock modules for images of some 64x96 pixels."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.HKD.BACKBONE.WIDTH_MULTIPLIER = width
    cfg.HKD.BACKBONE.BLOCKS = [1, 1, 1, 1]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0, 2.44]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 60
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # untrained heads detect too
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = hidden
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MAX_SIZE_TRAIN = 96
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.MAX_ITER = 20
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SEED = 3
    return cfg


def one_stage_config(architecture, channels=16, width=0.25):
    """Config of a RetinaNet or FCOS (p3 to p7, one class, towers of one layer) for such images."""
    cfg = small_config(channels, width=width)
    cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_slim_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # untrained heads detect too
    cfg.HKD.PYRAMID.LEVELS = ["p3", "p4", "p5", "p6", "p7"]
    cfg.HKD.REGION.BOXES = "gt"
    cfg.HKD.REGION.POOLER_RESOLUTION = 3
    cfg.HKD.LOGIT.PARTS = ["kl", "deltas", "bounded"]
    return cfg


def cascade_config(channels=16, hidden=24, width=0.25):
    """:func:`small_config` with three cascade stages, all of IoU 0.5 so that all see objects."""
    cfg = small_config(channels, hidden, width)
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = (0.5, 0.5, 0.5)
    return cfg


def preset(name):
    """The config of a published method, of configs/methods."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(str(METHODS / f"{name}.yaml"))
    return cfg


def use_preset(cfg, name):
    """Put a preset's HKD node into a small student's config, but for its backbone and teacher."""
    kept = ("BACKBONE", "TEACHER")
    cfg.HKD.update({key: node for key, node in preset(name).HKD.items() if key not in kept})
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    return cfg


def save_teacher(cfg, folder, name="teacher"):
    """Write config and randomly initialised weights of a teacher; returns the two paths."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = build_model(cfg)
        # Detectron2 starts predictors near 0; a trained teacher does not end there.
        if hasattr(model, "roi_heads"):
            predictors = [model.roi_heads.box_predictor]  # of a cascade a list
        else:
            predictors = [model.head.cls_score, model.head.bbox_pred]
        for parameter in (p for module in predictors for p in module.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
    DetectionCheckpointer(model, str(folder)).save(name)
    config_file = folder / f"{name}.yaml"
    config_file.write_text(cfg.dump())
    return str(config_file), str(folder / f"{name}.pth")


def make_batch(ignore=False, sizes=((64, 96), (60, 90)), seed=5):
    """Two noise images with two objects each and, if asked, an ignore region each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for size, objects, regions in zip(sizes, OBJECTS, IGNORE, strict=True):
        rows = objects + (regions if ignore else [])
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(rows, dtype=torch.float32))
        instances.gt_classes = torch.zeros(len(rows), dtype=torch.int64)
        if ignore:
            instances.gt_ignore = torch.arange(len(rows)) >= len(objects)
            instances.gt_classes[instances.gt_ignore] = -1
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
    return batch
