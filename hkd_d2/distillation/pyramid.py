"""Pyramid distillation: the student's FPN maps imitate the teacher's."""

import torch
from torch import nn

from hkd_d2.distillation.adapters import as_pair, make_adapter
from hkd_d2.distillation.term import FEATURES, TERM_REGISTRY, DetectorSpec, Term, one_of
from hkd_d2.ops import feature_imitation_loss

MASKS = ("none", "boxes", "split")
NORMALIZATIONS = ("none", "teacher_variance")
DISTANCES = ("mse", "l1", "smooth_l1", "cosine", "pkd")


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

    Raises:
        ValueError: a level that a network lacks, or an option that is not on the list.
    """

    needs = frozenset({FEATURES})

    def __init__(self, cfg, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.PYRAMID
        self.mask = one_of("HKD.PYRAMID.MASK", node.MASK, MASKS)
        self.distance = one_of("HKD.PYRAMID.DISTANCE", node.DISTANCE, DISTANCES)
        normalize = one_of("HKD.PYRAMID.NORMALIZE", node.NORMALIZE, NORMALIZATIONS)
        self.normalize = normalize == "teacher_variance"
        if node.DISTANCE == "pkd" and node.MASK != "none":
            raise ValueError(
                "HKD.PYRAMID.DISTANCE pkd standardises whole maps; set HKD.PYRAMID.MASK to none."
            )
        self.background_weight = node.BACKGROUND_WEIGHT
        self.levels = matched_levels(node.LEVELS, student, teacher)
        self.strides = [float(student.levels[s].stride) for s, _ in self.levels]
        adapters = {
            s: make_adapter(
                student.levels[s].channels,
                teacher.levels[t].channels,
                node.ADAPTER,
                "HKD.PYRAMID.ADAPTER",
            )
            for s, t in self.levels
        }
        self.adapters = nn.ModuleDict({k: v for k, v in adapters.items() if v is not None})

    def forward(self, student, teacher, targets):
        student_maps = [student.features[s] for s, _ in self.levels]
        teacher_maps = [teacher.features[t] for _, t in self.levels]
        adapter = None
        if self.adapters:
            adapter = [
                as_pair(self.adapters[s]) if s in self.adapters else None for s, _ in self.levels
            ]
        masked = self.mask != "none"
        return feature_imitation_loss(
            student_maps,
            teacher_maps,
            boxes=targets.boxes if masked else None,
            ignore_boxes=targets.ignore_boxes if masked else None,
            strides=self.strides,
            assign_ignore="all",  # nobody knows what is in there, at any scale
            distance=self.distance,
            background_weight=self.background_weight if self.mask == "split" else None,
            level_weights=inverse_variances(teacher_maps) if self.normalize else None,
            adapter=adapter,
        )


def inverse_variances(maps: list[torch.Tensor], eps: float = 1e-6) -> torch.Tensor:
    """1 / (variance + eps) of each tensor over all its elements, (len(maps),) float32."""
    return torch.stack([1 / (m.detach().float().var(correction=0) + eps) for m in maps])


def matched_levels(
    levels: list[str], student: DetectorSpec, teacher: DetectorSpec
) -> list[tuple[str, str]]:
    """Pair each student level with the teacher's level of the same stride.

    Raises:
        ValueError: no level given, a level that the student lacks, or a stride that the teacher
            lacks.
    """
    if not levels:
        raise ValueError("HKD.PYRAMID.LEVELS is empty; name at least one level of the student.")
    pairs = []
    for name in levels:
        if name not in student.levels:
            raise ValueError(
                f"HKD.PYRAMID.LEVELS names '{name}', which the student's backbone does not give; "
                f"choose from {', '.join(student.levels)}."
            )
        stride = student.levels[name].stride
        match = teacher.level_at(stride)
        if match is None:
            have = ", ".join(f"{n} ({s.stride})" for n, s in teacher.levels.items())
            raise ValueError(
                f"The student's level '{name}' has stride {stride}, which no level of the teacher "
                f"has ({have}); remove it from HKD.PYRAMID.LEVELS."
            )
        pairs.append((name, match))
    return pairs
