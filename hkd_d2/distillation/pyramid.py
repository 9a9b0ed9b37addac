"""Pyramid distillation: the student's FPN maps imitate the teacher's."""

import torch
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.adapters import (
    CONVOLUTIONS,
    LINEAR,
    adapt_map,
    as_pair,
    make_adapter,
)
from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.spec import DetectorSpec, matched_levels
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import feature_imitation_loss, kl_distillation_loss

MASKS = ("none", "boxes", "split", "decoupled")
RASTERIZE_RULES = ("cells", "defeat", "fgfi")
NORMALIZATIONS = ("none", "teacher_variance")
REDUCTIONS = ("mean", "half_mean", "cells", "level_sum")
ELEMENTWISE = ("mse", "l1", "smooth_l1")
WHOLE_MAP = ("pkd", "cwd")
DISTANCES = (*ELEMENTWISE, "cosine", *WHOLE_MAP)


@TERM_REGISTRY.register()
class Pyramid(Term):
    """Distance of the FPN features, the first hierarchy of HKD (arXiv 1909.09325).

    .. math:: L = \\frac{1}{|\\mathcal{L}|} \\sum_{l \\in \\mathcal{L}}
              \\frac{1}{\\sigma_l^2} \\operatorname{mean}_{n,c,h,w}
              \\left(A_l(F^S_l) - F^T_l\\right)^2

    with a 1x1 adapter ``A_l`` where the widths differ. The paper's figure says mean squared error
    and its authors' released code names the FPN outputs as the tap; the default weight 0.5 is that
    of a third-party implementation (yoshitomo-matsubara/hnd-ghnd-object-detectors, 32643d4), not
    confirmed as the paper's. ``sigma_l`` is 1, or with ``NORMALIZE: teacher_variance`` the standard
    deviation of the teacher's map in the batch (ours: it makes the term, so its weight, independent
    of the scale of the teacher's features).

    Other distances, masks, adapters and normalisers make of it FGFI (CVPR 2019), the neck part of
    DeFeat (CVPR 2021), PKD (arXiv 2207.02039) and CWD (arXiv 2011.13256); docs/methods.md has the
    formula of each. ``cwd`` takes every channel of a map for a distribution over its cells,

    .. math:: \\frac{\\tau^2}{N C} \\sum_{n,c} \\mathrm{KL}\\left(
              \\operatorname{softmax}_{hw}(F^T_{nc} / \\tau) \\,\\|\\,
              \\operatorname{softmax}_{hw}(A(F^S)_{nc} / \\tau)\\right)

    Raises:
        ValueError: a level that a network lacks, an option that is not on the list, or options that
            exclude each other.
    """

    needs = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 0.5
        # Student's FPN levels that are distilled; the teacher's are found by stride.
        node.LEVELS = ["p2", "p3", "p4", "p5"]
        # Distance of two feature vectors: mse | l1 | smooth_l1 | cosine, or of two whole maps: pkd
        # (correlation of the channels) | cwd (divergence of each channel's softmax over the cells).
        node.DISTANCE = "mse"
        # Temperature of cwd.
        node.TEMPERATURE = 1.0
        # Active cells: none (the whole map) | boxes (cells under ground truth) | split (both,
        # in one weighted mean) | decoupled (both, each in a mean of its own; DeFeat). Cells under
        # ignore boxes are active only where MASK is none.
        node.MASK = "none"
        # Weight of the cells under the boxes where MASK is split or decoupled.
        node.FOREGROUND_WEIGHT = 1.0
        # Weight of the cells outside the boxes where MASK is split or decoupled.
        node.BACKGROUND_WEIGHT = 0.25
        # Which cells a box covers: cells (all that it touches) | defeat (as DeFeat rounds it) |
        # fgfi (those with an anchor close to it).
        node.RASTERIZE = "cells"
        # Of fgfi: an anchor is close if its IoU with the box is above this share of the best
        # anchor's.
        node.ANCHOR_THRESHOLD = 0.5
        # Divide a level's distance by a statistic of the teacher's map: none | teacher_variance.
        node.NORMALIZE = "none"
        # Reduction: mean (over active elements, then over levels) | half_mean (half
        # of it; DeFeat) | cells (half the sum over channels, mean over active cells and levels;
        # FGFI) | level_sum (the sum of the levels' means; PKD, CWD).
        node.REDUCTION = "mean"
        # Adapters: 1x1, auto (where channel counts differ) | always; or on the whole map conv3x3
        # (DeFeat) | conv3x3_relu (FGFI).
        node.ADAPTER = "auto"

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.PYRAMID
        self.mask = one_of("HKD.PYRAMID.MASK", node.MASK, MASKS)
        self.rasterize = one_of("HKD.PYRAMID.RASTERIZE", node.RASTERIZE, RASTERIZE_RULES)
        self.distance = one_of("HKD.PYRAMID.DISTANCE", node.DISTANCE, DISTANCES)
        one_of("HKD.PYRAMID.REDUCTION", node.REDUCTION, REDUCTIONS)
        normalize = one_of("HKD.PYRAMID.NORMALIZE", node.NORMALIZE, NORMALIZATIONS)
        check_options(node)
        self.normalize = normalize == "teacher_variance"
        self.temperature = node.TEMPERATURE
        self.foreground_weight = node.FOREGROUND_WEIGHT
        self.background_weight = node.BACKGROUND_WEIGHT
        self.levels = matched_levels("HKD.PYRAMID.LEVELS", node.LEVELS, student, teacher)
        self.strides = [float(student.levels[s].stride) for s, _ in self.levels]
        self.anchor_threshold = node.ANCHOR_THRESHOLD
        self.anchor_offset = 0.0
        if self.rasterize == "fgfi":
            self.anchor_offset = student.dense.offset if student.dense else 0.0
            anchors = torch.stack(anchor_sizes(self.strides, student.dense))
            self.register_buffer("anchors", anchors, persistent=False)
        adapters = {
            s: make_adapter(
                student.levels[s].channels,
                teacher.levels[t].channels,
                node.ADAPTER,
                "HKD.PYRAMID.ADAPTER",
                modes=(*LINEAR, *CONVOLUTIONS),
            )
            for s, t in self.levels
        }
        self.adapters = nn.ModuleDict({k: v for k, v in adapters.items() if v is not None})
        self.register_buffer(
            "level_factors",
            level_factors(node.REDUCTION, [teacher.levels[t].channels for _, t in self.levels]),
            persistent=False,
        )
        # The operator applies 1x1 adapters itself, to active cells alone.
        self.adapts_maps = node.ADAPTER in CONVOLUTIONS or self.distance == "cwd"

    def forward(self, student, teacher, targets):
        student_maps = [student.features[s] for s, _ in self.levels]
        teacher_maps = [teacher.features[t] for _, t in self.levels]
        adapters = [self.adapters[s] if s in self.adapters else None for s, _ in self.levels]
        if self.adapts_maps:
            student_maps = [adapt_map(m, a) for m, a in zip(student_maps, adapters, strict=True)]
            adapters = []
        weights = self.level_factors
        if self.normalize:
            weights = weights * inverse_variances(teacher_maps)
        if self.distance == "cwd":
            return self.channel_divergence(student_maps, teacher_maps, weights)
        options = {
            "distance": self.distance,
            "level_weights": weights,
            "adapter": [as_pair(a) for a in adapters] if any(adapters) else None,
        }
        if self.mask == "none":
            return feature_imitation_loss(student_maps, teacher_maps, **options)
        options |= {
            "boxes": targets.boxes,
            "ignore_boxes": targets.ignore_boxes,
            "strides": self.strides,
            "assign_ignore": "all",  # their content is unknown at every scale
            "rasterize": self.rasterize,
        }
        if self.rasterize == "fgfi":
            options |= {
                "anchors": list(self.anchors),
                "anchor_threshold": self.anchor_threshold,
                "anchor_offset": self.anchor_offset,
            }

        def masked(foreground, background):
            return feature_imitation_loss(
                student_maps,
                teacher_maps,
                foreground_weight=foreground,
                background_weight=background,
                **options,
            )

        if self.mask == "boxes":
            return masked(1.0, 0.0)
        if self.mask == "split":
            return masked(self.foreground_weight, self.background_weight)
        # Each over its own count, which one weighted mean cannot be.
        return self.foreground_weight * masked(1.0, 0.0) + self.background_weight * masked(0.0, 1.0)

    def channel_divergence(self, student_maps, teacher_maps, weights):
        """CWD's distance, a mean over the levels with ``weights`` (L,)."""
        # A channel of an image is a row, its cells are the classes.
        losses = torch.stack(
            [
                kl_distillation_loss(
                    s.flatten(2).flatten(0, 1),
                    t.flatten(2).flatten(0, 1),
                    temperature=self.temperature,
                )
                for s, t in zip(student_maps, teacher_maps, strict=True)
            ]
        )
        return (weights.to(losses) * losses).mean()


