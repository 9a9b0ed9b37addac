"""The operators in plain PyTorch: the reference that the fused ones are measured against.

Common to all:

- Losses are computed and returned in float32, in float64 where the student is float64, whatever the
  precision of the inputs. The caller turns autocast off (:mod:`hkd_d2.ops` does).
- Gradients reach the student's tensors and the adapters; the teacher, boxes and weights get none.
- Nothing to compare (no box, no row, an empty mask) gives 0 with zero gradients.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hkd_d2.ops import _checks
from hkd_d2.ops._checks import DISTANCES, Adapter, Adapters

# Bilinear samples whose four taps are laid out at a time: about 100 MB of indices and weights.
_SAMPLES_AT_ONCE = 1 << 20


# ------------------------------------------------------------------------------------------ shapes
def _has_no_numbers(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _result_without_numbers(
    shape: Sequence[int], dtype: torch.dtype, leaves: Sequence[Tensor | None]
) -> Tensor:
    """A result on ``meta`` with gradients to all leaves, where sizes would depend on numbers."""
    result = torch.zeros(tuple(shape), dtype=dtype, device="meta")
    for leaf in leaves:
        if leaf is not None:
            result = result + leaf.sum().to(dtype)
    return result


# ------------------------------------------------------------------------------------------- boxes
def assign_boxes_to_levels(boxes: Tensor, strides: Sequence[float]) -> Tensor:
    """Level of each box by Detectron2's rule.

    .. math:: l = \\left\\lfloor 4 + \\log_2(\\sqrt{area} / 224 + 10^{-8}) \\right\\rfloor

    clamped to the levels given; the level of a stride is its logarithm to base 2. Where the strides
    have gaps, the box goes to the coarsest level that is not above ``l``.

    Args:
        boxes: (R, 4) XYXY in pixels.
        strides: pixels a cell, finest first.

    Returns:
        Tensor: (R,) int64, indices into ``strides``.

    Source: equation 1 of Feature Pyramid Networks (arXiv 1612.03144) as Detectron2's ``ROIPooler``
    has it.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    size = (sides[:, 0] * sides[:, 1]).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(size / 224 + 1e-8))
    index = torch.zeros_like(level).long()
    for stride in strides[1:]:
        index = index + (level >= math.log2(stride)).long()
    return index


def _cell_spans(boxes: Tensor, stride: float, rule: str) -> tuple[Tensor, Tensor]:
    """Cells low <= j < high of each box along x and y, two (R, 2) of whole numbers, unclipped."""
    low = torch.floor(boxes[:, :2] / stride)
    high = boxes[:, 2:] / stride
    if rule == "cells":
        return low, torch.maximum(high.ceil(), low + 1)
    if rule == "defeat":
        return low, torch.maximum(high.floor(), low + 1)
    return low, high.ceil() + 1


def _covered(spans: tuple[Tensor, Tensor], size: Sequence[int]) -> list[Tensor]:
    """Rows (R, height) and columns (R, width) that lie in spans of cells."""
    low, high = spans
    covered = []
    for axis, length in ((1, size[0]), (0, size[1])):
        cell = torch.arange(length, device=low.device)
        covered.append((cell >= low[:, axis, None]) & (cell < high[:, axis, None]))
    return covered


def _near_anchors(
    boxes: Tensor,
    size: Sequence[int],
    stride: float,
    anchors: Tensor,
    threshold: float,
    offset: float,
) -> Tensor:
    """Cells with an anchor whose IoU with a box is above a share of the best: (height, width) bool.

    Anchors (A, 2) of width and height are centred at ((j + offset) * stride, (i + offset) * stride)
    of cell (i, j). FGFI's rule (CVPR 2019).
    """
    half = anchors.to(boxes) / 2
    overlaps = []
    for axis, length in ((0, size[1]), (1, size[0])):
        centre = (torch.arange(length, device=boxes.device, dtype=boxes.dtype) + offset) * stride
        low, high = centre - half[:, axis, None], centre + half[:, axis, None]
        box = boxes[:, axis, None, None], boxes[:, axis + 2, None, None]
        overlap = torch.minimum(high, box[1]) - torch.maximum(low, box[0])
        overlaps.append(overlap.clamp(min=0))
    anchor_area = (anchors[:, 0] * anchors[:, 1]).to(boxes)[:, None, None]
    box_area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    near = torch.zeros(tuple(size), dtype=torch.bool, device=boxes.device)
    for across, down, area in zip(*overlaps, box_area, strict=True):
        intersection = down[:, :, None] * across[:, None]
        iou = intersection / (anchor_area + area - intersection)
        if iou.numel():
            near |= (iou > threshold * iou.max()).any(0)
    return near


