"""CrossKD: the student's head features finish their way through the teacher's head."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.adapters import make_adapter
from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.spec import DetectorSpec, check_same_anchors, class_columns
from hkd_d2.distillation.term import DENSE, FEATURES, TERM_REGISTRY, Term, tower_tap

BOX_LOSSES = ("giou", "iou")


@TERM_REGISTRY.register()
class CrossKD(Term):
    """Cross-head distillation of one-stage detectors (CrossKD, arXiv 2306.11369).

    The features in the student's two towers, before the last ``REUSED_CONVS`` convolutions, take
    the teacher's place in the teacher's frozen head, and what comes out, the cross-head
    predictions, is compared with the teacher's. So the student's own last layers learn from the
    ground truth alone. On the way every channel gets the teacher's mean and standard deviation,
    over the batch and the map, before the activation; 1x1 adapters come before that where the
    widths differ (ours; the released code has none).

    With x the cross-head class logits, p = sigmoid(x), q the teacher's probabilities, and b, b' the
    boxes of both decoded:

    .. math:: L = \\frac{1}{Z} \\sum_r \\left( w_c \\sum_k |p_{rk} - q_{rk}|^\\beta\\,
              \\mathrm{BCE}(q_{rk}, p_{rk}) + w_b \\max_k q_{rk}\\, \\ell(b_r, b'_r) \\right)

    over the anchors r that are labelled object or background. ``BOX_LOSS: giou`` is 1 - GIoU,
    ``iou`` is - ln IoU. Z is the number of anchors of objects, for FCOS the sum of their centerness
    targets; at least 1. So the released code has it (jbwang1997/CrossKD, b0c5a76 for RetinaNet,
    ae7fba9 for FCOS), but for the bound of 1 for FCOS and for points in ignore regions, which it
    does not know. The centerness is not compared.

    Raises:
        ValueError: an option out of range, detectors that are not one-stage, or heads of different
            anchors or classes, or with towers of too few convolutions.
    """

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 1.0
        # Last convolutions of the teacher's towers that the student's features pass through.
        node.REUSED_CONVS = 1
        # Weight of the class logits.
        node.CLASS_WEIGHT = 1.0
        # Exponent of the distance in probability that weighs an anchor's cross-entropy.
        node.BETA = 1.0
        # Weight of the boxes.
        node.BOX_WEIGHT = 1.0
        # Distance of two boxes: giou (1 - GIoU) | iou (- ln IoU).
        node.BOX_LOSS = "giou"
        # 1x1 adapters, one a tower: auto (where the towers' widths differ) | always.
        node.ADAPTER = "auto"

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.CROSSKD
        self.box_loss = one_of("HKD.CROSSKD.BOX_LOSS", node.BOX_LOSS, BOX_LOSSES)
        # A power below 1 has an infinite slope where student and teacher agree.
        least = {"BETA": 1, "CLASS_WEIGHT": 0, "BOX_WEIGHT": 0, "REUSED_CONVS": 0}
        for name, bound in least.items():
            if not node[name] >= bound:
                raise ValueError(f"HKD.CROSSKD.{name} is {node[name]}; give at least {bound}.")
        if not (student.one_stage and teacher.one_stage):
            raise ValueError(
                "The term 'crosskd' needs the towers of a RetinaNet or an FCOS in both networks; "
                "drop 'crosskd' from HKD.TERMS."
            )
        check_same_anchors("crosskd", student.dense, teacher.dense)
        towers = [spec.dense.tower_channels for spec in (student, teacher)]
        if None in towers:
            raise ValueError(
                "The term 'crosskd' knows Detectron2's RetinaNetHead and FCOSHead, and one of the "
                "networks has another head; drop 'crosskd' from HKD.TERMS."
            )
        self.reused = node.REUSED_CONVS
        shortest = min(len(t) for t in towers) - 1
        if self.reused > shortest:
            raise ValueError(
                f"HKD.CROSSKD.REUSED_CONVS is {self.reused}, and the shorter tower has {shortest} "
                "convolutions (MODEL.RETINANET.NUM_CONVS); give at most that."
            )
        self.needs = frozenset({FEATURES, DENSE, tower_tap(self.reused)})
        self.columns = class_columns("crosskd", cfg.HKD.TEACHER.CLASS_MAP, student, teacher)
        self.num_classes = student.num_classes
        self.beta = node.BETA
        self.class_weight, self.box_weight = node.CLASS_WEIGHT, node.BOX_WEIGHT
        # Both boxes are the teacher's head's, so its parametrisation decodes them.
        self.transform = teacher.dense.transform
        self.has_centerness = teacher.dense.head == "FCOS"
        widths = [t[-1 - self.reused] for t in towers]
        adapters = [make_adapter(*widths, node.ADAPTER, "HKD.CROSSKD.ADAPTER") for _ in range(2)]
        self.adapters = None if adapters[0] is None else nn.ModuleList(adapters)

    def forward(self, student, teacher, targets):
        taps = [
            tuple(self.in_teachers_place(i, s[i], t[i]) for i in range(2))
            for s, t in zip(student.dense.taps, teacher.dense.taps, strict=True)
        ]
        cross = teacher.dense.resume(taps)
        labels = torch.stack(student.dense.labels)
        labelled = labels >= 0
        normalizer = self.normalizer(student.dense, labelled & (labels < self.num_classes))

        x, z = (torch.cat(y.logits, 1).float()[..., self.columns] for y in (cross, teacher.dense))
        q = z.sigmoid()
        losses = quality_focal_loss(x[labelled], q[labelled], self.beta)
        anchors = torch.cat([a.tensor for a in teacher.dense.anchors]).expand(*labels.shape, 4)
        ours, theirs = (
            self.transform.apply_deltas(torch.cat(y.deltas, 1)[labelled].float(), anchors[labelled])
            for y in (cross, teacher.dense)
        )
        boxes = q[labelled].amax(-1) * box_losses(ours, theirs, self.box_loss)
        total = self.class_weight * losses.sum() + self.box_weight * boxes.sum()
        return total / normalizer

    def in_teachers_place(self, tower, student, teacher):
        """A student's map with the teacher's width, mean and deviation of each channel."""
        if self.adapters is not None:
            adapter = self.adapters[tower]
            weight = adapter.weight[:, :, None, None].to(student.dtype)
            student = F.conv2d(student, weight, adapter.bias.to(student.dtype))
        return align_statistics(student.float(), teacher.float())

    def normalizer(self, dense, objects):
        if not self.has_centerness:
            return objects.sum().clamp(min=1)
        anchors = torch.cat([a.tensor for a in dense.anchors]).expand(*objects.shape, 4)
        truth = torch.stack(dense.matched_boxes)[objects]
        sides = self.transform.get_deltas(anchors[objects], truth).unflatten(1, (2, 2))
        # Nearest over farthest side, left and right, top and bottom.
        nearest, farthest = sides.amin(1), sides.amax(1)
        return (nearest / farthest).prod(1).sqrt().sum().clamp(min=1)


def align_statistics(values: torch.Tensor, model: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Give each channel of ``values`` the mean and standard deviation that it has in ``model``.

    Args:
        values, model: (N, C, H, W); the deviation is over N, H and W, unbiased.
    """
    dims = (0, 2, 3)
    # One value has no unbiased deviation.
    correction = 1 if values[:, 0].numel() > 1 else 0
    deviation, mean = torch.std_mean(values, dims, correction=correction, keepdim=True)
    model_deviation, model_mean = torch.std_mean(model, dims, correction=correction, keepdim=True)
    return (values - mean) / (deviation + eps) * model_deviation + model_mean


def quality_focal_loss(logits: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """``|sigmoid(x) - q|^beta BCE(q, sigmoid(x))``, element by element."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (logits.sigmoid() - target).abs().pow(beta) * loss


def box_losses(boxes: torch.Tensor, targets: torch.Tensor, kind: str) -> torch.Tensor:
    """1 - GIoU (``giou``) or - ln IoU (``iou``) of the boxes of each row, (R,).

    Args:
        boxes, targets: (R, 4) XYXY.
    """
    eps = 1e-6  # boxes without an area, and the logarithm of none in common
    low, high = torch.maximum(boxes, targets), torch.minimum(boxes, targets)
    inner = (high[:, 2:] - low[:, :2]).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, targets)]
    union = (areas[0] + areas[1] - inner).clamp(min=eps)
    if kind == "iou":
        return -(inner / union).clamp(min=eps).log()
    hull = (low[:, 2:] - high[:, :2]).prod(1).clamp(min=eps)
    return 1 - inner / union + (hull - union) / hull