def check_options(node) -> None:
    """Raise ValueError for options of ``HKD.PYRAMID`` that would have no effect or no meaning."""
    key = "HKD.PYRAMID"
    if node.DISTANCE in WHOLE_MAP and node.MASK != "none":
        raise ValueError(
            f"{key}.DISTANCE {node.DISTANCE} compares whole maps; set {key}.MASK to none."
        )
    if node.MASK == "none" and node.RASTERIZE != "cells":
        raise ValueError(
            f"{key}.RASTERIZE is '{node.RASTERIZE}' and {key}.MASK none, which looks at no box; "
            "choose boxes, split or decoupled."
        )
    if node.MASK in ("none", "boxes") and node.FOREGROUND_WEIGHT != 1:
        raise ValueError(
            f"{key}.FOREGROUND_WEIGHT has no effect where {key}.MASK is {node.MASK}; set {key}."
            "WEIGHT instead."
        )
    if node.REDUCTION in ("half_mean", "cells") and node.DISTANCE not in ELEMENTWISE:
        raise ValueError(
            f"{key}.REDUCTION {node.REDUCTION} counts channels, and {key}.DISTANCE "
            f"{node.DISTANCE} has no number for each; choose mean or level_sum."
        )
    if not node.TEMPERATURE > 0 or (node.TEMPERATURE != 1 and node.DISTANCE != "cwd"):
        raise ValueError(
            f"{key}.TEMPERATURE is {node.TEMPERATURE}; give a number above 0, and 1 where "
            f"{key}.DISTANCE is not cwd."
        )
    for name in ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"):
        if not node[name] >= 0:
            raise ValueError(f"{key}.{name} is {node[name]}; give a number of at least 0.")
    if not 0 <= node.ANCHOR_THRESHOLD < 1:
        raise ValueError(
            f"{key}.ANCHOR_THRESHOLD is {node.ANCHOR_THRESHOLD}; give a share from 0 to below 1."
        )


