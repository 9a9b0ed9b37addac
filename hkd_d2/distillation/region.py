"""Region distillation: RoI-aligned features of both networks on the same boxes."""

from detectron2.config import CfgNode

from hkd_d2.distillation.adapters import as_pair, make_adapter
from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.pyramid import NORMALIZATIONS, inverse_variances
from hkd_d2.distillation.spec import DetectorSpec
from hkd_d2.distillation.term import FEATURES, POOLED, PROPOSALS, TERM_REGISTRY, Term
from hkd_d2.ops import feature_imitation_loss, multilevel_roi_align, roi_distillation_loss

BOXES = ("sampled", "teacher", "gt")
DISTANCES = ("mse", "l1", "smooth_l1", "cosine")
# Factor on the mean over boxes, channels and bins.
REDUCTIONS = {"mean": 1.0, "half_mean": 0.5}


@TERM_REGISTRY.register()
class Region(Term):
    """Distance of the pooled region features, the second hierarchy of HKD (arXiv 1909.09325).

    .. math:: L = \\frac{1}{\\sigma^2} \\operatorname{mean}_{r,c,u,v}
              \\left(A(\\mathrm{RoIAlign}(F^S, b_r)) - \\mathrm{RoIAlign}(F^T, b_r)\\right)^2

    The tap (pooled features before the fully connected layers) is named in the authors' released
    code, the squared error in the paper's figure; the default weight 30 is that of a third-party
    implementation (yoshitomo-matsubara/hnd-ghnd-object-detectors, c4856c3), not confirmed as the
    paper's. Both networks pool on the same boxes in the same order: the student's sampled proposals
    (which include the ground truth), the teacher's proposals (as in Mimic, CVPR 2017), or the
    ground truth. On the sampled proposals the student's own pooled tensor is compared, which the
    step has made anyway; on other boxes :func:`hkd_d2.ops.roi_distillation_loss` pools both
    networks. ``sigma`` is 1, or with ``NORMALIZE: teacher_variance`` the standard deviation of the
    teacher's pooled features in the batch (ours). ``REDUCTION: half_mean`` halves the mean, which
    is Mimic's normaliser (ModelTC/United-Perception, 52aaeb9).

    A one-stage detector has no pooler: if either is one, both networks are pooled from the levels
    of their common strides by ``POOLER_RESOLUTION`` and ``POOLER_SAMPLING_RATIO``. A cascade pools
    for its first stage.

    Raises:
        ValueError: an option that is not on the list, poolers of different resolution, RoI levels
            of different strides, or the sampled boxes of a one-stage student, which has none.
    """

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 30.0
        # Boxes that both networks pool on: sampled (a two-stage student's sampled proposals) |
        # teacher (the teacher's proposals, or a one-stage teacher's detections) | gt (ground
        # truth).
        node.BOXES = "sampled"
        # Teacher's boxes an image, best first, where BOXES is teacher.
        node.TEACHER_TOPK = 256
        # Bins a side for a one-stage student, which has no pooler of its own.
        node.POOLER_RESOLUTION = 7
        # Samples a bin and axis wherever the term pools: not with BOXES sampled of two two-stage
        # detectors. 0: adaptive.
        node.POOLER_SAMPLING_RATIO = 0
        # Distance of two pooled features: mse | l1 | smooth_l1 | cosine.
        node.DISTANCE = "mse"
        # How the distances become one number: mean | half_mean (half of it, as Mimic has it).
        node.REDUCTION = "mean"
        # Divide the distance by a statistic of the teacher's features: none | teacher_variance.
        node.NORMALIZE = "none"
        # 1x1 adapter: auto (where channel counts differ) | always.
        node.ADAPTER = "auto"

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(cfg)
        node = cfg.HKD.REGION
        check_options(node)
        self.boxes, self.distance = node.BOXES, node.DISTANCE
        self.normalize = node.NORMALIZE == "teacher_variance"
        self.factor = REDUCTIONS[node.REDUCTION]
        check_boxes(self.boxes, student)
        both_pool = not (student.one_stage or teacher.one_stage)
        if both_pool:
            check_same_poolers(student, teacher)
        self.strides = common_strides(student, teacher)
        self.student_levels, self.teacher_levels = (
            [n for n in spec.roi_levels if spec.levels[n].stride in self.strides]
            for spec in (student, teacher)
        )
        self.topk = node.TEACHER_TOPK
        self.resolution = student.pooler_resolution or node.POOLER_RESOLUTION
        self.sampling_ratio = node.POOLER_SAMPLING_RATIO
        self.compares_pooled = self.boxes == "sampled" and both_pool
        self.needs = frozenset({FEATURES})
        if self.compares_pooled:
            self.needs |= {POOLED}
        elif self.boxes == "teacher":
            self.needs |= {PROPOSALS}
        self.adapter = make_adapter(
            student.levels[self.student_levels[0]].channels,
            teacher.levels[self.teacher_levels[0]].channels,
            node.ADAPTER,
            "HKD.REGION.ADAPTER",
        )

    def forward(self, student, teacher, targets):
        return self.factor * self.mean_distance(student, teacher, targets)

    def mean_distance(self, student, teacher, targets):
        """Mean distance over boxes, channels and bins; 0 boxes give 0."""
        if self.compares_pooled:
            return self.pooled_distance(student.regions.pooled, teacher.regions.pooled)
        if self.boxes == "sampled":
            boxes = [p.proposal_boxes.tensor for p in student.sampled]
        elif self.boxes == "teacher":
            boxes = [p.proposal_boxes.tensor[: self.topk] for p in teacher.proposals]
        else:
            boxes = targets.boxes
        if not any(len(b) for b in boxes):
            return self.zero(student.features[self.student_levels[0]])
        student_maps = [student.features[n] for n in self.student_levels]
        teacher_maps = [teacher.features[n] for n in self.teacher_levels]
        if self.normalize:
            # The variance is that of the pooled features, so here they have to exist.
            sides = [
                multilevel_roi_align(
                    maps,
                    boxes,
                    strides=self.strides,
                    output_size=self.resolution,
                    sampling_ratio=self.sampling_ratio,
                )
                for maps in (student_maps, teacher_maps)
            ]
            return self.pooled_distance(*sides)
        return roi_distillation_loss(
            student_maps,
            teacher_maps,
            boxes,
            strides=self.strides,
            output_size=self.resolution,
            sampling_ratio=self.sampling_ratio,
            distance=self.distance,
            adapter=as_pair(self.adapter),
        )

    def pooled_distance(self, student_pooled, teacher_pooled):
        """Mean distance of two (R, C, P, P) tensors; 0 boxes give 0."""
        if len(student_pooled) == 0:
            return self.zero(student_pooled)
        # A stack of R regions is one "level" of R images without mask: the same mean.
        adapter = as_pair(self.adapter)
        return feature_imitation_loss(
            [student_pooled],
            [teacher_pooled],
            distance=self.distance,
            adapter=None if adapter is None else [adapter],
            level_weights=inverse_variances([teacher_pooled]) if self.normalize else None,
        )


