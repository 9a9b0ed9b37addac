"""Feature maps of a few cells, and what terms are built from and called with to compare them."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList

from hkd_d2.distillation.detector_pass import DetectorPass, Targets
from hkd_d2.distillation.spec import DenseSpec, DetectorSpec

NOTHING = Targets(boxes=[torch.zeros(0, 4)], ignore_boxes=[torch.zeros(0, 4)])
SIZES = {"p2": (2, 4), "p3": (1, 2)}


def spec(channels=2, anchors=((8, 8),), strides=(4, 8)):
    """p2 and p3, and an RPN with anchors (width, height) at every cell's corner."""
    cells = [torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in anchors])] * len(strides)
    return DetectorSpec(
        levels={f"p{i + 2}": ShapeSpec(channels=channels, stride=s) for i, s in enumerate((4, 8))},
        roi_levels=["p2", "p3"],
        pooler_resolution=2,
        hidden_channels=3,
        num_classes=1,
        class_agnostic_deltas=True,
        delta_weights=(10.0, 10.0, 5.0, 5.0),
        dense=DenseSpec("RPN", list(strides), cells, 0.0, None) if strides else None,
    )


def passed(features):
    images = ImageList(torch.zeros(1, 3, 8, 16), [(8, 16)])
    return DetectorPass(images=images, features=features)


def maps(channels=2, **values):
    """One image; ``values`` are lists of (channel, row, column, value), the rest is 0."""
    features = {name: torch.zeros(1, channels, *size) for name, size in SIZES.items()}
    for name, cells in values.items():
        for c, i, j, value in cells:
            features[name][0, c, i, j] = value
    return features
