"""Focal and global distillation: attended features of objects and background, and relations."""

import torch
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.adapters import adapt_map, make_adapter
from hkd_d2.distillation.masks import focal_weights
from hkd_d2.distillation.spec import DetectorSpec, matched_levels
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import feature_imitation_loss

PARTS = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT")


@TERM_REGISTRY.register()
class FGD(Term):
    """Focal and global knowledge distillation (FGD, CVPR 2022).

    .. math:: L = \\frac{1}{N} \\sum_l \\Big[
              \\sum_{nij} (\\alpha M_{nij} + \\beta B_{nij})\\, a^T_{nij}
              \\sum_c b^T_{nc} (A(F^S) - F^T)_{ncij}^2
              + \\gamma \\left(\\|a^S - a^T\\|_1 + \\|b^S - b^T\\|_1\\right)
              + \\lambda \\|G^S(A(F^S)) - G^T(F^T)\\|_2^2 \\Big]

    with spatial attention ``a = HW softmax_hw(mean_c |F| / T)`` and channel attention
    ``b = C softmax_c(mean_hw |F| / T)``; ``M`` is 1 over the area of a box on its cells and ``B`` 1
    over their number on the others (:func:`~hkd_d2.distillation.masks.focal_weights`). ``G`` is a
    :class:`GlobalContext` of each side, both trained; ``A`` a 1x1 adapter where the widths differ.
    Sums over channels and cells are divided by the number of images alone, as in the released code
    (yzd-v/FGD c03a6cf), whose weights for two-stage detectors are the defaults; so a weight is of
    one width and size of maps. There a box is scaled by the image's size before padding, here by
    the stride. Ignore regions are ours.

    Raises:
        ValueError: a level that a network lacks, or a number out of its range.
    """

    needs = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term, on top of those of its parts.
        node.WEIGHT = 1.0
        # Student's FPN levels that are distilled; the teacher's are found by stride.
        node.LEVELS = ["p2", "p3", "p4", "p5"]
        # Temperature of the attention.
        node.TEMPERATURE = 0.5
        # Weight of the objects' cells, alpha.
        node.FOREGROUND_WEIGHT = 5e-5
        # Weight of the other cells, beta.
        node.BACKGROUND_WEIGHT = 2.5e-5
        # Weight of the difference of both networks' attention, gamma.
        node.ATTENTION_WEIGHT = 5e-5
        # Weight of the relation between cells, lambda.
        node.RELATION_WEIGHT = 5e-7

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.FGD
        if not node.TEMPERATURE > 0:
            raise ValueError(f"HKD.FGD.TEMPERATURE is {node.TEMPERATURE}; give a number above 0.")
        for name in PARTS:
            if not node[name] >= 0:
                raise ValueError(f"HKD.FGD.{name} is {node[name]}; give a number of at least 0.")
        if not any(node[name] for name in PARTS):
            raise ValueError("All four weights under HKD.FGD are 0; set one, or drop 'fgd'.")
        self.temperature = node.TEMPERATURE
        self.foreground, self.background, self.attention, self.relation = (
            node[name] for name in PARTS
        )
        self.levels = matched_levels("HKD.FGD.LEVELS", node.LEVELS, student, teacher)
        self.strides = {s: float(student.levels[s].stride) for s, _ in self.levels}
        self.adapters, self.student_context, self.teacher_context = (
            nn.ModuleDict() for _ in range(3)
        )
        for s, t in self.levels:
            wide = teacher.levels[t].channels
            adapter = make_adapter(student.levels[s].channels, wide, "auto", "HKD.FGD")
            if adapter is not None:
                self.adapters[s] = adapter
            self.student_context[s] = GlobalContext(wide)
            self.teacher_context[s] = GlobalContext(wide)

    def forward(self, student, teacher, targets):
        ours, theirs, cells, channels, rest = [], [], [], [], 0.0
        for s, t in self.levels:
            mine, taught = student.features[s], teacher.features[t].detach()
            mine = adapt_map(mine, self.adapters[s] if s in self.adapters else None)
            a_s, b_s = attention(mine, self.temperature)
            a_t, b_t = attention(taught, self.temperature)
            mask = focal_weights(
                targets.boxes,
                targets.ignore_boxes,
                tuple(mine.shape[2:]),
                self.strides[s],
                self.foreground,
                self.background,
            )
            ours.append(mine)
            theirs.append(taught)
            cells.append(mask * a_t)
            channels.append(b_t)
            differs = (a_s - a_t).abs().sum() + (b_s - b_t).abs().sum()
            mine, taught = self.student_context[s](mine), self.teacher_context[s](taught)
            relates = (mine.float() - taught.float()).square().sum()
            rest = rest + (self.attention * differs + self.relation * relates) / len(mine)
        # The operator's means over elements and levels are taken back; the one over images stays.
        focal = feature_imitation_loss(
            ours,
            theirs,
            spatial_weights=cells,
            channel_weights=channels,
            level_weights=[float(len(theirs) * t[0].numel()) for t in theirs],
        )
        return focal + rest


def attention(feature: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Spatial and channel attention of a (N, C, H, W) map: (N, H, W) and (N, C), mean 1."""
    n, c, h, w = feature.shape
    size = feature.float().abs()
    cells = (size.mean(1) / temperature).flatten(1).softmax(1)
    channels = (size.mean((2, 3)) / temperature).softmax(1)
    return h * w * cells.view(n, h, w), c * channels


class GlobalContext(nn.Module):
    """A map plus what it says as a whole (GcBlock, arXiv 1904.11492): (N, C, H, W) to the same.

    The cells are averaged with a learned softmax, the average goes through two layers, of C / 2 and
    C channels, and is added to every cell. It starts as the identity, as FGD has it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.pool = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.pool.weight)
        nn.init.zeros_(self.pool.bias)
        half = max(channels // 2, 1)
        last = nn.Linear(half, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.transform = nn.Sequential(
            nn.Linear(channels, half), nn.LayerNorm(half), nn.ReLU(), last
        )

    def forward(self, feature):
        share = self.pool(feature).flatten(1).softmax(1).view(len(feature), *feature.shape[2:])
        context = torch.einsum("nchw,nhw->nc", feature, share.to(feature.dtype))
        return feature + self.transform(context)[:, :, None, None]
