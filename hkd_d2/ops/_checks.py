"""Argument checks that the reference and the fused operators share.

They look at shapes and types only, never at values, so that none waits for a GPU.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

# A 1x1 adapter: weight (C_t, C_s), bias (C_t,) or None. One for all levels, or a list of a level
# each, None where there is none.
Adapter = tuple[Tensor, Tensor | None]
Adapters = Adapter | Sequence[Adapter | None] | None

# Options whose places in these tuples are the codes of the kernels (csrc/include/hkd).
DISTANCES = ("mse", "l1", "smooth_l1", "cosine", "pkd")
RASTERIZE_RULES = ("cells", "defeat", "fgd", "fgfi")


def one_of(name: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(str, known))}.")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a number above 0.")


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, float32 for float32, float16 and bfloat16."""
    return torch.promote_types(tensor.dtype, torch.float32)


def same_device(name: str, tensor: Tensor, expected_name: str, expected: Tensor) -> None:
    if tensor.device != expected.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {expected_name} on {expected.device}; "
            "move them to one device."
        )


def pyramid(name: str, maps: Any) -> None:
    """A non-empty list of floating (N, C_l, H_l, W_l), N and the device alike."""
    if isinstance(maps, Tensor) or not isinstance(maps, (list, tuple)) or not maps:
        raise ValueError(f"{name} must be a non-empty list of (N, C, H, W) tensors, one a level.")
    for level, m in enumerate(maps):
        if not isinstance(m, Tensor) or m.dim() != 4 or not m.is_floating_point():
            shown = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
            raise ValueError(
                f"{name}[{level}] is {shown}; give a floating tensor of shape (N, C, H, W)."
            )
        if m.shape[0] != maps[0].shape[0]:
            raise ValueError(
                f"{name}[{level}] has {m.shape[0]} images and {name}[0] has {maps[0].shape[0]}; "
                "give every level of the same batch."
            )
        same_device(f"{name}[{level}]", m, f"{name}[0]", maps[0])


def pooling_arguments(
    name: str, maps: Sequence[Tensor], boxes: Any, strides: Sequence[float] | None
) -> list[float]:
    """A pyramid that boxes can be pooled from; returns the strides as floats."""
    pyramid(name, maps)
    same_channels(name, maps)
    for level, m in enumerate(maps):
        if m.dtype != maps[0].dtype:
            raise ValueError(
                f"{name}[{level}] is {m.dtype} and {name}[0] is {maps[0].dtype}; give levels of "
                "one dtype."
            )
    strides = level_strides(strides, len(maps))
    box_lists("boxes", boxes, maps[0])
    return strides


def same_channels(name: str, maps: Sequence[Tensor]) -> None:
    """All levels of one width, as pooling from several levels needs."""
    for level, m in enumerate(maps):
        if m.shape[1] != maps[0].shape[1]:
            raise ValueError(
                f"{name}[{level}] has {m.shape[1]} channels and {name}[0] has {maps[0].shape[1]}; "
                "boxes of all levels are pooled into one tensor, so give levels of one width."
            )


def paired_pyramids(student: Any, teacher: Any) -> None:
    """Two pyramids with the same levels, images and map sizes."""
    pyramid("student", student)
    pyramid("teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} levels and teacher has {len(teacher)}; "
            "pass the same levels of both."
        )
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"student[{level}] is {tuple(s.shape)} and teacher[{level}] is {tuple(t.shape)}; "
                "the number of images, the height and the width must be equal."
            )
    same_device("teacher[0]", teacher[0], "student[0]", student[0])


def level_strides(strides: Sequence[float] | None, num_levels: int) -> list[float]:
    """One stride (pixels a cell) a level, positive and rising; returned as floats."""
    if strides is None:
        raise ValueError("strides is missing; boxes need the pixels a cell of every level.")
    strides = [float(s) for s in strides]
    if len(strides) != num_levels:
        raise ValueError(
            f"strides has {len(strides)} entries for {num_levels} levels; give one each."
        )
    rising = all(a < b for a, b in zip(strides, strides[1:], strict=False))
    if not rising or not strides[0] > 0:
        raise ValueError(f"strides is {strides}; give positive numbers, finest level first.")
    return strides