def rasterize_boxes(
    boxes: Tensor, size: Sequence[int], stride: float, *, rule: str = "cells"
) -> Tensor:
    """Cells of a feature map that lie under boxes.

    Columns (rows alike) ``j`` of a box ``x1..x2`` at stride ``s``, clipped to the map, by rule:

    - ``cells``: floor(x1/s) <= j < max(ceil(x2/s), floor(x1/s) + 1)
    - ``defeat``: floor(x1/s) <= j < max(floor(x2/s), floor(x1/s) + 1), as DeFeat (CVPR 2021) does
    - ``fgd``: floor(x1/s) <= j < ceil(x2/s) + 1, as FGD (CVPR 2022) does

    Args:
        boxes: (R, 4) XYXY in pixels.
        size: height and width of the map in cells.
        stride: pixels a cell.
        rule: ``cells`` | ``defeat`` | ``fgd``.

    Returns:
        Tensor: (height, width) bool, True under a box. A box with NaN covers nothing.

    Raises:
        ValueError: an unknown rule.
    """
    _checks.one_of("rasterize", rule, _checks.RASTERIZE_RULES[:-1])
    rows, columns = _covered(_cell_spans(boxes, stride, rule), size)
    # Counts of boxes; exact in float32, and much less memory than an (R, height, width) mask.
    return rows.float().T @ columns.float() > 0


# ---------------------------------------------------------------------------------------- distances
def _distance(
    student: Tensor,
    teacher: Tensor,
    distance: str,
    dim: int,
    channel_weights: Tensor | None = None,
) -> Tensor:
    """Distance of feature vectors along ``dim``, which is reduced.

    ``channel_weights``, which broadcast, multiply the elements of a mean.
    """
    if student.shape[dim] == 0:
        return student.sum(dim)
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=dim)
    if distance == "mse":
        elements = (student - teacher).square()
    elif distance == "l1":
        elements = (student - teacher).abs()
    else:
        elements = F.smooth_l1_loss(student, teacher, reduction="none")
    if channel_weights is not None:
        elements = torch.where(channel_weights == 0, 0, elements * channel_weights)
    return elements.mean(dim)


def _standardize(maps: Tensor) -> Tensor:
    """Zero mean and unit deviation of every channel over (N, H, W)."""
    count = maps.numel() // max(maps.shape[1], 1)
    mean = maps.mean((0, 2, 3), keepdim=True)
    deviation = maps.std((0, 2, 3), correction=min(1, count - 1), keepdim=True)
    return (maps - mean) / (deviation + 1e-6)


def _parameters(of_level: Sequence[Adapter | None]) -> list[Tensor | None]:
    """Weights and biases of the levels' adapters."""
    return [tensor for adapter in of_level if adapter is not None for tensor in adapter]


def _adapt(values: Tensor, adapter: Adapter | None, dim: int) -> Tensor:
    """A 1x1 adapter over the channels ``dim`` of any tensor."""
    if adapter is None:
        return values
    weight, bias = adapter[0].to(values.dtype), adapter[1]
    bias = None if bias is None else bias.to(values.dtype)
    return F.linear(values.movedim(dim, -1), weight, bias).movedim(-1, dim)


def _foreground(
    boxes: Tensor,
    size: Sequence[int],
    stride: float,
    rule: str,
    box_weights: str,
    anchors: tuple[Tensor, float, float] | None,
) -> Tensor:
    """(H, W) float32 weights of the cells under boxes, -1 elsewhere."""
    if anchors is not None and rule == "fgfi":
        return _near_anchors(boxes, size, stride, *anchors).float() * 2 - 1
    if box_weights == "none":
        return rasterize_boxes(boxes, size, stride, rule=rule).float() * 2 - 1
    spans = _cell_spans(boxes, stride, rule)
    share = (1 / (spans[1] - spans[0]).prod(1)).float()
    weights = share.new_full(tuple(size), -1)
    for row, column, value in zip(*_covered(spans, size), share, strict=True):
        weights = weights.maximum(torch.where(row[:, None] & column, value, -1))
    return weights