def level_factors(reduction: str, channels: list[int]) -> torch.Tensor:
    """Factor of each level, (L,), from a mean over elements and levels to ``reduction``.

    Args:
        channels: the teacher's, of each level.
    """
    if reduction == "half_mean":
        return torch.full((len(channels),), 0.5)
    if reduction == "cells":
        return torch.tensor(channels) / 2
    if reduction == "level_sum":
        return torch.full((len(channels),), float(len(channels)))
    return torch.ones(len(channels))


def anchor_sizes(strides: list[float], dense) -> list[torch.Tensor]:
    """(A, 2) widths and heights of the anchors of each stride.

    Args:
        dense: of the network whose anchors these are.

    Raises:
        ValueError: anchors of another kind than Detectron2's default, or a stride without anchors.
    """
    if dense is None:
        raise ValueError(
            "HKD.PYRAMID.RASTERIZE fgfi needs MODEL.ANCHOR_GENERATOR.NAME DefaultAnchorGenerator; "
            "choose cells or defeat."
        )
    sizes = []
    for stride in strides:
        if int(stride) not in dense.strides:
            raise ValueError(
                f"HKD.PYRAMID.RASTERIZE is 'fgfi', and the level of stride {int(stride)} has no "
                f"anchors (strides {dense.strides} have); remove it from HKD.PYRAMID.LEVELS."
            )
        anchors = dense.cell_anchors[dense.strides.index(int(stride))]
        sizes.append((anchors[:, 2:] - anchors[:, :2]).float())
    return sizes


def inverse_variances(maps: list[torch.Tensor], eps: float = 1e-6) -> torch.Tensor:
    """1 / (variance + eps) of each tensor over all its elements, (len(maps),) float32."""
    return torch.stack([1 / (m.detach().float().var(correction=0) + eps) for m in maps])