def box_lists(name: str, boxes: Any, features: Tensor) -> None:
    """A list over the images of ``features`` of (R_n, 4) float32 or float64 boxes."""
    num_images = features.shape[0]
    if isinstance(boxes, Tensor) or not isinstance(boxes, (list, tuple)):
        raise ValueError(f"{name} must be a list of (R, 4) tensors, one an image.")
    if len(boxes) != num_images:
        raise ValueError(
            f"{name} has {len(boxes)} entries for {num_images} images; give one tensor an image."
        )
    for image, b in enumerate(boxes):
        if not isinstance(b, Tensor) or b.dim() != 2 or b.shape[1] != 4:
            shown = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"{name}[{image}] is {shown}; give a tensor of shape (R, 4).")
        if b.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}[{image}] is {b.dtype}; give float32, which half precision would round by "
                "up to 4 pixels."
            )
        same_device(f"{name}[{image}]", b, "the feature maps", features)


def adapters(
    adapter: Adapters, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> list[Adapter | None]:
    """One ``(weight, bias or None)`` or ``None`` a level, from one for all or a list."""
    of_level: list[Any]
    if adapter is None:
        of_level = [None] * len(student)
    elif len(adapter) and isinstance(adapter[0], Tensor):
        of_level = [adapter] * len(student)
    else:
        of_level = list(adapter)
        if len(of_level) != len(student):
            raise ValueError(
                f"adapter has {len(of_level)} entries for {len(student)} levels; give one "
                "(weight, bias) for all levels, or a list with one (or None) a level."
            )
    for level, (a, s, t) in enumerate(zip(of_level, student, teacher, strict=True)):
        wide_s, wide_t = s.shape[1], t.shape[1]
        if a is None:
            if wide_s != wide_t:
                raise ValueError(
                    f"student[{level}] has {wide_s} channels and teacher[{level}] has {wide_t}; "
                    f"pass adapter=(weight, bias) with a weight of shape ({wide_t}, {wide_s})."
                )
            continue
        weight, bias = a
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                floating(f"The adapter's {name} of level {level}", tensor)
                same_device(
                    f"The adapter's {name} of level {level}", tensor, "student[0]", student[0]
                )
        if tuple(weight.shape) != (wide_t, wide_s):
            raise ValueError(
                f"The adapter's weight of level {level} is {tuple(weight.shape)}; the channels of "
                f"teacher and student make it ({wide_t}, {wide_s})."
            )
        if bias is not None and tuple(bias.shape) != (wide_t,):
            raise ValueError(
                f"The adapter's bias of level {level} is {tuple(bias.shape)}; give ({wide_t},)."
            )
    return of_level


def level_list(name: str, value: Any, maps: Sequence[Tensor]) -> None:
    """A list with one tensor a level of ``maps``, on their device."""
    if isinstance(value, Tensor) or len(value) != len(maps):
        raise ValueError(f"{name} must be a list with one tensor for each of {len(maps)} levels.")
    for level, (v, m) in enumerate(zip(value, maps, strict=True)):
        floating(f"{name}[{level}]", v)
        same_device(f"{name}[{level}]", v, "the feature maps", m)


def attention_weights(
    spatial_weights: Sequence[Tensor] | None,
    channel_weights: Sequence[Tensor] | None,
    distance: str,
    teacher: Sequence[Tensor],
) -> None:
    """Weights (N, H, W) of cells and (N, C_t) of channels, one tensor a level."""
    for name, value, axes in (
        ("spatial_weights", spatial_weights, (0, 2, 3)),
        ("channel_weights", channel_weights, (0, 1)),
    ):
        if value is None:
            continue
        if distance in ("cosine", "pkd"):
            raise ValueError(
                f"distance is {distance!r}, which takes no {name}: it has no term for every cell "
                "and channel; choose mse, l1 or smooth_l1."
            )
        level_list(name, value, teacher)
        for level, (v, t) in enumerate(zip(value, teacher, strict=True)):
            shape = tuple(t.shape[axis] for axis in axes)
            if tuple(v.shape) != shape:
                raise ValueError(f"{name}[{level}] is {tuple(v.shape)}; give {shape}.")


def anchor_shapes(
    anchors: Sequence[Tensor] | None, threshold: float, maps: Sequence[Tensor]
) -> None:
    """(A, 2) widths and heights of the anchors of every level."""
    if anchors is None:
        raise ValueError(
            "anchors is missing; rasterize='fgfi' needs the widths and heights of the detector's "
            "anchors, one (A, 2) tensor a level."
        )
    level_list("anchors", anchors, maps)
    for level, a in enumerate(anchors):
        if a.dim() != 2 or a.shape[1] != 2:
            raise ValueError(f"anchors[{level}] is {tuple(a.shape)}; give (A, 2).")
    if not 0 <= threshold < 1:
        raise ValueError(f"anchor_threshold is {threshold}; give a number from 0 to below 1.")


def feature_imitation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    boxes: Sequence[Tensor] | None,
    strides: Sequence[float] | None,
    ignore_boxes: Sequence[Tensor] | None,
    distance: str,
    foreground_weight: float,
    background_weight: float | None,
    box_weights: str,
    assign_ignore: str,
    rasterize: str,
    anchors: Sequence[Tensor] | None,
    anchor_threshold: float,
    spatial_weights: Sequence[Tensor] | None,
    channel_weights: Sequence[Tensor] | None,
    level_weights: Tensor | Sequence[float] | None,
    adapter: Adapters,
) -> tuple[list[float], float, list[Adapter | None], bool]:
    """Arguments of feature imitation with their defaults resolved.

    Returns:
        tuple: strides ([] without boxes), background_weight, the adapter of each level, and whether
        cells weigh differently.
    """
    paired_pyramids(student, teacher)
    one_of("distance", distance, DISTANCES)
    one_of("box_weights", box_weights, ("none", "area"))
    one_of("assign_ignore", assign_ignore, ("level", "all"))
    one_of("rasterize", rasterize, RASTERIZE_RULES)
    of_level = adapters(adapter, student, teacher)
    for name, given in (("boxes", boxes), ("ignore_boxes", ignore_boxes)):
        if given is not None:
            box_lists(name, given, student[0])
    stride_of_level = []
    if boxes is not None or ignore_boxes is not None:
        stride_of_level = level_strides(strides, len(student))
    if rasterize == "fgfi":
        anchor_shapes(anchors, anchor_threshold, student)
        if box_weights == "area":
            raise ValueError(
                "box_weights is 'area', but rasterize='fgfi' covers no rectangle; choose another "
                "of the two."
            )
    if background_weight is None:
        background_weight = 1.0 if boxes is None else 0.0
    for name, value in (
        ("foreground_weight", foreground_weight),
        ("background_weight", background_weight),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; give a finite number of at least 0.")
    attention_weights(spatial_weights, channel_weights, distance, teacher)
    if level_weights is not None:
        shape = tuple(torch.as_tensor(level_weights).shape)
        if shape != (len(student),):
            raise ValueError(
                f"level_weights has the shape {shape} for {len(student)} levels; "
                "give one number each."
            )
    masked = boxes is not None or ignore_boxes is not None or background_weight == 0
    if masked and distance == "pkd":
        raise ValueError(
            "distance is 'pkd', which standardises whole maps; leave boxes, ignore_boxes and "
            "background_weight out."
        )
    return stride_of_level, float(background_weight), of_level, masked


def bins(output_size: int | tuple[int, int]) -> tuple[int, int]:
    """``output_size`` as (rows, columns)."""
    rows, columns = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    if rows < 1 or columns < 1:
        raise ValueError(f"output_size is {output_size}; give one or two whole numbers above 0.")
    return rows, columns


def same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} is {tuple(a.shape)} and {name_b} is {tuple(b.shape)}; "
            "the shapes must be equal."
        )


def floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        shown = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {shown}; give a floating-point tensor.")


def logits_and_weights(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Arguments of a row-wise loss as lists: (..., K) logits and (...) weights, or [] for none."""
    student = tensors("student_logits", student_logits)
    teacher = tensors("teacher_logits", teacher_logits, like=student)
    for index, logits in enumerate(student):
        if logits.dim() < 1:
            raise ValueError(
                f"student_logits[{index}] is a number; its last axis must be the classes."
            )
        if logits.shape[-1] != student[0].shape[-1]:
            raise ValueError(
                f"student_logits[{index}] has {logits.shape[-1]} classes and student_logits[0] has "
                f"{student[0].shape[-1]}; give logits of the same classes."
            )
    if weights is None:
        return student, teacher, []
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if len(weights) != len(student):
        raise ValueError(
            f"weights has {len(weights)} tensors and student_logits {len(student)}; "
            "give one for each."
        )
    for index, (weight, logits) in enumerate(zip(weights, student, strict=True)):
        if weight.shape != logits.shape[:-1]:
            raise ValueError(
                f"weights[{index}] is {tuple(weight.shape)}; student_logits[{index}] "
                f"{tuple(logits.shape)} make it {tuple(logits.shape[:-1])}, one a row."
            )
        same_device(f"weights[{index}]", weight, "student_logits[0]", student[0])
    return student, teacher, weights


def class_weights(value: Any, logits: Tensor) -> None:
    """(K,) weights of the classes of (..., K) logits, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(logits.shape[-1:]):
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"class_weights is {shown}; give a tensor of shape ({logits.shape[-1]},), one weight a "
            "class."
        )
    same_device("class_weights", value, "student_logits[0]", logits)