def _cell_weights(
    shape: Sequence[int],
    boxes: Sequence[Tensor],
    ignore_boxes: Sequence[Tensor] | None,
    stride: float,
    rule: str,
    box_weights: str,
    anchors: tuple[Tensor, float, float] | None,
    weights: tuple[float, float],
) -> Tensor:
    """(N, H, W) float32 mask weights of one level from the boxes that belong to it.

    ``weights`` are those of foreground and background.
    """
    levels = []
    # A region to ignore is no object, so FGFI's anchors say nothing about it.
    ignore_rule = "cells" if rule == "fgfi" else rule
    for image in range(shape[0]):
        foreground = _foreground(boxes[image], shape[2:], stride, rule, box_weights, anchors)
        w = torch.full_like(foreground, weights[1])
        if ignore_boxes is not None:
            w[rasterize_boxes(ignore_boxes[image], shape[2:], stride, rule=ignore_rule)] = 0
        levels.append(torch.where(foreground < 0, w, foreground * weights[0]))
    return torch.stack(levels) if levels else torch.zeros(0, *shape[2:])


def feature_imitation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    boxes: Sequence[Tensor] | None = None,
    strides: Sequence[float] | None = None,
    ignore_boxes: Sequence[Tensor] | None = None,
    distance: str = "mse",
    foreground_weight: float = 1.0,
    background_weight: float | None = None,
    box_weights: str = "none",
    assign_ignore: str = "level",
    rasterize: str = "cells",
    anchors: Sequence[Tensor] | None = None,
    anchor_threshold: float = 0.5,
    anchor_offset: float = 0.0,
    spatial_weights: Sequence[Tensor] | None = None,
    channel_weights: Sequence[Tensor] | None = None,
    level_weights: Tensor | Sequence[float] | None = None,
    adapter: Adapters = None,
) -> Tensor:
    """Distance of two feature pyramids, over the whole maps or weighted by boxes.

    .. math:: L = \\frac{1}{L} \\sum_l v_l
              \\frac{\\sum_{n,i,j} w_{lnij}\\, d(A_l S_{lnij}, T_{lnij})}{\\sum_{n,i,j} w_{lnij}}

    where :math:`d` compares the C_t channels of a cell:

    - ``mse``: mean of (s - t)^2; so a level is sum(w (s - t)^2) / (C sum w)
    - ``l1``: mean of abs(s - t)
    - ``smooth_l1``: mean of (s - t)^2 / 2 where abs(s - t) < 1, else abs(s - t) - 1/2
    - ``cosine``: 1 - s.t / (norm(s) norm(t)), one number a cell, so not divided by C
    - ``pkd``: 1/2 MSE after each channel of each side is standardised over (N, H, W) of its level,
      with the unbiased deviation + 1e-6; that is 1 - Pearson correlation up to (n - 1) / n
      (PKD, arXiv 2207.02039). Whole maps only.

    ``w`` is ``foreground_weight`` on cells under ``boxes``, 0 on cells that only ``ignore_boxes``
    cover, ``background_weight`` elsewhere. Only cells of another weight than 0 are active: a NaN in
    the others is harmless. A level without weight counts as 0 and stays in the mean over levels.

    Args:
        student: L maps (N, C_s, H_l, W_l), finest first; float16, bfloat16, float32
            or float64.
        teacher: L maps (N, C_t, H_l, W_l); another precision is welcome.
        boxes: per image (R_n, 4) float32 XYXY in pixels of the padded
            image.
        strides: pixels a cell of each level; needed with boxes.
        ignore_boxes: as ``boxes``.
        distance: see above.
        foreground_weight: weight of cells under boxes.
        background_weight: weight of the other cells; None is 0 with boxes and 1
            without.
        box_weights: ``none``, or ``area``: ``foreground_weight`` is divided by the height
            times the width of the box in cells, unclipped, so that every box weighs alike; where
            boxes overlap the smallest rules (FGD, CVPR 2022).
        assign_ignore: ``level`` applies an ignore box to its level only, as ``boxes`` are
            (:func:`assign_boxes_to_levels`), ``all`` to every level.
        rasterize: which cells a box covers (:func:`rasterize_boxes`), or ``fgfi``: cells with
            an anchor whose IoU with the box is above ``anchor_threshold`` times the best IoU of any
            anchor of the level with it (FGFI, CVPR 2019); ``ignore_boxes`` then cover ``cells``.
        anchors: per level (A, 2) widths and heights of the anchors in
            pixels, for ``fgfi``.
        anchor_threshold: share of the best IoU, from 0 to below 1.
        anchor_offset: the anchors of cell (i, j) are centred at (j + offset) times the
            stride across and (i + offset) times the stride down; Detectron2's default is 0.
        spatial_weights: per level (N, H_l, W_l) weights of cells, and
        channel_weights: per level (N, C_t) weights of channels, at least
            0. They multiply the elements of ``mse``, ``l1`` and ``smooth_l1`` but not the sum of
            ``w`` that divides (the teacher's attention in FGD); weight 0 does not count.
        level_weights: (L,) factors ``v`` of the levels.
        adapter: 1x1 adapter ``(weight (C_t, C_s), bias (C_t,) or None)`` for all levels,
            or a list with one, or None, a level. Needed where the widths differ.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: levels, shapes or lists that do not fit, an unknown option, ``pkd`` with a mask,
            options that exclude each other.
    """
    stride_of_level, background, of_level, masked = _checks.feature_imitation(
        student,
        teacher,
        boxes,
        strides,
        ignore_boxes,
        distance,
        foreground_weight,
        background_weight,
        box_weights,
        assign_ignore,
        rasterize,
        anchors,
        anchor_threshold,
        spatial_weights,
        channel_weights,
        level_weights,
        adapter,
    )
    dtype = _checks.loss_dtype(student[0])
    if _has_no_numbers(student[0]):
        return _result_without_numbers((), dtype, [*student, *_parameters(of_level)])
    if boxes is None:
        boxes = [student[0].new_zeros(0, 4, dtype=torch.float32)] * len(student[0])

    def on_level(box_list: Sequence[Tensor], level: int) -> list[Tensor]:
        return [b[assign_boxes_to_levels(b, stride_of_level) == level] for b in box_list]

    boxes = [b.detach() for b in boxes]
    if ignore_boxes is not None:
        ignore_boxes = [b.detach() for b in ignore_boxes]
    losses = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = s.to(dtype), t.detach().to(dtype)
        of_channels = None
        if channel_weights is not None:
            of_channels = channel_weights[level].detach().to(dtype)[:, :, None, None].expand_as(t)
        if not masked and spatial_weights is None:
            s = _adapt(s, of_level[level], dim=1)
            if s.numel() == 0:
                losses.append(s.sum())
            elif distance == "pkd":
                losses.append(F.mse_loss(_standardize(s), _standardize(t)) / 2)
            else:
                losses.append(_distance(s, t, distance, 1, of_channels).mean())
            continue
        weights = s.new_ones(s.shape[0], *s.shape[2:])
        if masked:
            weights = _cell_weights(
                s.shape,
                on_level(boxes, level),
                on_level(ignore_boxes, level)
                if ignore_boxes is not None and assign_ignore == "level"
                else ignore_boxes,
                stride_of_level[level] if stride_of_level else 1.0,
                rasterize,
                box_weights,
                None
                if anchors is None
                else (anchors[level].detach(), anchor_threshold, anchor_offset),
                (foreground_weight, background),
            ).to(s)
        total = weights.sum()
        if spatial_weights is not None:
            weights = weights * spatial_weights[level].detach().to(dtype)
        active = weights != 0
        s, t = s.movedim(1, -1)[active], t.movedim(1, -1)[active]
        if of_channels is not None:
            of_channels = of_channels.movedim(1, -1)[active]
        cells = _distance(_adapt(s, of_level[level], dim=-1), t, distance, -1, of_channels)
        losses.append((weights[active] * cells).sum() / torch.where(total > 0, total, 1))
    of_levels = torch.stack(losses)
    if level_weights is not None:
        of_levels = of_levels * torch.as_tensor(level_weights).detach().to(of_levels)
    return of_levels.mean()


