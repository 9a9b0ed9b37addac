"""Feature maps of a few cells, and what terms are built from and called with to compare them."""

import dataclasses

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.structures import Boxes, ImageList, Instances

from helpers.small_detectors import small_config
from hkd_d2.distillation import build_terms
from hkd_d2.distillation.detector_pass import DetectorPass, RegionOutputs, Targets
from hkd_d2.distillation.spec import DenseSpec, DetectorSpec

NOTHING = Targets(boxes=[torch.zeros(0, 4)], ignore_boxes=[torch.zeros(0, 4)])
SIZES = {"p2": (2, 4), "p3": (1, 2)}


def spec(strides=(4, 8), channels=2, names=None, **fields):
    """A two-stage detector of one class with levels p2, p3; ``fields`` are those of the class."""
    names = names or [f"p{stride.bit_length() - 1}" for stride in strides]
    shapes = [ShapeSpec(channels=channels, stride=stride) for stride in strides]
    base = DetectorSpec(
        levels=dict(zip(names, shapes, strict=True)),
        roi_levels=list(names),
        pooler_resolution=2,
        hidden_channels=3,
        num_classes=1,
        class_agnostic_deltas=True,
        delta_weights=(10.0, 10.0, 5.0, 5.0),
    )
    return dataclasses.replace(base, **fields)


def dense_spec(head="RPN", strides=(4, 8), sizes=None, offset=0.0, weights=(1.0,) * 4, towers=None):
    """Square anchors of ``sizes``, one list a level; without it one anchor of four cells each."""
    generator = DefaultAnchorGenerator(
        sizes=sizes or [[4 * stride] for stride in strides],
        aspect_ratios=[1.0],
        strides=list(strides),
        offset=offset,
    )
    transform = Box2BoxTransformLinear() if head == "FCOS" else Box2BoxTransform(weights)
    return DenseSpec.of(head, generator, transform, towers)


def one_stage_spec(head="RetinaNet", strides=(8, 16), dense=None, **fields):
    """A one-stage detector; p3, p4 if not said."""
    kind = {
        "pooler_resolution": None,
        "hidden_channels": None,
        "delta_weights": (1.0,) * 4,
        "one_stage": True,
    }
    return spec(strides, dense=dense or dense_spec(head, strides), **kind | fields)


def build_term(name, student=None, teacher=..., class_map=(), seed=3, **options):
    """Build a term for two specs, the teacher like the student if not said.

    Args:
        teacher: None for a term that runs without one.
        options: keys of the term's node.
    """
    student = student or spec()
    cfg = small_config()
    cfg.SEED = seed
    cfg.HKD.TERMS = [name]
    cfg.HKD.TEACHER.CLASS_MAP = list(class_map)
    node = cfg.HKD[name.upper()]
    if "LEVELS" in node:
        node.LEVELS = list(student.levels)
    for key, value in options.items():
        node[key] = value
    return build_terms(cfg, student, student if teacher is ... else teacher)[name]


def passed(features=None, **parts):
    """What a forward of one image leaves; ``parts`` are those of the class."""
    images = ImageList(torch.zeros(1, 3, 8, 16), [(8, 16)])
    return DetectorPass(images=images, features=features or {}, **parts)


def passed_regions(logits, classes, hidden=None):
    """A forward whose sampled boxes have these (R, K + 1) logits and R classes."""
    sampled = Instances((8, 8), gt_classes=torch.tensor(classes))
    regions = RegionOutputs(
        boxes=[Boxes(torch.zeros(len(classes), 4))],
        pooled=torch.zeros(len(classes), 2, 2, 2),
        hidden=hidden,
        class_logits=logits,
    )
    return passed(sampled=[sampled], regions=regions)


def maps(channels=2, **values):
    """One image; ``values`` are lists of (channel, row, column, value), the rest is 0."""
    features = {name: torch.zeros(1, channels, *size) for name, size in SIZES.items()}
    for name, cells in values.items():
        for c, i, j, value in cells:
            features[name][0, c, i, j] = value
    return features
