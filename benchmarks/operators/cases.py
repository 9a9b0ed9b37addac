"""Cases of the operator benchmark: inputs of a pedestrian detector's size, and memory floors.

A case is one call of an operator at one setting. Its floor is the least memory traffic that any
implementation needs, as bytes read and written by the forward and the backward pass:

==================  ==============================  ==============================================
operator            forward                         backward
==================  ==============================  ==============================================
feature imitation   read the counted cells of both  read them again, write the dense gradient
RoI distillation    read the touched cells of both  read them again, write the dense gradient
multi-level align   read the touched cells, write   read the gradient of the pooled, write the
                    the pooled                      dense gradient
logit losses        read every input                read every input, write the gradient
==================  ==============================  ==============================================

A cell counts once, with all its channels, however many boxes share it; cells are touched where the
bilinear weights are not 0. Boxes, masks and sums weigh nothing beside them. The floor does not know
of cache lines (in NCHW a box's row seldom fills whole ones) nor of caches (maps that fit into one
are read faster than this).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.operators.measure import instruction_set
from hkd_d2.ops import assign_boxes_to_levels, rasterize_boxes, reference

# Divisor of CityPersons' 1024x2048; the smallest is for a try, its figures mean nothing.
SCALES = {"full": 1, "half": 2, "tiny": 16}
IMAGE_SIZE = (1024, 2048)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CONTIGUOUS = "contiguous"
PYRAMID_STRIDES = (4, 8, 16, 32, 64)
ROI_STRIDES = PYRAMID_STRIDES[:-1]
CHANNELS = 256
BINS = 7
NUM_ROIS = 512
COVERAGE = 0.05


@dataclass(frozen=True)
class Traffic:
    """Bytes that one pass has to move at least."""

    read: int
    write: int

    def seconds(self, bandwidth: "Traffic") -> float:
        """Time at a bandwidth given as bytes read and bytes written a second."""
        return self.read / bandwidth.read + self.write / bandwidth.write

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.write + other.write)


@dataclass(frozen=True)
class Setting:
    """Setting that a case is built for.

    Attributes:
        divisor: of 1024x2048, a value of ``SCALES``.
        layout: one of the case's.
        device: where the inputs are.
        dtype: of maps and logits.
    """

    divisor: int
    layout: str
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def images(self) -> int:
        """Pictures in a batch, each with the same boxes: one on a CPU, two on a GPU."""
        return 2 if self.device.type == "cuda" else 1

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in dtype and layout, on the device."""
        layout = LAYOUTS.get(self.layout, torch.contiguous_format)
        return tensor.to(self.device, self.dtype, memory_format=layout)


