"""Logit distillation: outputs of both networks' heads on the same boxes or anchors."""

from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.logit_box_head import BoxHeadParts
from hkd_d2.distillation.logit_dense_head import OneStageParts, RPNParts
from hkd_d2.distillation.spec import DetectorSpec
from hkd_d2.distillation.term import TERM_REGISTRY, Term


@TERM_REGISTRY.register()
class Logit(Term):
    """Outputs of the box or the dense head, the third hierarchy of HKD (arXiv 1909.09325).

    ``PARTS`` are added up, each with its entry of ``PART_WEIGHTS``. R is the number of sampled
    boxes of the batch, T the temperature.

    - ``hidden``: mean over R x D of the squared difference of the hidden box features, through a
      linear adapter where the widths differ. The authors' released code names this tap.
    - ``predictions``: half the mean squared difference of the class logits plus half that of the
      deltas (the reading of a third-party implementation, there with sums instead of means).
    - ``kl``: T^2 KL(teacher || student) of the softmax at temperature T, mean over R.
    - ``kl_foreground``, ``kl_background``: the same over the boxes of objects and over those of the
      background alone, each a mean over its own number (DeFeat, CVPR 2021, the head's part;
      ggjy/DeFeat.pytorch, c46a793).
    - ``tckd``, ``nckd``: the same divergence in two (DKD, arXiv 2203.08679): of "the box's class or
      another", and among the other classes; means over R, as megvii-research/mdistiller (a08d46f)
      has them for detectors. A detector of one class has one other class, so there ``nckd`` is 0
      and ``tckd`` is ``kl``.
    - ``cross_entropy``: - sum_c w_c q_c ln p_c of the same softmax, w ``BACKGROUND_WEIGHT`` for the
      background and 1 else, mean over R (Chen et al., NIPS 2017).
    - ``deltas``: smooth L1 (beta 1) between the deltas of foreground boxes, summed over the four,
      divided by R as Detectron2 divides its box loss (ours).
    - ``bounded``: Chen et al., NIPS 2017: the student's squared error against the ground-truth
      deltas where it exceeds the teacher's minus the margin, divided by R.
    - ``rpn_cross_entropy``, ``rpn_bounded``: Chen's two on the RPN's objectness and deltas, over
      the anchors of the student's minibatch.

    The default weight 30 of ``hidden + predictions`` is the third-party number
    (yoshitomo-matsubara/hnd-ghnd-object-detectors, c4856c3) with means instead of sums; it is not
    confirmed as the paper's. The deltas of the teacher are brought to the student's
    ``BBOX_REG_WEIGHTS``; with another class list the teacher's columns are picked by
    ``HKD.TEACHER.CLASS_MAP``, the background staying last, and the softmax is taken over these.

    A cascade is compared as one box branch: its class logits are the logarithm of the class
    probabilities averaged over its stages, as at inference, hidden features and deltas those of its
    first stage, which alone looks at the sampled boxes. Two one-stage detectors are compared anchor
    by anchor (ours), with the parts

    - ``kl``: T^2 KL(teacher || student) of each class's sigmoid at temperature T, summed over the
      anchors labelled object or background,
    - ``deltas`` and ``bounded``, as above, on the anchors of objects,

    each divided by the number of anchors of objects, as Detectron2 divides the losses there. The
    centerness of FCOS is not compared.

    Raises:
        ValueError: unknown parts, weights of another number, class lists, heads or anchors that do
            not fit.
    """

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 30.0
        # Parts that are added up. On the sampled boxes: hidden (MSE of the last hidden box
        # features), predictions (half the MSE of class logits plus that of deltas), kl (temperature
        # KL of the class logits), kl_foreground and kl_background (DeFeat), tckd and nckd (DKD),
        # cross_entropy (Chen 2017, of soft classes), deltas (smooth L1 of the deltas of foreground
        # boxes), bounded (Chen 2017 regression, upper-bounded by the teacher). On the RPN's sampled
        # anchors: rpn_cross_entropy, rpn_bounded. One-stage detectors have kl, deltas and bounded.
        node.PARTS = ["hidden", "predictions"]
        # Weight of each part, in the order of PARTS; [] for 1 each.
        node.PART_WEIGHTS = []
        # Temperature of the softmax or sigmoid of every part with class logits but predictions.
        node.TEMPERATURE = 1.0
        # Weight of the background's class in cross_entropy and rpn_cross_entropy (Chen 2017).
        node.BACKGROUND_WEIGHT = 1.5
        # Margin m of bounded and rpn_bounded: they act while the student's squared error plus m
        # exceeds the teacher's.
        node.BOUND_MARGIN = 0.01

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.LOGIT
        check_options(node)
        heads = comparable_heads(node.PARTS, student, teacher)
        self.weights = part_weights(node)
        self.heads = nn.ModuleDict()
        for head in heads:
            parts = [p for p in node.PARTS if p in head.PARTS]
            if parts:
                self.heads[head.__name__] = head(cfg, parts, student, teacher)
        self.needs = frozenset().union(*(head.needs for head in self.heads.values()))

    def forward(self, student, teacher, targets):
        losses = {}
        for head in self.heads.values():
            if isinstance(head, BoxHeadParts) and len(student.regions.hidden) == 0:
                losses["no boxes"] = self.zero(student.regions.hidden)
            else:
                losses |= head(student, teacher)
        return sum(self.weights.get(part, 1.0) * loss for part, loss in losses.items())


