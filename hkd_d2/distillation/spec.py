"""The shapes of a detector that terms are built from, and the checks of a pair."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator


@dataclass
class DenseSpec:
    """The dense head of a detector: the anchors of its logits.

    Attributes:
        head: RPN | RetinaNet | FCOS.
        strides: pixels a cell of each level, finest first.
        cell_anchors: (A, 4) XYXY of each level, about a cell's reference point; on
            the CPU.
        offset: that point's distance from the cell's corner, in cells.
        transform: Detectron2's box parametrisation, with ``get_deltas`` and ``apply_deltas``.
        tower_channels: of a one-stage head, channels that go into its towers
            and come out of each of their convolutions; None for heads without known towers.
    """

    head: str
    strides: list[int]
    cell_anchors: list[torch.Tensor]
    offset: float
    transform: object
    tower_channels: list[int] | None = None

    @classmethod
    def of(
        cls,
        head: str,
        anchor_generator: Any,
        transform: object,
        tower_channels: list[int] | None = None,
    ) -> "DenseSpec | None":
        """Read a built head; None for anchors of another kind than Detectron2's default."""
        if type(anchor_generator) is not DefaultAnchorGenerator:
            return None
        return cls(
            head=head,
            strides=[int(s) for s in anchor_generator.strides],
            cell_anchors=[a.detach().cpu() for a in anchor_generator.cell_anchors],
            offset=anchor_generator.offset,
            transform=transform,
            tower_channels=tower_channels,
        )


@dataclass
class DetectorSpec:
    """The shapes of a detector that terms build themselves from.

    Attributes:
        levels: channels and stride of each feature level.
        roi_levels: the levels that boxes are pooled from, finest first: those of the
            box pooler, or of a one-stage detector those of its head.
        pooler_resolution: P of the (R, C, P, P) pooled features.
        hidden_channels: D of the (R, D) hidden box features.
        num_classes: classes without background.
        class_agnostic_deltas: deltas are (R, 4) instead of (R, 4 K).
        delta_weights: Detectron2's ``Box2BoxTransform`` weights of the box branch,
            or of a one-stage head.
        dense: the RPN or the one-stage head.
        one_stage: there is no box branch; the two entries that may be None are.
    """

    levels: dict[str, ShapeSpec]
    roi_levels: list[str]
    pooler_resolution: int | None
    hidden_channels: int | None
    num_classes: int
    class_agnostic_deltas: bool
    delta_weights: tuple[float, ...]
    dense: DenseSpec | None = None
    one_stage: bool = False

    def level_at(self, stride: int) -> str | None:
        """Name of the level with ``stride`` pixels a cell, None where there is none."""
        return next((name for name, spec in self.levels.items() if spec.stride == stride), None)


def matched_levels(
    key: str, levels: list[str], student: DetectorSpec, teacher: DetectorSpec
) -> list[tuple[str, str]]:
    """Pair each student level with the teacher's level of the same stride.

    Args:
        key: config key of ``levels``, for the sentence.

    Raises:
        ValueError: no level given, a level that the student lacks, or a stride that the teacher
            lacks.
    """
    if not levels:
        raise ValueError(f"{key} is empty; name at least one level of the student.")
    pairs = []
    for name in levels:
        if name not in student.levels:
            raise ValueError(
                f"{key} names '{name}', which the student's backbone does not give; "
                f"choose from {', '.join(student.levels)}."
            )
        stride = student.levels[name].stride
        match = teacher.level_at(stride)
        if match is None:
            have = ", ".join(f"{n} ({s.stride})" for n, s in teacher.levels.items())
            raise ValueError(
                f"The student's level '{name}' has stride {stride}, which no level of the teacher "
                f"has ({have}); remove it from {key}."
            )
        pairs.append((name, match))
    return pairs


def check_same_anchors(name: str, student: DenseSpec | None, teacher: DenseSpec | None) -> None:
    """Check that the dense heads of both networks have the same anchors in the same order.

    Args:
        name: of the term, for the sentence.

    Raises:
        ValueError: heads of different kinds, or other levels or anchors.
    """
    if student is None or teacher is None:
        raise ValueError(
            f"The term '{name}' needs MODEL.ANCHOR_GENERATOR.NAME DefaultAnchorGenerator in both "
            f"networks; drop '{name}' from HKD.TERMS."
        )
    if student.head != teacher.head:
        raise ValueError(
            f"The term '{name}' compares dense heads of one kind, and the student has one of "
            f"{student.head}, the teacher one of {teacher.head}; take a teacher like the student "
            f"or drop '{name}' from HKD.TERMS."
        )
    ours, theirs = (
        [(s, d.offset, len(a)) for s, a in zip(d.strides, d.cell_anchors, strict=True)]
        for d in (student, teacher)
    )
    same = ours == theirs and all(
        torch.allclose(a, b, atol=1e-3)
        for a, b in zip(student.cell_anchors, teacher.cell_anchors, strict=True)
    )
    if not same:
        raise ValueError(
            f"The term '{name}' compares both networks anchor by anchor, and the student's anchors "
            f"(strides {student.strides}) are not the teacher's ({teacher.strides}); make "
            "MODEL.ANCHOR_GENERATOR and the head's IN_FEATURES alike or drop "
            f"'{name}' from HKD.TERMS."
        )


def class_columns(
    name: str, class_map: list[int], student: DetectorSpec, teacher: DetectorSpec
) -> list[int]:
    """The teacher's class of each class of the student.

    Args:
        name: of the term, for the sentence.
        class_map: ``HKD.TEACHER.CLASS_MAP``, [] for the same list.

    Raises:
        ValueError: class lists of different length without a map, or a map of the wrong length or
            out of range.
    """
    if not class_map:
        if student.num_classes != teacher.num_classes:
            raise ValueError(
                f"The student has {student.num_classes} classes and the teacher "
                f"{teacher.num_classes}, so their logits cannot be compared; set "
                "HKD.TEACHER.CLASS_MAP to the teacher's class index of each student class, or "
                f"drop '{name}' from HKD.TERMS."
            )
        class_map = list(range(student.num_classes))
    if len(class_map) != student.num_classes:
        raise ValueError(
            f"HKD.TEACHER.CLASS_MAP has {len(class_map)} entries for {student.num_classes} student "
            "classes; give one teacher class for each."
        )
    if not all(0 <= c < teacher.num_classes for c in class_map):
        raise ValueError(
            f"HKD.TEACHER.CLASS_MAP is {class_map}, but the teacher has classes 0 to "
            f"{teacher.num_classes - 1}."
        )
    return list(class_map)