# ---------------------------------------------------------------------------------------- RoIAlign
def _axis_taps(
    position: Tensor, length: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two cells and weights of a bilinear sample along one axis.

    A sample more than one cell outside the map weighs 0; nearer ones are moved to the border.
    """
    inside = (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    low = position.floor()
    high = (low + 1).clamp(max=length - 1)
    upper = position - low
    return (low.long(), high.long()), ((1 - upper) * inside, upper * inside)


def _pool_level(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    stride: float,
    bins: tuple[int, int],
    sampling_ratio: int,
) -> Tensor:
    """RoIAlign of one level: (R, C, *bins) in the loss dtype.

    A pooled bin is a weighted sum of few cells, so the level's cells are the rows of an embedding
    table, the taps of a bin are one bag, and PyTorch's embedding_bag does the rest: no gathered
    copy is stored, and bags of different length (adaptive sampling) go together.
    """
    _, channels, height, width = features.shape
    rows, columns = bins
    table = features.to(_checks.loss_dtype(features)).movedim(1, -1).flatten(0, 2)
    if table.numel() == 0:
        return table.sum() + table.new_zeros(len(boxes), channels, rows, columns)

    usable = boxes.isfinite().all(1)
    corners = torch.where(usable[:, None], boxes, 0).to(table.dtype) * (1 / stride) - 0.5
    x1, y1, x2, y2 = corners.unbind(1)
    bin_h, bin_w = (y2 - y1) / rows, (x2 - x1) / columns
    if sampling_ratio > 0:
        grid_h = grid_w = torch.full_like(images, sampling_ratio)
    else:
        grid_h, grid_w = (b.ceil().long().clamp(min=0) for b in (bin_h, bin_w))
    samples = torch.where(usable, grid_h * grid_w, 0)

    pooled = []
    chunk = (samples * rows * columns).cumsum(0) // _SAMPLES_AT_ONCE
    sizes = chunk.unique_consecutive(return_counts=True)[1].tolist() or [0]
    for roi in torch.arange(len(boxes), device=boxes.device).split(sizes):
        per_bin = samples[roi].repeat_interleave(rows * columns)
        count = samples[roi] * rows * columns
        r = roi.repeat_interleave(count)
        # Number of the sample within its box, read as (bin row, bin column, grid row, grid column).
        k = torch.arange(len(r), device=r.device)
        k = k - (count.cumsum(0) - count).repeat_interleave(count)
        k, grid_x = k // grid_w[r], k % grid_w[r]
        k, grid_y = k // grid_h[r], k % grid_h[r]
        y = y1[r] + k // columns * bin_h[r] + (grid_y + 0.5) * bin_h[r] / grid_h[r]
        x = x1[r] + k % columns * bin_w[r] + (grid_x + 0.5) * bin_w[r] / grid_w[r]
        y_cells, y_weights = _axis_taps(y, height)
        x_cells, x_weights = _axis_taps(x, width)
        first = images[r] * height
        cells = torch.stack([(first + v) * width + h for v in y_cells for h in x_cells], 1)
        weights = torch.stack([v * h for v in y_weights for h in x_weights], 1) / samples[r, None]
        pooled.append(
            F.embedding_bag(
                cells.flatten(),
                table,
                (per_bin.cumsum(0) - per_bin) * 4,
                mode="sum",
                per_sample_weights=weights.flatten(),
            )
        )
    return torch.cat(pooled).view(len(boxes), rows, columns, channels).movedim(-1, 1)


def _pool(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    strides: Sequence[float],
    bins: tuple[int, int],
    sampling_ratio: int,
) -> tuple[list[Tensor], Tensor]:
    """Pool every box from its level.

    Returns:
        tuple: per level (R_l, C, *bins), and (R,) int64, where each row of their concatenation
        belongs in image-major box order.
    """
    device = features[0].device
    sizes = torch.tensor([len(b) for b in boxes], dtype=torch.long, device=device)
    images = torch.arange(len(boxes), device=device).repeat_interleave(sizes)
    together = torch.cat([torch.zeros(0, 4, device=device), *(b.detach() for b in boxes)])
    level = assign_boxes_to_levels(together, strides)
    rows = [(level == i).nonzero().squeeze(1) for i in range(len(strides))]
    pooled = [
        _pool_level(f, together[r], images[r], s, bins, sampling_ratio)
        for f, r, s in zip(features, rows, strides, strict=True)
    ]
    return pooled, torch.cat(rows)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    strides: Sequence[float],
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """RoIAlign of every box from its own level of a feature pyramid, in one call.

    A bin is the mean of bilinear samples on a regular grid inside it; coordinates are shifted by
    half a cell (``aligned=True`` of torchvision). Samples more than one cell outside the map are 0,
    nearer ones take the border's value. The same numbers as Detectron2's ``ROIPooler`` with
    ``ROIAlignV2``, but boxes keep float32 coordinates whatever the precision of the features.

    Args:
        features: L maps (N, C, H_l, W_l), finest first; float16, bfloat16, float32
            or float64.
        boxes: per image (R_n, 4) float32 XYXY in pixels of the padded image. A box
            with NaN or infinity pools to 0.
        strides: pixels a cell of each level.
        output_size: bins a side, or (rows, columns).
        sampling_ratio: samples a bin and axis; 0 takes ceil(box / bins), at least none.

    Returns:
        Tensor: (R, C, rows, columns) in the features' dtype, rows in image-major box order; sums
        are taken in float32 (float64 for float64).

    Raises:
        ValueError: levels, shapes or lists that do not fit.

    Source: Mask R-CNN (arXiv 1703.06870); :func:`assign_boxes_to_levels` for the levels.
    """
    strides = _checks.pooling_arguments("features", features, boxes, strides)
    bins = _checks.bins(output_size)
    if _has_no_numbers(features[0]):
        shape = (sum(len(b) for b in boxes), features[0].shape[1], *bins)
        return _result_without_numbers(shape, features[0].dtype, features)
    pooled, order = _pool(features, boxes, strides, bins, sampling_ratio)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(pooled)[back].to(features[0].dtype)


def roi_distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    strides: Sequence[float],
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 0,
    distance: str = "mse",
    adapter: Adapters = None,
) -> Tensor:
    """Distance of the RoI-aligned features of two pyramids on the same boxes.

    .. math:: L = \\frac{1}{R P Q} \\sum_{r,p,q}
              d\\left(A\\,\\mathrm{RoIAlign}(S, b_r)_{pq},\\ \\mathrm{RoIAlign}(T, b_r)_{pq}\\right)

    with the distances ``mse``, ``l1``, ``smooth_l1`` and ``cosine`` over the channels of
    :func:`feature_imitation_loss` (so ``mse`` is the mean over R, C and bins) and the pooling of
    :func:`multilevel_roi_align`. 0 boxes give 0.

    Args:
        student: L maps (N, C_s, H_l, W_l), finest first.
        teacher: L maps (N, C_t, H_l, W_l); another precision is welcome.
        boxes: per image (R_n, 4) float32 XYXY in pixels of the padded image.
        strides: pixels a cell of each level.
        output_size: bins a side, or (rows, columns).
        sampling_ratio: samples a bin and axis; 0 is adaptive.
        distance: ``mse`` | ``l1`` | ``smooth_l1`` | ``cosine``.
        adapter: applied to the pooled values; see :func:`feature_imitation_loss`.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: levels, shapes or lists that do not fit, an unknown option.

    Source: the region hierarchy of HKD (arXiv 1909.09325) and Mimic (CVPR 2017), which differ in
    the boxes.
    """
    _checks.paired_pyramids(student, teacher)
    _checks.one_of("distance", distance, DISTANCES[:-1])
    strides = _checks.pooling_arguments("student", student, boxes, strides)
    _checks.pooling_arguments("teacher", teacher, boxes, strides)
    of_level = _checks.adapters(adapter, student, teacher)
    bins = _checks.bins(output_size)
    if _has_no_numbers(student[0]):
        leaves = [*student, *_parameters(of_level)]
        return _result_without_numbers((), _checks.loss_dtype(student[0]), leaves)
    pooled, _ = _pool(student, boxes, strides, bins, sampling_ratio)
    # Detached, for no_grad leaves forward mode on.
    targets, _ = _pool([t.detach() for t in teacher], boxes, strides, bins, sampling_ratio)
    total = torch.zeros((), dtype=pooled[0].dtype, device=pooled[0].device)
    for s, t, a in zip(pooled, targets, of_level, strict=True):
        total = total + _distance(_adapt(s, a, dim=1), t.to(s.dtype), distance, dim=1).sum()
    return total / max(sum(len(b) for b in boxes) * bins[0] * bins[1], 1)


# ------------------------------------------------------------------------------------------ logits
def kl_distillation_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    weights: Tensor | Sequence[Tensor] | None = None,
    activation: str = "softmax",
) -> Tensor:
    """Temperature-scaled KL divergence of the teacher's classes from the student's.

    .. math:: L = \\frac{\\sum_r w_r\\, T^2 \\sum_k \\mathrm{KL}_{rk}}{\\max(\\sum_r w_r, 1)}

    - ``softmax``: KL_k = q_k (ln q_k - ln p_k) with p, q = softmax(logits / T)
    - ``sigmoid``: KL_k = q_k ln(q_k / p_k) + (1 - q_k) ln((1 - q_k) / (1 - p_k)), one Bernoulli
      variable a class

    A class that the teacher excludes (a logit of minus infinity) contributes 0.

    Args:
        student_logits: (..., K), classes last; float16, bfloat16, float32
            or float64. A list, for example one tensor a level, counts as all its rows together.
        teacher_logits: (..., K); another precision is welcome.
        temperature: T.
        weights: (...) weights of the rows, at least 0; None
            weighs each 1, so the loss is the mean over rows.
        activation: ``softmax`` | ``sigmoid``.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: lists or shapes that do not fit, a temperature of 0 or less, an unknown
            activation.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    student, teacher, row_weights = _checks.logits_and_weights(
        student_logits, teacher_logits, weights
    )
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))

    def row_losses(log_q: Tensor, log_p: Tensor) -> Tensor:
        return _weighted(log_q.exp(), log_q - log_p).sum(-1)

    return _mean_over_rows(student, teacher, row_weights, temperature, activation, row_losses)


