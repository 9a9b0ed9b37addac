"""Knowledge review: the student's levels, fused from coarse to fine, imitate the teacher's."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.spec import DetectorSpec, matched_levels
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import feature_imitation_loss


@TERM_REGISTRY.register()
class ReviewKD(Term):
    """Distilling knowledge via knowledge review (ReviewKD, CVPR 2021), as released for Detectron2.

    From the coarsest level to the finest, the student's map is fused with what the level before
    left (:class:`Fusion`), and the result is compared with the teacher's map by
    :func:`hierarchical_context_loss`. The fusion, the loss and the five levels are those of
    megvii-research/mdistiller (a08d46f, detection/), whose fused maps all have 256 channels, here
    the width of the teacher's finest level.

    Raises:
        ValueError: a level that a network lacks, or levels that are not in order.
    """

    needs = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 1.2
        # Student's FPN levels that are fused and distilled, finest first; the teacher's are found
        # by stride.
        node.LEVELS = ["p2", "p3", "p4", "p5", "p6"]

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        levels = cfg.HKD.REVIEWKD.LEVELS
        self.levels = matched_levels("HKD.REVIEWKD.LEVELS", levels, student, teacher)
        strides = [student.levels[s].stride for s, _ in self.levels]
        if strides != sorted(set(strides)):
            raise ValueError(
                f"HKD.REVIEWKD.LEVELS has strides {strides}; name each level once, finest first."
            )
        inner = teacher.levels[self.levels[0][1]].channels
        self.fusions = nn.ModuleDict(
            {
                s: Fusion(
                    student.levels[s].channels,
                    inner,
                    teacher.levels[t].channels,
                    fuses=s != self.levels[-1][0],
                )
                for s, t in self.levels
            }
        )

    def forward(self, student, teacher, targets):
        outputs, passed_on = [], None
        for s, _ in reversed(self.levels):
            output, passed_on = self.fusions[s](student.features[s], passed_on)
            outputs.insert(0, output)
        return hierarchical_context_loss(outputs, [teacher.features[t] for _, t in self.levels])


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a level with what the coarser one passed on.

    Args:
        in_channels, inner_channels, out_channels: of the student's map, of what is passed on,
            and of the teacher's map.
        fuses: False for the coarsest level, which nothing is passed on to.
    """

    def __init__(self, in_channels: int, inner_channels: int, out_channels: int, fuses: bool):
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, inner_channels, 1, bias=False), nn.BatchNorm2d(inner_channels)
        )
        self.attention = nn.Conv2d(2 * inner_channels, 2, 1) if fuses else None
        self.expand = nn.Sequential(
            nn.Conv2d(inner_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature, passed_on):
        """Return the map to compare, (N, C_out, H, W), and what is passed on, (N, inner, H, W)."""
        feature = self.reduce(feature)
        if self.attention is not None:
            coarser = F.interpolate(passed_on, feature.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([feature, coarser], 1)).sigmoid()
            feature = feature * share[:, :1] + coarser * share[:, 1:]
        return self.expand(feature), feature


def hierarchical_context_loss(
    student: list[torch.Tensor], teacher: list[torch.Tensor]
) -> torch.Tensor:
    """Mean squared error of maps and of what is left of them in 4x4, 2x2 and 1x1 cells.

    .. math:: \\sum_l \\frac{\\sum_k 2^{-k}\\,
              \\operatorname{mse}(P_k(S_l), P_k(T_l))}{\\sum_k 2^{-k}}

    ``P_0`` is the map, the next ones are averages over 4x4, 2x2 and 1x1 cells, as far as these are
    fewer than the map's rows (mdistiller a08d46f, ``hcl``). A sum over levels.

    Args:
        student, teacher: (N, C, H_l, W_l), one a level.

    Returns:
        Tensor: scalar.
    """
    pooled, totals = 0.0, []
    for s, t in zip(student, teacher, strict=True):
        sizes = [size for size in (4, 2, 1) if size < s.shape[2]]
        weights = [0.5 ** (k + 1) for k in range(len(sizes))]
        totals.append(1 + sum(weights))
        for size, weight in zip(sizes, weights, strict=True):
            coarse = (F.adaptive_avg_pool2d(x, size).float() for x in (s, t.detach()))
            pooled = pooled + weight / totals[-1] * F.mse_loss(*coarse)
    whole = feature_imitation_loss(
        student, teacher, level_weights=[len(student) / total for total in totals]
    )
    return whole + pooled