def adaptive(
    student_logits: Tensor | Sequence[Tensor],
    teacher_probs: Tensor | Sequence[Tensor],
    gamma: float,
    outer: str,
    ignore: Tensor | Sequence[Tensor] | None,
    normalizer: str | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Arguments of the adaptive distillation loss; the tensors as lists, [] for no ``ignore``."""
    one_of("outer", outer, ("bce", "kl"))
    one_of("normalizer", normalizer, ("theta", None))
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; give a number of at least 0.")
    logits = tensors("student_logits", student_logits)
    probs = tensors("teacher_probs", teacher_probs, like=logits)
    if ignore is None:
        return logits, probs, []
    return logits, probs, tensors("ignore", ignore, like=logits, dtype=torch.bool)


def bounded_deltas(
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    target_deltas: Tensor,
    normalizer: float | Tensor | None,
) -> None:
    """Arguments of the bounded regression loss: three floating (R, D), a number or a 0-d tensor."""
    for name, deltas in (
        ("student_deltas", student_deltas),
        ("teacher_deltas", teacher_deltas),
        ("target_deltas", target_deltas),
    ):
        floating(name, deltas)
        same_shape("student_deltas", student_deltas, name, deltas)
        same_device(name, deltas, "student_deltas", student_deltas)
    if student_deltas.dim() != 2:
        raise ValueError(f"student_deltas is {tuple(student_deltas.shape)}; give (R, D).")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer has the shape {tuple(normalizer.shape)}; give a number or a tensor "
                "without axes."
            )
        same_device("normalizer", normalizer, "student_deltas", student_deltas)


def tensors(
    name: str,
    value: Tensor | Sequence[Tensor],
    like: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """One tensor or a non-empty list of them as a list, with the shapes of ``like``."""
    value = [value] if isinstance(value, Tensor) else list(value)
    if not value:
        raise ValueError(f"{name} is an empty list; give at least one tensor.")
    if like is not None and len(value) != len(like):
        raise ValueError(
            f"{name} has {len(value)} tensors and student_logits {len(like)}; give one for each."
        )
    for index, tensor in enumerate(value):
        if dtype is None:
            floating(f"{name}[{index}]", tensor)
        elif not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            shown = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}[{index}] is {shown}; give {dtype}.")
        if like is not None:
            same_shape(f"{name}[{index}]", tensor, f"student_logits[{index}]", like[index])
        first = value[0] if like is None else like[0]
        same_device(f"{name}[{index}]", tensor, "student_logits[0]", first)
    return value
