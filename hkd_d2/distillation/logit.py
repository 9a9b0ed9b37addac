"""Logit distillation: hidden box features, class logits and box deltas on the same boxes."""

import torch
import torch.nn.functional as F

from hkd_d2.distillation.adapters import make_adapter
from hkd_d2.distillation.term import (
    DENSE,
    FEATURES,
    HIDDEN,
    POOLED,
    PREDICTIONS,
    TERM_REGISTRY,
    DetectorSpec,
    Term,
    check_same_anchors,
    class_columns,
)
from hkd_d2.ops import bounded_regression_loss, kl_distillation_loss

PARTS = ("hidden", "predictions", "kl", "deltas", "bounded")
DENSE_PARTS = PARTS[2:]


@TERM_REGISTRY.register()
class Logit(Term):
    """Outputs of the box or the dense head, the third hierarchy of HKD (arXiv 1909.09325).

    ``PARTS`` are added up, each with its entry of ``PART_WEIGHTS``. R is the number of sampled
    boxes of the batch.

    - ``hidden``: mean over R x D of the squared difference of the hidden box features, through a
      linear adapter where the widths differ. The authors' released code names this tap.
    - ``predictions``: half the mean squared difference of the class logits plus half that of the
      deltas (the reading of a third-party implementation, there with sums instead of means).
    - ``kl``: T^2 KL(teacher || student) of the softmax at temperature T, mean over R.
    - ``deltas``: smooth L1 (beta 1) between the deltas of foreground boxes, summed over the four,
      divided by R as Detectron2 divides its box loss (ours).
    - ``bounded``: Chen et al., NIPS 2017: the student's squared error against the ground-truth
      deltas where it exceeds the teacher's minus the margin, divided by R.

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

    def __init__(self, cfg, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.LOGIT
        unknown = [p for p in node.PARTS if p not in PARTS]
        if unknown or not node.PARTS:
            raise ValueError(f"HKD.LOGIT.PARTS is {node.PARTS}; choose from {', '.join(PARTS)}.")
        if len(set(node.PARTS)) < len(node.PARTS):
            raise ValueError(f"HKD.LOGIT.PARTS is {node.PARTS}; name each part once.")
        weights = node.PART_WEIGHTS or [1.0] * len(node.PARTS)
        if len(weights) != len(node.PARTS):
            raise ValueError(
                f"HKD.LOGIT.PART_WEIGHTS has {len(weights)} entries for {len(node.PARTS)} parts; "
                "give one a part or []."
            )
        if node.TEMPERATURE <= 0:
            raise ValueError(f"HKD.LOGIT.TEMPERATURE is {node.TEMPERATURE}; give a number above 0.")
        self.parts = dict(zip(node.PARTS, weights, strict=True))
        self.temperature = node.TEMPERATURE
        self.margin = node.BOUND_MARGIN
        self.adapter = None
        self.dense = student.one_stage
        if student.one_stage != teacher.one_stage:
            raise ValueError(
                "The term 'logit' compares two box heads or two dense heads, and one of the two "
                "networks is one-stage; drop 'logit' from HKD.TERMS."
            )
        if self.dense:
            self.pair_dense_heads(cfg, student, teacher)
        else:
            self.pair_box_heads(cfg, student, teacher)

    def pair_dense_heads(self, cfg, student, teacher):
        refused = [p for p in self.parts if p not in DENSE_PARTS]
        if refused:
            raise ValueError(
                f"HKD.LOGIT.PARTS names {', '.join(refused)}, which a one-stage detector does not "
                f"have; choose from {', '.join(DENSE_PARTS)}."
            )
        check_same_anchors("logit", student.dense, teacher.dense)
        self.needs = frozenset({FEATURES, DENSE})
        self.class_columns = class_columns("logit", cfg.HKD.TEACHER.CLASS_MAP, student, teacher)
        self.num_classes = student.num_classes
        self.transform = student.dense.transform
        self.set_delta_scale(student, teacher)

    def pair_box_heads(self, cfg, student, teacher):
        if "hidden" in self.parts:
            self.adapter = make_adapter(
                student.hidden_channels, teacher.hidden_channels, "auto", "HKD.LOGIT"
            )
        needs = {FEATURES, POOLED, HIDDEN}
        if self.parts.keys() - {"hidden"}:
            needs.add(PREDICTIONS)
            self.class_columns, self.delta_columns = teacher_columns(
                cfg.HKD.TEACHER.CLASS_MAP, student, teacher
            )
            self.num_classes = student.num_classes
            self.agnostic = student.class_agnostic_deltas
            self.student_delta_weights = student.delta_weights
            self.set_delta_scale(student, teacher)
        self.needs = frozenset(needs)

    def set_delta_scale(self, student, teacher):
        self.register_buffer(
            "delta_scale",
            torch.tensor(student.delta_weights) / torch.tensor(teacher.delta_weights),
            persistent=False,
        )

    def forward(self, student, teacher, targets):
        if self.dense:
            return self.dense_parts(student.dense, teacher.dense)
        s, t = student.regions, teacher.regions
        if len(s.hidden) == 0:
            return self.zero(s.hidden)
        total = 0.0
        if "hidden" in self.parts:
            hidden = s.hidden if self.adapter is None else self.adapter(s.hidden)
            total = total + self.parts["hidden"] * F.mse_loss(hidden.float(), t.hidden.float())
        if PREDICTIONS in self.needs:
            total = total + self.prediction_parts(student.sampled, s, t)
        return total

    def dense_parts(self, s, t):
        labels = torch.stack(s.labels)
        counted = labels >= 0
        foreground = counted & (labels < self.num_classes)
        number = foreground.sum().clamp(min=1)
        total = s.logits[0].new_zeros((), dtype=torch.float32)
        if "kl" in self.parts:
            sizes = [x.shape[1] for x in s.logits]
            mean = kl_distillation_loss(
                s.logits,
                [x[..., self.class_columns] for x in t.logits],
                temperature=self.temperature,
                weights=list(counted.float().split(sizes, 1)),
                activation="sigmoid",
            )
            # The operator's mean is over the anchors that count.
            total = total + self.parts["kl"] * mean * counted.sum() / number
        if "deltas" in self.parts or "bounded" in self.parts:
            student_fg = torch.cat(s.deltas, 1)[foreground].float()
            teacher_fg = torch.cat(t.deltas, 1)[foreground].float() * self.delta_scale
            if "deltas" in self.parts:
                distance = F.smooth_l1_loss(student_fg, teacher_fg, reduction="sum")
                total = total + self.parts["deltas"] * distance / number
            if "bounded" in self.parts:
                anchors = torch.cat([a.tensor for a in s.anchors]).expand(*foreground.shape, 4)
                target = self.transform.get_deltas(
                    anchors[foreground], torch.stack(s.matched_boxes)[foreground]
                )
                bounded = bounded_regression_loss(
                    student_fg, teacher_fg, target, margin=self.margin, normalizer=number
                )
                total = total + self.parts["bounded"] * bounded
        return total

    def prediction_parts(self, sampled, s, t):
        teacher_logits = t.class_logits.float()[:, self.class_columns]
        teacher_deltas = t.deltas.float()[:, self.delta_columns]
        rows, columns = teacher_deltas.shape
        teacher_deltas = teacher_deltas.view(rows, -1, 4).mul(self.delta_scale).view(rows, columns)
        student_logits, student_deltas = s.class_logits.float(), s.deltas.float()

        total = student_logits.new_zeros(())
        if "predictions" in self.parts:
            total = total + self.parts["predictions"] * 0.5 * (
                F.mse_loss(student_logits, teacher_logits)
                + F.mse_loss(student_deltas, teacher_deltas)
            )
        if "kl" in self.parts:
            total = total + self.parts["kl"] * kl_distillation_loss(
                student_logits, teacher_logits, temperature=self.temperature
            )
        if "deltas" in self.parts or "bounded" in self.parts:
            classes = torch.cat([x.gt_classes for x in sampled])
            foreground = ((classes >= 0) & (classes < self.num_classes)).nonzero().squeeze(1)
            student_fg = self.of_class(student_deltas[foreground], classes[foreground])
            teacher_fg = self.of_class(teacher_deltas[foreground], classes[foreground])
            if "deltas" in self.parts:
                distance = F.smooth_l1_loss(student_fg, teacher_fg, reduction="sum")
                total = total + self.parts["deltas"] * distance / rows
            if "bounded" in self.parts:
                target = self.target_deltas(sampled, foreground)
                bounded = bounded_regression_loss(
                    student_fg, teacher_fg, target, margin=self.margin, normalizer=rows
                )
                total = total + self.parts["bounded"] * bounded
        return total

    def of_class(self, deltas, classes):
        """The four deltas of each row's class, (R, 4)."""
        if self.agnostic:
            return deltas
        index = torch.arange(len(deltas), device=deltas.device)
        return deltas.view(len(deltas), -1, 4)[index, classes]

    def target_deltas(self, sampled, rows):
        """Ground-truth deltas of the rows in the student's parametrisation, (len(rows), 4)."""
        from detectron2.modeling.box_regression import Box2BoxTransform

        if len(rows) == 0:
            return torch.zeros(0, 4, device=rows.device)
        proposals = torch.cat([x.proposal_boxes.tensor for x in sampled])[rows]
        # An image without ground truth has no gt_boxes field and no foreground row either.
        truth = torch.cat(
            [(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in sampled]
        )[rows]
        return Box2BoxTransform(self.student_delta_weights).get_deltas(proposals, truth)


def teacher_columns(
    class_map: list[int], student: DetectorSpec, teacher: DetectorSpec
) -> tuple[list[int], list[int]]:
    """Columns of the teacher's class logits and deltas that stand for the student's.

    Args:
        class_map (list[int]): for each student class the teacher's class, [] for the same list.

    Returns:
        list[int], list[int]: student.num_classes + 1 columns of logits (background last), and the
        columns of the deltas: 4, or 4 a class.

    Raises:
        ValueError: class lists of different length without a map, a map of the wrong length or out
            of range, or deltas that cannot be paired.
    """
    class_map = class_columns("logit", class_map, student, teacher)
    logits = [*class_map, teacher.num_classes]
    if student.class_agnostic_deltas and not teacher.class_agnostic_deltas:
        if student.num_classes > 1:
            raise ValueError(
                "The student's deltas are class-agnostic and the teacher's are not, so for several "
                "classes they cannot be paired; set the student's "
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG to False."
            )
        deltas = [4 * class_map[0] + k for k in range(4)]
    elif teacher.class_agnostic_deltas:
        deltas = list(range(4)) * (1 if student.class_agnostic_deltas else student.num_classes)
    else:
        deltas = [4 * c + k for c in class_map for k in range(4)]
    return logits, deltas