@dataclass
class Problem:
    """Inputs of one case in one layout.

    Attributes:
        leaves: tensors that get a gradient.
        call: runs an operator, given as a function of the operator's signature, on the inputs.
        forward, backward: least traffic of the two passes.
        upstream: gradient of the output, made on first use.
    """

    leaves: list[torch.Tensor]
    call: Callable[[Callable], torch.Tensor]
    forward: Traffic
    backward: Traffic
    upstream: torch.Tensor | None = None

    def run_forward(self, operator: Callable) -> torch.Tensor:
        return self.call(operator)

    def run_backward(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.upstream is None:
            # Not 1, as under a weight or a gradient scaler.
            self.upstream = 0.5 + _generate(torch.rand, output.shape, 9).to(output)
        return torch.autograd.grad(output, self.leaves, self.upstream)


@dataclass(frozen=True)
class Targets:
    """Target of a case, forward and backward together.

    Attributes:
        ratio: least ratio to the baseline, by layout.
        half_ratio: the same for half precision, any layout.
        floor: least share of the floor, in percent.
    """

    ratio: Mapping[str, float] = field(default_factory=dict)
    half_ratio: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        operator: name in ``hkd_d2.ops``.
        about: one line for ``--list``.
        build: makes the :class:`Problem` of a :class:`Setting`.
        layouts: those that ``build`` knows.
        usual: what is usually written for it, as a function of the operator's arguments, where
            that is not the reference.
        baseline: provider whose faster layout the targets divide by.
        targets: of a CPU, in float32; ``gpu_targets``: of a GPU of the H100's class.
    """

    operator: str
    about: str
    build: Callable[[Setting], Problem]
    layouts: Sequence[str] = tuple(LAYOUTS)
    usual: Callable[..., torch.Tensor] | None = None
    baseline: str = "eager"
    targets: Targets = Targets()
    gpu_targets: Targets = Targets()

    def target(self, layout: str, dtype: str, gpu: bool) -> tuple[float | None, float | None]:
        """Least ratio and least share of the floor, None where there is no target."""
        if not gpu:
            found = self.targets if dtype == "float32" else Targets()
            return found.ratio.get(layout), found.floor
        found = self.gpu_targets
        half = dtype != "float32" and found.half_ratio
        return (half or found.ratio.get(layout)), found.floor


# ------------------------------------------------------------------------------------------ inputs
def _generate(draw, shape, seed):
    """Numbers that depend on shape and seed alone, made on the CPU for any device."""
    return draw(shape, generator=torch.Generator().manual_seed(seed))


def _pyramid(strides, setting, seed):
    sizes = [[side // setting.divisor // s for side in IMAGE_SIZE] for s in strides]
    return [
        setting.place(_generate(torch.randn, (setting.images, CHANNELS, *size), seed + i))
        for i, size in enumerate(sizes)
    ]


def pedestrians(count: int, seed: int, *, spread: float = 0.6, off_ground: float = 0.0):
    """Upright boxes as a camera in a car sees them, in a picture of 1024x2048.

    Heights are lognormal around 95 pixels, aspect ratios around CityPersons' 0.41. All heads are
    near one horizon, and a nearer pedestrian stands lower.

    Args:
        count: number of boxes.
        seed: of their own generator.
        spread: standard deviation of the logarithm of the height.
        off_ground: pixels by which a box is off the ground plane (standard deviation).

    Returns:
        Tensor: (count, 4) float32 XYXY, clipped to the picture, at least one pixel a side.
    """
    normal = _generate(torch.randn, (count, 3), seed)
    height = 95 * torch.exp(spread * normal[:, 0])
    width = 0.41 * height * torch.exp(spread / 3 * normal[:, 1])
    centre = IMAGE_SIZE[1] * _generate(torch.rand, (count,), seed + 1)
    # The camera is at 0.7 of a person's height, so the horizon cuts every figure there.
    top = 0.42 * IMAGE_SIZE[0] - 0.3 * height + off_ground * normal[:, 2]
    return _clip(torch.stack([centre - width / 2, top, centre + width / 2, top + height], 1))


def _clip(boxes):
    low = torch.zeros(2)
    high = torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]], dtype=torch.float32)
    first = boxes[:, :2].clamp(low, high - 1)
    return torch.cat([first, torch.maximum(boxes[:, 2:].clamp(low, high), first + 1)], 1)


def sampled_proposals(count: int = NUM_ROIS) -> torch.Tensor:
    """Boxes like those that an RoI head is trained on: a quarter around 12 pedestrians, the rest
    scattered along the horizon; (count, 4) float32 XYXY in a picture of 1024x2048."""
    objects = pedestrians(12, seed=0)
    positives = objects[torch.arange(count // 4) % len(objects)]
    sides = (positives[:, 2:] - positives[:, :2]).repeat(1, 2)
    positives = _clip(positives + 0.1 * sides * _generate(torch.randn, positives.shape, 2))
    scattered = pedestrians(count - len(positives), seed=3, spread=0.8, off_ground=60)
    return torch.cat([positives, scattered])


def boxes_covering(share: float, divisor: int) -> tuple[torch.Tensor, int]:
    """As many pedestrians as it takes to cover ``share`` of the cells of P2 to P6, each on its own
    level; (R, 4) float32 XYXY at the divisor's scale, and the number of cells covered."""
    candidates = pedestrians(2000, seed=5) / divisor
    levels = assign_boxes_to_levels(candidates, PYRAMID_STRIDES)
    masks = [
        torch.zeros([side // divisor // s for side in IMAGE_SIZE], dtype=torch.bool)
        for s in PYRAMID_STRIDES
    ]
    cells = sum(m.numel() for m in masks)
    covered = [0] * len(masks)
    for i, level in enumerate(levels.tolist()):
        mask = masks[level]
        mask |= rasterize_boxes(candidates[i : i + 1], mask.shape, PYRAMID_STRIDES[level])
        covered[level] = int(mask.sum())
        if sum(covered) >= share * cells:
            return candidates[: i + 1], sum(covered)
    raise ValueError(f"share is {share}; ask for less of the picture.")


# ------------------------------------------------------------------------------------------ floors
def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def touched_cells(boxes, sizes, strides, sampling_ratio: int) -> int:
    """Cells of all levels that RoIAlign reads with a weight other than 0.

    Args:
        boxes (list[Tensor]): per image (R_n, 4) XYXY in pixels.
        sizes (list[tuple[int, int]]): height and width of each level.
        strides (sequence of float): pixels a cell of each level.
        sampling_ratio: as of ``multilevel_roi_align``.

    The gradient of the pooled ones by the maps is the sum of the weights that a cell enters with,
    and no weight is negative.
    """
    maps = [torch.zeros(len(boxes), 1, *s, dtype=torch.float64, requires_grad=True) for s in sizes]
    pooled = reference.multilevel_roi_align(
        maps, boxes, strides=strides, output_size=BINS, sampling_ratio=sampling_ratio
    )
    return sum(int((g > 0).sum()) for g in torch.autograd.grad(pooled.sum(), maps))


# ------------------------------------------------------------------------------------------- cases
def _imitation(setting, *, distance="mse", coverage=None):
    student = _pyramid(PYRAMID_STRIDES, setting, seed=10)
    teacher = _pyramid(PYRAMID_STRIDES, setting, seed=20)
    options = {"distance": distance}
    read = _bytes(student) + _bytes(teacher)
    if coverage is not None:
        boxes, covered = boxes_covering(coverage, setting.divisor)
        read = read * covered // sum(s[0, 0].numel() for s in student)
        boxes = [boxes.to(setting.device)] * setting.images
        options.update(boxes=boxes, strides=PYRAMID_STRIDES)
    leaves = [s.requires_grad_() for s in student]
    return Problem(
        leaves,
        lambda operator: operator(leaves, teacher, **options),
        Traffic(read, 0),
        Traffic(read, _bytes(student)),
    )


def _rois(setting, features, sampling_ratio):
    boxes = [sampled_proposals() / setting.divisor] * setting.images
    cells = touched_cells(boxes, [f.shape[2:] for f in features], ROI_STRIDES, sampling_ratio)
    options = dict(strides=ROI_STRIDES, output_size=BINS, sampling_ratio=sampling_ratio)
    return (
        [b.to(setting.device) for b in boxes],
        cells * CHANNELS * features[0].element_size(),
        options,
    )


def _roi_distillation(setting, *, sampling_ratio):
    student = _pyramid(ROI_STRIDES, setting, seed=30)
    teacher = _pyramid(ROI_STRIDES, setting, seed=40)
    boxes, touched, options = _rois(setting, student, sampling_ratio)
    leaves = [s.requires_grad_() for s in student]
    return Problem(
        leaves,
        lambda operator: operator(leaves, teacher, boxes, **options),
        Traffic(2 * touched, 0),
        Traffic(2 * touched, _bytes(student)),
    )


def _roi_align(setting, *, sampling_ratio):
    features = _pyramid(ROI_STRIDES, setting, seed=50)
    boxes, touched, options = _rois(setting, features, sampling_ratio)
    leaves = [f.requires_grad_() for f in features]
    rows = sum(map(len, boxes))
    pooled = rows * CHANNELS * BINS**2 * features[0].element_size()
    return Problem(
        leaves,
        lambda operator: operator(leaves, boxes, **options),
        Traffic(touched, pooled),
        Traffic(pooled, _bytes(features)),
    )


def _logit_problem(tensors, student, call):
    """Every tensor is read by both passes; the gradient of ``student`` is written by the second."""
    leaves = [s.requires_grad_() for s in student]
    read = _bytes(tensors)
    return Problem(leaves, call, Traffic(read, 0), Traffic(read, _bytes(leaves)))


def _dense_sizes(divisor):
    """Maps of a dense head: those of the full size at every scale but the smallest."""
    divisor = divisor if divisor == SCALES["tiny"] else 1
    return [[side // divisor // s for side in IMAGE_SIZE] for s in PYRAMID_STRIDES]


def _adl(setting):
    # Two pictures, nine anchors a cell; background logits around -4, as of a trained detector.
    shapes = [(2, 9, *size) for size in _dense_sizes(setting.divisor)]
    student, teacher = (
        [setting.place(2 * _generate(torch.randn, s, seed + i) - 4) for i, s in enumerate(shapes)]
        for seed in (60, 70)
    )
    teacher = [t.sigmoid() for t in teacher]
    return _logit_problem(
        [*student, *teacher], student, lambda operator: operator(student, teacher)
    )


def _dense_rows(divisor):
    """Anchors of two pictures, three a cell."""
    return sum(6 * height * width for height, width in _dense_sizes(divisor))


def _kl(setting, *, rows=None):
    rows = rows or _dense_rows(setting.divisor)
    student, teacher = (
        setting.place(2 * _generate(torch.randn, (rows, 2), seed)) for seed in (80, 81)
    )
    return _logit_problem(
        [student, teacher],
        [student],
        lambda operator: operator(student, teacher, temperature=2.0),
    )


def _bounded_regression(setting):
    rows = _dense_rows(setting.divisor)
    student, teacher, target = (
        setting.place(_generate(torch.randn, (rows, 4), seed)) for seed in (90, 91, 92)
    )
    return _logit_problem(
        [student, teacher, target], [student], lambda operator: operator(student, teacher, target)
    )


def adl_target() -> float:
    """Wide vectors help the exponentials, so the target depends on the instruction set."""
    return 6.0 if "avx512" in instruction_set() else 4.0


# ------------------------------------------------------------------------ what is usually written
def torchvision_pool(features, boxes, *, strides, output_size, sampling_ratio):
    """Multi-level pooling as Detectron2's ``ROIPooler`` composes it of torchvision's ``roi_align``:
    one level after the other, its rows picked out and written to their places; half precision as
    autocast does it, pooled in float32."""
    from torchvision.ops import roi_align

    sizes = torch.tensor([len(b) for b in boxes], device=features[0].device)
    images = torch.arange(len(boxes), device=sizes.device).repeat_interleave(sizes)
    boxes = torch.cat(boxes)
    rois = torch.cat([images[:, None].to(boxes), boxes], 1)
    levels = assign_boxes_to_levels(boxes, strides)
    output = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = (levels == level).nonzero().squeeze(1)
        pooled = roi_align(
            feature.float(), rois[rows], output_size, 1 / stride, sampling_ratio, aligned=True
        )
        output.index_put_((rows,), pooled.to(output.dtype))
    return output


def torchvision_distillation(student, teacher, boxes, **options):
    """MSE of the pooled tensors of both pyramids."""
    with torch.no_grad():
        target = torchvision_pool(teacher, boxes, **options)
    return F.mse_loss(torchvision_pool(student, boxes, **options), target)


def masked_mse(student, teacher, *, boxes, strides, distance):
    """Squared difference of whole maps times a mask of the boxes of each level, as FGFI (arXiv
    1906.03609) computes it. (``F.mse_loss`` in place of the power saves passes over memory.)"""
    losses = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        masks = [
            rasterize_boxes(
                b[assign_boxes_to_levels(b, strides) == level], s.shape[2:], strides[level]
            )
            for b in boxes
        ]
        mask = torch.stack(masks)[:, None].to(s.dtype)
        difference = torch.pow(t.float() - s.float(), 2) * mask
        losses.append(difference.sum() / (s.shape[1] * mask.float().sum()).clamp(min=1))
    return torch.stack(losses).mean()


_FLAT = (CONTIGUOUS,)
_ALIGN_TARGETS = {
    "targets": Targets({"channels_last": 15.0, "nchw": 10.0}),
    "gpu_targets": Targets(dict.fromkeys(LAYOUTS, 5.0)),
}
_DISTILLATION_TARGETS = Targets({"channels_last": 10.0, "nchw": 8.0})

CASES: dict[str, Case] = {
    "roi_distillation": Case(
        "roi_distillation_loss",
        "512 boxes, 256 channels, P2 to P5, 7x7 bins, 2x2 samples a bin",
        partial(_roi_distillation, sampling_ratio=2),
        usual=torchvision_distillation,
        baseline="usual",
        targets=Targets({"channels_last": 30.0, "nchw": 15.0}),
        gpu_targets=_DISTILLATION_TARGETS,
    ),
    "roi_distillation_adaptive": Case(
        "roi_distillation_loss",
        "the same with as many samples as a bin has cells",
        partial(_roi_distillation, sampling_ratio=0),
        usual=torchvision_distillation,
        baseline="usual",
        targets=Targets({"channels_last": 25.0}),
        gpu_targets=_DISTILLATION_TARGETS,
    ),
    "roi_align": Case(
        "multilevel_roi_align",
        "the same boxes pooled from one pyramid, 2x2 samples a bin",
        partial(_roi_align, sampling_ratio=2),
        usual=torchvision_pool,
        baseline="usual",
        **_ALIGN_TARGETS,
    ),
    "roi_align_adaptive": Case(
        "multilevel_roi_align",
        "the same with as many samples as a bin has cells",
        partial(_roi_align, sampling_ratio=0),
        usual=torchvision_pool,
        baseline="usual",
        **_ALIGN_TARGETS,
    ),
    "imitation_masked": Case(
        "feature_imitation_loss",
        f"mse under boxes that cover {COVERAGE:.0%} of the cells, 256 channels, P2 to P6",
        partial(_imitation, coverage=COVERAGE),
        usual=masked_mse,
        baseline="usual",
        targets=Targets({"channels_last": 10.0, "nchw": 8.0}, floor=80.0),
        gpu_targets=Targets(dict.fromkeys(LAYOUTS, 8.0), half_ratio=20.0),
    ),
    "imitation_mse": Case(
        "feature_imitation_loss",
        "mse over whole maps",
        _imitation,
        targets=Targets(dict.fromkeys(LAYOUTS, 1.8), floor=85.0),
        gpu_targets=Targets(floor=80.0),
    ),
    "imitation_cosine": Case(
        "feature_imitation_loss",
        "cosine over whole maps",
        partial(_imitation, distance="cosine"),
    ),
    "imitation_pkd": Case(
        "feature_imitation_loss",
        "pkd (standardised channels) over whole maps",
        partial(_imitation, distance="pkd"),
        targets=Targets(dict.fromkeys(LAYOUTS, 12.0)),
        gpu_targets=Targets(dict.fromkeys(LAYOUTS, 8.0), floor=75.0),
    ),
    "adl": Case(
        "adaptive_distillation_loss",
        "3.14 million dense logits, one tensor a level",
        _adl,
        layouts=_FLAT,
        targets=Targets({CONTIGUOUS: adl_target()}),
        gpu_targets=Targets({CONTIGUOUS: 10.0}),
    ),
    "kl": Case(
        "kl_distillation_loss", "1024 boxes, 2 classes", partial(_kl, rows=1024), layouts=_FLAT
    ),
    "kl_dense": Case("kl_distillation_loss", "1.05 million anchors, 2 classes", _kl, layouts=_FLAT),
    "bounded_regression": Case(
        "bounded_regression_loss",
        "1.05 million anchors, 4 deltas",
        _bounded_regression,
        layouts=_FLAT,
    ),
}