def check_options(node: CfgNode) -> None:
    """Raise ValueError for a value under ``HKD.REGION`` that is out of its range."""
    one_of("HKD.REGION.BOXES", node.BOXES, BOXES)
    one_of("HKD.REGION.DISTANCE", node.DISTANCE, DISTANCES)
    one_of("HKD.REGION.NORMALIZE", node.NORMALIZE, NORMALIZATIONS)
    one_of("HKD.REGION.REDUCTION", node.REDUCTION, tuple(REDUCTIONS))
    if node.TEACHER_TOPK <= 0:
        raise ValueError(
            f"HKD.REGION.TEACHER_TOPK is {node.TEACHER_TOPK}; give a number of boxes above 0."
        )
    if node.POOLER_RESOLUTION <= 0 or node.POOLER_SAMPLING_RATIO < 0:
        raise ValueError(
            f"HKD.REGION.POOLER_RESOLUTION is {node.POOLER_RESOLUTION} and "
            f"POOLER_SAMPLING_RATIO {node.POOLER_SAMPLING_RATIO}; give at least 1 and 0."
        )


def check_boxes(boxes: str, student: DetectorSpec) -> None:
    """Raise ValueError for sampled boxes of a one-stage student, which has none."""
    if student.one_stage and boxes == "sampled":
        raise ValueError(
            "HKD.REGION.BOXES is 'sampled', and a one-stage student samples no boxes; choose "
            "teacher or gt."
        )


def check_same_poolers(student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Raise ValueError unless two box poolers have the same resolution and strides."""
    ours, theirs = student.pooler_resolution, teacher.pooler_resolution
    if ours != theirs:
        raise ValueError(
            f"The student pools {ours}x{ours} bins, the teacher {theirs}x{theirs}; set the "
            "student's MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION to the teacher's or drop 'region'."
        )
    strides = roi_strides(student), roi_strides(teacher)
    if strides[0] != strides[1]:
        raise ValueError(
            f"The student pools boxes from strides {strides[0]}, the teacher from {strides[1]}; "
            "make MODEL.ROI_HEADS.IN_FEATURES alike or drop 'region'."
        )


def common_strides(student: DetectorSpec, teacher: DetectorSpec) -> list[float]:
    """Strides of the RoI levels that both networks have, finest first.

    Raises:
        ValueError: none.
    """
    ours, theirs = roi_strides(student), roi_strides(teacher)
    common = [stride for stride in ours if stride in theirs]
    if not common:
        raise ValueError(
            f"The student's levels have strides {ours} and the teacher's {theirs}, none in common; "
            "drop 'region'."
        )
    return common


def roi_strides(spec: DetectorSpec) -> list[float]:
    """Strides of a detector's RoI levels, pixels a cell, finest first."""
    return [float(spec.levels[name].stride) for name in spec.roi_levels]
