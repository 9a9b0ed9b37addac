"""Masked generative distillation: the teacher's maps from part of the student's cells."""

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from hkd_d2.distillation.adapters import adapt_map, make_adapter
from hkd_d2.distillation.spec import DetectorSpec, matched_levels
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import feature_imitation_loss


@TERM_REGISTRY.register()
class MGD(Term):
    """Masked generative distillation (MGD, ECCV 2022).

    .. math:: L = \\frac{1}{N} \\sum_l \\sum_{ncij}
              \\left(G_l(m_l \\odot A_l(F^S_l)) - F^T_l\\right)_{ncij}^2

    where ``m`` leaves out a random share ``MASK_RATIO`` of the cells of every image and level, and
    the generation block ``G`` (3x3 convolution, ReLU, 3x3 convolution) has to fill them in. ``A``
    is a 1x1 adapter where the widths differ. The sum over channels and cells is divided by the
    number of images alone, as in the released code (yzd-v/MGD, det/), so a weight is of one width
    and size of maps.

    The masks come from a generator of the term's own, which is saved with its state. In distributed
    training every process draws its own masks, and the state is the same in all.

    Raises:
        ValueError: a level that a network lacks, or a share out of its range.
    """

    needs = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 5e-7
        # Student's FPN levels that are distilled; the teacher's are found by stride.
        node.LEVELS = ["p2", "p3", "p4", "p5"]
        # Share of the student's cells that are masked.
        node.MASK_RATIO = 0.45

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.MGD
        if not 0 <= node.MASK_RATIO < 1:
            raise ValueError(
                f"HKD.MGD.MASK_RATIO is {node.MASK_RATIO}; give a share from 0 to below 1."
            )
        self.mask_ratio = node.MASK_RATIO
        self.levels = matched_levels("HKD.MGD.LEVELS", node.LEVELS, student, teacher)
        self.adapters, self.generation = nn.ModuleDict(), nn.ModuleDict()
        for s, t in self.levels:
            wide = teacher.levels[t].channels
            adapter = make_adapter(student.levels[s].channels, wide, "auto", "HKD.MGD")
            if adapter is not None:
                self.adapters[s] = adapter
            self.generation[s] = nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1)
            )
        self.generator = torch.Generator().manual_seed(max(cfg.SEED, 0))

    def get_extra_state(self):
        return self.generator.get_state()

    def set_extra_state(self, state):
        self.generator.set_state(state.cpu())

    def forward(self, student, teacher, targets):
        theirs = [teacher.features[t] for _, t in self.levels]
        ours = []
        seed = int(torch.randint(2**62, (), generator=self.generator)) + comm.get_rank()
        generator = torch.Generator(theirs[0].device).manual_seed(seed)
        for s, _ in self.levels:
            adapter = self.adapters[s] if s in self.adapters else None
            mine = adapt_map(student.features[s], adapter)
            draws = torch.rand(
                (len(mine), 1, *mine.shape[2:]), generator=generator, device=mine.device
            )
            ours.append(self.generation[s](mine * (draws >= self.mask_ratio)))
        # The operator's means over elements and levels are taken back; the one over images stays.
        sums = [float(len(theirs) * t[0].numel()) for t in theirs]
        return feature_imitation_loss(ours, theirs, level_weights=sums)