def check_options(node: CfgNode) -> None:
    """Raise ValueError for a value under ``HKD.LOGIT`` that is out of its range."""
    known = (*BoxHeadParts.PARTS, *RPNParts.PARTS)
    if not node.PARTS or not set(node.PARTS) <= {*known}:
        raise ValueError(f"HKD.LOGIT.PARTS is {node.PARTS}; choose from {', '.join(known)}.")
    if len(set(node.PARTS)) < len(node.PARTS):
        raise ValueError(f"HKD.LOGIT.PARTS is {node.PARTS}; name each part once.")
    if node.TEMPERATURE <= 0:
        raise ValueError(f"HKD.LOGIT.TEMPERATURE is {node.TEMPERATURE}; give a number above 0.")
    if node.BACKGROUND_WEIGHT < 0:
        raise ValueError(
            f"HKD.LOGIT.BACKGROUND_WEIGHT is {node.BACKGROUND_WEIGHT}; give at least 0."
        )


def part_weights(node: CfgNode) -> dict[str, float]:
    """The weight of each of ``PARTS``.

    Raises:
        ValueError: another number of weights than of parts.
    """
    weights = node.PART_WEIGHTS or [1.0] * len(node.PARTS)
    if len(weights) != len(node.PARTS):
        raise ValueError(
            f"HKD.LOGIT.PART_WEIGHTS has {len(weights)} entries for {len(node.PARTS)} parts; "
            "give one a part or []."
        )
    return dict(zip(node.PARTS, weights, strict=True))


def comparable_heads(
    parts: list[str], student: DetectorSpec, teacher: DetectorSpec
) -> tuple[type[nn.Module], ...]:
    """The classes that compare the heads of these two detectors.

    Raises:
        ValueError: one detector is one-stage and the other is not, or ``parts`` names what
            one-stage detectors lack.
    """
    if student.one_stage != teacher.one_stage:
        raise ValueError(
            "The term 'logit' compares two box heads or two dense heads, and one of the two "
            "networks is one-stage; drop 'logit' from HKD.TERMS."
        )
    if not student.one_stage:
        return BoxHeadParts, RPNParts
    refused = [part for part in parts if part not in OneStageParts.PARTS]
    if refused:
        raise ValueError(
            f"HKD.LOGIT.PARTS names {', '.join(refused)}, which a one-stage detector does not "
            f"have; choose from {', '.join(OneStageParts.PARTS)}."
        )
    return (OneStageParts,)
