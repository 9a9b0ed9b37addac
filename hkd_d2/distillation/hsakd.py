"""HSAKD: joint predictions of class and rotation, level by level."""

from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import nn

from hkd_d2.distillation.rotation import turn_boxes, turn_images
from hkd_d2.distillation.spec import DetectorSpec, matched_levels
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, Term
from hkd_d2.ops import kl_distillation_loss, multilevel_roi_align

TURNS = 4  # of 90 degrees, the upright image among them
SAMPLING_RATIO = 2


@TERM_REGISTRY.register()
class HSAKD(Term):
    """Hierarchical self-supervision augmented distillation on regions (after arXiv 2107.13715).

    An auxiliary head on every level of either network predicts the class of a pooled region (K
    classes or background) and the number of quarter turns of the image: one softmax over
    4 (K + 1) joint labels 4 c + j. For the first ``TEACHER_ITERS`` iterations the teacher's heads
    learn that from the labels, on the frozen teacher's features; from then on they stay as they are
    and the student's heads, and through them the student, imitate them one to one:

    .. math:: L_T = \\frac{1}{4} \\sum_{j, l} \\mathrm{CE}(q^T_l(t_j x), 4 c + j), \\qquad
              L = \\frac{1}{4} \\sum_{j, l} \\tau^2\\, \\mathrm{KL}(q^T_l(t_j x) \\| q^S_l(t_j x))

    as means over the boxes. So the paper and its code have it for the stages of a classifier
    (winycg/HSAKD, 28c8dc2): the joint label space, one-to-one heads, their sum, tau 3, heads of a
    frozen teacher trained first, a student without labels of its own in the joint space. Everything
    that makes it serve a detector is ours: FPN levels for stages, every one pooled for every box;
    the student's sampled boxes, background as a class of its own, since four turns alone would be
    all that a pedestrian's label has; and fewer turns. The upright image's features are there
    anyway; of the other three turns ``TURNED`` are drawn, each of which costs both networks another
    pass of the backbone, and their mean stands for the mean of all three.

    Images turn with their padding, boxes exactly. A turned pass leaves running statistics and
    random states as they were. The turns come from a generator of the term's own, which is saved
    with the heads. Of both phases the value is returned, under the one weight: chance is the number
    of levels times ln 4 (K + 1) in the first. The teacher's heads are a parameter group of their
    own with neither momentum nor decay, so that nothing moves them later; under SGD of
    ``TEACHER_LR_FACTOR`` times the learning rate, since momentum would have lengthened its steps.

    ``MUTUAL`` is the online form (after HSSAKD, arXiv 2109.03075; same code): one phase, in which
    the heads of both networks learn from the labels and from each other, each from the other as
    from a constant, and all in the optimizer's common groups:

    .. math:: L = \\frac{1}{4} \\sum_{j, l} \\mathrm{CE}(q^T_l, 4 c + j) +
              \\mathrm{CE}(q^S_l, 4 c + j) + \\tau^2\\, \\mathrm{KL}(q^T_l \\| q^S_l) +
              \\tau^2\\, \\mathrm{KL}(q^S_l \\| q^T_l)

    There two whole networks are peers. Here the teacher below its heads is frozen, which is ours.

    Raises:
        ValueError: an option out of range, a level that a network lacks, or a one-stage student.
    """

    needs = frozenset({FEATURES})

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term, in both of its phases.
        node.WEIGHT = 1.0
        # Student's FPN levels with an auxiliary head; the teacher's are found by stride.
        node.LEVELS = ["p2", "p3", "p4", "p5"]
        # Temperature of both sides' joint probabilities.
        node.TEMPERATURE = 3.0
        # Turned images per step in addition to the upright one, drawn from 90, 180 and 270 degrees:
        # 0 to 3.
        node.TURNED = 1
        # Iterations at the start in which the teacher's heads are trained; the student learns from
        # them afterwards.
        node.TEACHER_ITERS = 1488
        # Factor on SOLVER.BASE_LR for the teacher's heads, which lack momentum; 1 under AdamW.
        node.TEACHER_LR_FACTOR = 5.0
        # Train both networks' heads all the time instead, from labels and each other (HSSAKD).
        node.MUTUAL = False

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.HSAKD
        if student.one_stage:
            raise ValueError(
                "The term 'hsakd' classifies the sampled boxes of a box head, and the student is "
                "one-stage; drop 'hsakd' from HKD.TERMS."
            )
        for name in ("TEMPERATURE", "TEACHER_LR_FACTOR"):
            if not node[name] > 0:
                raise ValueError(f"HKD.HSAKD.{name} is {node[name]}; give a number above 0.")
        if node.TURNED not in range(TURNS):
            raise ValueError(f"HKD.HSAKD.TURNED is {node.TURNED}; choose from 0, 1, 2, 3.")
        if not (node.MUTUAL or 0 <= node.TEACHER_ITERS < cfg.SOLVER.MAX_ITER):
            raise ValueError(
                f"HKD.HSAKD.TEACHER_ITERS is {node.TEACHER_ITERS} and SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER}; give fewer, so that the student learns from the heads."
            )
        self.temperature, self.turned = node.TEMPERATURE, node.TURNED
        self.mutual, self.teacher_iters = node.MUTUAL, node.TEACHER_ITERS
        # AdamW's steps are as long without momentum, SGD's shorter.
        factor = node.TEACHER_LR_FACTOR if cfg.HKD.SOLVER.OPTIMIZER == "sgd" else 1.0
        self.teacher_lr = factor * cfg.SOLVER.BASE_LR
        self.levels = matched_levels("HKD.HSAKD.LEVELS", node.LEVELS, student, teacher)
        self.resolution = student.pooler_resolution
        labels = TURNS * (student.num_classes + 1)
        self.student_heads, self.teacher_heads = (
            nn.ModuleList(
                auxiliary_head(spec.levels[pair[side]].channels, labels) for pair in self.levels
            )
            for side, spec in enumerate((student, teacher))
        )
        self.num_classes = student.num_classes
        self.generator = torch.Generator().manual_seed(max(cfg.SEED, 0))

    def get_extra_state(self):
        return self.generator.get_state()

    def set_extra_state(self, state):
        self.generator.set_state(state.cpu())

    def parameter_groups(self):
        if self.mutual:
            return []
        # A gradient of 0 then is a step of 0, for SGD and for AdamW.
        still = {"weight_decay": 0.0, "momentum": 0.0, "betas": (0.0, 0.999)}
        return [{"params": list(self.teacher_heads.parameters()), "lr": self.teacher_lr, **still}]

    def forward(self, student, teacher, targets):
        # Every parameter has a gradient in either phase.
        zero = self.zero(student.features[self.levels[0][0]])
        drawn = torch.randperm(TURNS - 1, generator=self.generator)[: self.turned] + 1
        boxes = [x.proposal_boxes.tensor for x in student.sampled]
        if sum(map(len, boxes)) == 0:
            return zero
        classes = torch.cat([x.gt_classes for x in student.sampled])
        if self.mutual:
            loss = partial(self.mutual_loss, student, teacher, boxes, classes)
        elif get_event_storage().iter < self.teacher_iters:
            loss = partial(self.teachers_loss, teacher, boxes, classes)
        else:
            loss = partial(self.students_loss, student, teacher, boxes)
        return zero + self.mean_over_turns(drawn, loss)

    def mean_over_turns(self, drawn: torch.Tensor, loss) -> torch.Tensor:
        """Mean of ``loss(j)`` over the four turns; the drawn ones stand for those left out."""
        if len(drawn) == 0:
            return loss(0)
        return (loss(0) + (TURNS - 1) * sum(loss(j) for j in drawn.tolist()) / len(drawn)) / TURNS

    def teachers_loss(self, teacher, boxes, classes, turns):
        """Cross-entropy of the teacher's heads with the joint labels, summed over levels."""
        return self.cross_entropy(self.logits(teacher, 1, boxes, turns), classes, turns)

    def students_loss(self, student, teacher, boxes, turns):
        """Divergence of the student's heads from the teacher's, summed over levels."""
        with torch.no_grad():
            theirs = self.logits(teacher, 1, boxes, turns)
        return self.divergence(self.logits(student, 0, boxes, turns), theirs)

    def mutual_loss(self, student, teacher, boxes, classes, turns):
        """Both sides' cross-entropy, and the divergence of each from the other."""
        ours, theirs = (self.logits(x, i, boxes, turns) for i, x in enumerate((student, teacher)))
        hard = sum(self.cross_entropy(x, classes, turns) for x in (ours, theirs))
        return hard + self.divergence(ours, theirs) + self.divergence(theirs, ours)

    def cross_entropy(self, logits, classes, turns):
        labelled = (classes >= 0) & (classes <= self.num_classes)
        labels = (TURNS * classes + turns).where(labelled, -1)
        losses = [F.cross_entropy(x, labels, ignore_index=-1, reduction="sum") for x in logits]
        return sum(losses) / labelled.sum().clamp(min=1)

    def divergence(self, logits, targets):
        # The targets are constants to the operator.
        return sum(
            kl_distillation_loss(x, y, temperature=self.temperature)
            for x, y in zip(logits, targets, strict=True)
        )

    def logits(self, network, side: int, boxes, turns: int) -> list[torch.Tensor]:
        """Joint logits of every box from each level of a network: (R, 4 (K + 1)) float32."""
        heads = self.teacher_heads if side else self.student_heads
        pooled = self.pool(network, side, boxes, turns)
        if side:
            pooled = [x.detach() for x in pooled]
        return [head(x).float() for head, x in zip(heads, pooled, strict=True)]

    def pool(self, network, side: int, boxes, turns: int) -> list[torch.Tensor]:
        """Every box from each level of a network (side 0 student, 1 teacher): (R, C, P, P) float32.

        Args:
            boxes: (R_n, 4) in the upright images.
        """
        features, pixels = network.features, network.images.tensor
        if turns:
            features = network.run_backbone(turn_images(pixels, turns))
            boxes = [turn_boxes(b, turns, tuple(pixels.shape[-2:])) for b in boxes]
        names = [pair[side] for pair in self.levels]
        return [
            multilevel_roi_align(
                [features[name]],
                boxes,
                strides=[network.strides[name]],
                output_size=self.resolution,
                sampling_ratio=SAMPLING_RATIO,
            ).float()
            for name in names
        ]


def auxiliary_head(channels: int, labels: int) -> nn.Sequential:
    """Logits (R, labels) of pooled regions (R, channels, P, P); two convolutions, without batches.

    The paper copies the later stages of the network into each head; a level of an FPN has none.
    """
    layers = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels)]
        layers += [nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, labels)]
    return nn.Sequential(*layers)