def soft_cross_entropy_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    class_weights: Tensor | None = None,
    weights: Tensor | Sequence[Tensor] | None = None,
    activation: str = "softmax",
) -> Tensor:
    """Cross-entropy of the student's classes under the teacher's, with weighted classes.

    .. math:: L = \\frac{\\sum_r w_r\\, T^2 \\sum_k c_k\\, \\mathrm{CE}_{rk}}{\\max(\\sum_r w_r, 1)}

    - ``softmax``: CE_k = -q_k ln p_k with p, q = softmax(logits / T)
    - ``sigmoid``: CE_k = -q_k ln p_k - (1 - q_k) ln(1 - p_k), one Bernoulli variable a class

    Unlike a cross-entropy against hard labels, a class weight leaves the normaliser as it is. With
    all c_k = 1 the gradient is that of :func:`kl_distillation_loss`. Chen et al. weigh the
    background 1.5 and the other classes 1, against missed objects. A class without weight, or that
    the teacher excludes, contributes 0.

    Args:
        student_logits: (..., K), classes last; float16, bfloat16, float32
            or float64. A list, for example one tensor a level, counts as all its rows together.
        teacher_logits: (..., K); another precision is welcome.
        temperature: T.
        class_weights: (K,) weights c of the classes, at least 0; None is 1 each.
        weights: (...) weights of the rows, at least 0; None
            weighs each 1, so the loss is the mean over rows.
        activation: ``softmax`` | ``sigmoid``.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: lists or shapes that do not fit, a temperature of 0 or less, an unknown
            activation.

    Source: Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation
    (NIPS 2017), equation 3.
    """
    student, teacher, row_weights = _checks.logits_and_weights(
        student_logits, teacher_logits, weights
    )
    _checks.class_weights(class_weights, student[0])
    _checks.positive("temperature", temperature)
    _checks.one_of("activation", activation, ("softmax", "sigmoid"))
    c: Tensor | float = 1.0
    if class_weights is not None:
        c = class_weights.detach().to(_checks.loss_dtype(student[0]))

    def row_losses(log_q: Tensor, log_p: Tensor) -> Tensor:
        return _weighted(c * log_q.exp(), -log_p).sum(-1)

    return _mean_over_rows(student, teacher, row_weights, temperature, activation, row_losses)


