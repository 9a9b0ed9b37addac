"""Argument checks that the references and the compiled operators share.

They look at shapes and types only, never at values, so that none waits for a GPU.
"""

import torch


def one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(str, known))}.")


def positive(name, value):
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a number above 0.")


def loss_dtype(tensor):
    """float64 for a float64 tensor, float32 for float32, float16 and bfloat16."""
    return torch.promote_types(tensor.dtype, torch.float32)


def same_device(name, tensor, expected_name, expected):
    if tensor.device != expected.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {expected_name} on {expected.device}; "
            "move them to one device."
        )


def pyramid(name, maps):
    """A non-empty list of floating (N, C_l, H_l, W_l), N and the device alike."""
    if isinstance(maps, torch.Tensor) or not isinstance(maps, (list, tuple)) or not maps:
        raise ValueError(f"{name} must be a non-empty list of (N, C, H, W) tensors, one a level.")
    for level, m in enumerate(maps):
        if not isinstance(m, torch.Tensor) or m.dim() != 4 or not m.is_floating_point():
            shown = tuple(m.shape) if isinstance(m, torch.Tensor) else type(m).__name__
            raise ValueError(
                f"{name}[{level}] is {shown}; give a floating tensor of shape (N, C, H, W)."
            )
        if m.shape[0] != maps[0].shape[0]:
            raise ValueError(
                f"{name}[{level}] has {m.shape[0]} images and {name}[0] has {maps[0].shape[0]}; "
                "give every level of the same batch."
            )
        same_device(f"{name}[{level}]", m, f"{name}[0]", maps[0])


def same_channels(name, maps):
    """All levels of one width, as pooling from several levels needs."""
    for level, m in enumerate(maps):
        if m.shape[1] != maps[0].shape[1]:
            raise ValueError(
                f"{name}[{level}] has {m.shape[1]} channels and {name}[0] has {maps[0].shape[1]}; "
                "boxes of all levels are pooled into one tensor, so give levels of one width."
            )


def paired_pyramids(student, teacher):
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


def level_strides(strides, num_levels):
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


def box_lists(name, boxes, features):
    """A list over the images of ``features`` of (R_n, 4) float32 or float64 boxes."""
    num_images = features.shape[0]
    if isinstance(boxes, torch.Tensor) or not isinstance(boxes, (list, tuple)):
        raise ValueError(f"{name} must be a list of (R, 4) tensors, one an image.")
    if len(boxes) != num_images:
        raise ValueError(
            f"{name} has {len(boxes)} entries for {num_images} images; give one tensor an image."
        )
    for image, b in enumerate(boxes):
        if not isinstance(b, torch.Tensor) or b.dim() != 2 or b.shape[1] != 4:
            shown = tuple(b.shape) if isinstance(b, torch.Tensor) else type(b).__name__
            raise ValueError(f"{name}[{image}] is {shown}; give a tensor of shape (R, 4).")
        if b.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}[{image}] is {b.dtype}; give float32, which half precision would round by "
                "up to 4 pixels."
            )
        same_device(f"{name}[{image}]", b, "the feature maps", features)


def adapters(adapter, student, teacher):
    """One ``(weight, bias or None)`` or ``None`` a level, from one for all or a list."""
    if adapter is None:
        adapter = [None] * len(student)
    elif len(adapter) and isinstance(adapter[0], torch.Tensor):
        adapter = [adapter] * len(student)
    else:
        adapter = list(adapter)
        if len(adapter) != len(student):
            raise ValueError(
                f"adapter has {len(adapter)} entries for {len(student)} levels; give one "
                "(weight, bias) for all levels, or a list with one (or None) a level."
            )
    for level, (a, s, t) in enumerate(zip(adapter, student, teacher, strict=True)):
        wide_s, wide_t = s.shape[1], t.shape[1]
        if a is None:
            if wide_s != wide_t:
                raise ValueError(
                    f"student[{level}] has {wide_s} channels and teacher[{level}] has {wide_t}; "
                    f"pass adapter=(weight, bias) with a weight of shape ({wide_t}, {wide_s})."
                )
            continue
        weight, bias = a
        if tuple(weight.shape) != (wide_t, wide_s):
            raise ValueError(
                f"The adapter's weight of level {level} is {tuple(weight.shape)}; the channels of "
                f"teacher and student make it ({wide_t}, {wide_s})."
            )
        if bias is not None and tuple(bias.shape) != (wide_t,):
            raise ValueError(
                f"The adapter's bias of level {level} is {tuple(bias.shape)}; give ({wide_t},)."
            )
    return adapter


def bins(output_size):
    """``output_size`` as (rows, columns)."""
    rows, columns = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    if rows < 1 or columns < 1:
        raise ValueError(f"output_size is {output_size}; give one or two whole numbers above 0.")
    return rows, columns


def same_shape(name_a, a, name_b, b):
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} is {tuple(a.shape)} and {name_b} is {tuple(b.shape)}; "
            "the shapes must be equal."
        )


def floating(name, tensor):
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        shown = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {shown}; give a floating-point tensor.")


def logits_and_weights(student_logits, teacher_logits, weights):
    """Arguments of a row-wise loss: (..., K) logits and (...) weights."""
    floating("student_logits", student_logits)
    floating("teacher_logits", teacher_logits)
    same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    if student_logits.dim() < 1:
        raise ValueError("student_logits is a number; its last axis must be the classes.")
    same_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    if weights is not None and weights.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"weights is {tuple(weights.shape)}; student_logits {tuple(student_logits.shape)} make "
            f"it {tuple(student_logits.shape[:-1])}, one a row."
        )


def tensors(name, value, like=None, dtype=None):
    """One tensor or a non-empty list of them as a list, with the shapes of ``like``."""
    value = [value] if isinstance(value, torch.Tensor) else list(value)
    if not value:
        raise ValueError(f"{name} is an empty list; give at least one tensor.")
    if like is not None and len(value) != len(like):
        raise ValueError(
            f"{name} has {len(value)} tensors and student_logits {len(like)}; give one for each."
        )
    for index, tensor in enumerate(value):
        if dtype is None:
            floating(f"{name}[{index}]", tensor)
        elif tensor.dtype != dtype:
            raise ValueError(f"{name}[{index}] is {tensor.dtype}; give {dtype}.")
        if like is not None:
            same_shape(f"{name}[{index}]", tensor, f"student_logits[{index}]", like[index])
    return value