def _mean_over_rows(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[Tensor],
    temperature: float,
    activation: str,
    row_losses: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """T^2 times the weighted mean over all rows of ``row_losses(ln q, ln p)``."""
    dtype = _checks.loss_dtype(student[0])
    rows = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.to(dtype) / temperature, t.detach().to(dtype) / temperature
        if activation == "softmax":
            losses = row_losses(t.log_softmax(-1), s.log_softmax(-1))
        else:
            losses = row_losses(F.logsigmoid(t), F.logsigmoid(s))
            losses = losses + row_losses(F.logsigmoid(-t), F.logsigmoid(-s))
        rows.append(temperature**2 * losses.flatten())
    loss = torch.cat(rows)
    if not weights:
        return loss.sum() / max(loss.numel(), 1)
    weight = torch.cat([w.detach().to(dtype).flatten() for w in weights])
    return (weight * loss).sum() / weight.sum().clamp(min=1)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0; a NaN passes through."""
    return torch.where(weight == 0, 0, weight * value)


def adaptive_distillation_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_probs: Tensor | Sequence[Tensor],
    *,
    gamma: float = 2.0,
    alpha: float = 0.5,
    beta_c: float = 0.0,
    theta: float = 1.8,
    outer: str = "bce",
    ignore: Tensor | Sequence[Tensor] | None = None,
    normalizer: str | None = "theta",
) -> Tensor:
    """Adaptive distillation loss of dense sigmoid classifiers (SAD, arXiv 1901.00366).

    For a student logit x with p = sigmoid(x), a teacher probability q and
    H(q) = -q ln q - (1 - q) ln(1 - q):

    .. math::
        D &= -q \\ln p - (1 - q) \\ln(1 - p) - \\beta_c H(q) \\\\
        A &= 1 - e^{-\\max(D, 0)} \\\\
        \\ell_{bce} &= -A^\\gamma (\\alpha\\, q \\ln p + (1 - \\alpha)(1 - q) \\ln(1 - p)) \\\\
        \\ell_{kl} &= A^\\gamma\\, \\mathrm{KL}(q \\| p)

        L = \\sum \\ell / \\max(1, \\sum q^\\theta)

    ``outer="bce"`` is the released code (Tangshitao/Semi-supervised-Adaptive-Distillation), where
    ``beta_c=0`` is its default; ``outer="kl"`` is the form of the paper, whose beta is
    ``1 - beta_c`` and which has no ``alpha``. The gradient flows through A as well.

    Args:
        student_logits: any shape, for example one tensor a level.
        teacher_probs: probabilities in [0, 1] of the same shapes.
        gamma: focusing exponent, at least 0.
        alpha: balance of the two classes.
        beta_c: share of the teacher's entropy that is taken off; 0 keeps all of it.
        theta: exponent of the normaliser.
        outer: ``bce`` | ``kl``, the factor that A weighs.
        ignore: bool of the same shapes; True drops an element
            from the sum of losses. The normaliser counts every element, as released.
        normalizer: ``theta``, or None for the plain sum.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: lists or shapes that do not fit, an unknown option.
    """
    logits, probs, ignored = _checks.adaptive(
        student_logits, teacher_probs, gamma, outer, ignore, normalizer
    )
    dtype = _checks.loss_dtype(logits[0])
    if _has_no_numbers(logits[0]):
        return _result_without_numbers((), dtype, logits)
    total = mass = torch.zeros((), dtype=dtype, device=logits[0].device)
    skips: Sequence[Tensor | None] = ignored or [None] * len(logits)
    for x, q, skip in zip(logits, probs, skips, strict=True):
        x, q = x.to(dtype), q.detach().to(dtype)
        mass = mass + q.pow(theta).sum()
        if skip is not None:
            x, q = x[~skip], q[~skip]
        # ln p = -softplus(-x) and ln(1 - p) = -softplus(x) keep their digits at both ends.
        positive, negative = q * F.softplus(-x), (1 - q) * F.softplus(x)
        cross_entropy = positive + negative
        entropy = -torch.xlogy(q, q) - torch.xlogy(1 - q, 1 - q)
        excess = (cross_entropy - beta_c * entropy).clamp(min=0)
        focus = -torch.expm1(-excess)
        # A power below 1 has an infinite slope at 0, which autograd would turn into NaN.
        focus = torch.where(focus > 0, torch.where(focus > 0, focus, 1).pow(gamma), 0)
        if outer == "bce":
            losses = focus * (alpha * positive + (1 - alpha) * negative)
        else:
            losses = focus * (cross_entropy - entropy)
        total = total + losses.sum()
    return total if normalizer is None else total / mass.clamp(min=1)


def bounded_regression_loss(
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    target_deltas: Tensor,
    *,
    margin: float = 0.01,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Box regression that is bounded by the teacher's error (Chen et al., NIPS 2017).

    .. math:: L = \\frac{1}{Z} \\sum_r \\|s_r - y_r\\|^2\\,
              \\mathbb{1}[\\|s_r - y_r\\|^2 + m > \\|t_r - y_r\\|^2]

    A box counts while the student's squared error plus the margin exceeds the teacher's.

    Args:
        student_deltas: (R, D) box deltas.
        teacher_deltas: (R, D), of the same boxes.
        target_deltas: (R, D), ground truth of the same boxes.
        margin: m, in squared units of the deltas.
        normalizer: Z, taken as at least 1; None is R. Detectron2
            divides its box loss by all sampled boxes, so pass that number with the rows of the
            foreground boxes.

    Returns:
        Tensor: scalar.

    Raises:
        ValueError: shapes that differ, a normaliser of several numbers.
    """
    _checks.bounded_deltas(student_deltas, teacher_deltas, target_deltas, normalizer)
    dtype = _checks.loss_dtype(student_deltas)
    target = target_deltas.detach().to(dtype)
    student_error = (student_deltas.to(dtype) - target).square().sum(1)
    teacher_error = (teacher_deltas.detach().to(dtype) - target).square().sum(1)
    loss = torch.where(student_error + margin > teacher_error, student_error, 0).sum()
    if normalizer is None:
        normalizer = len(student_deltas)
    if isinstance(normalizer, torch.Tensor):
        return loss / normalizer.detach().to(dtype).clamp(min=1)
    return loss / max(normalizer, 1)
