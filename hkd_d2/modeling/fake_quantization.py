"""Training under INT8's rounding, so that a student stays what it is when it is quantised."""

import torch
from torch import Tensor, nn

# What these give is decoded into scores and boxes, where a step of a 255th of the range moves a
# box; they are a small part of the work. Names of Detectron2's modules; they stay in float.
PREDICTORS = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred", "ctrness")


def is_predictor(name: str) -> bool:
    """Whether the name of a module or of its weight is that of one of :data:`PREDICTORS`."""
    return bool(set(name.split(".")) & set(PREDICTORS))


def fake_quantize(detector: nn.Module) -> list[str]:
    """Make a detector compute in INT8's steps while it trains.

    In training mode every convolution and fully connected layer but the predictors sees its input
    rounded to 255 steps between the extremes of the batch, and its weight to 255 steps for each
    output channel: the arithmetic of :mod:`hkd_d2.export.quantize`. Gradients pass straight through
    (Jacob et al., arXiv 1712.05877). Nothing is added to the state: parameters, buffers and the
    checkpoint's keys are what they were, and in eval mode the detector computes in float.

    Args:
        detector: changed in place, by hooks.

    Returns:
        list[str]: names of the layers that are rounded.
    """
    names = []
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_predictor(name):
            module.register_forward_pre_hook(_round)
            module.register_forward_hook(_restore, always_call=True)
            names.append(name)
    return names


def round_activation(x: Tensor) -> Tensor:
    """float (...) rounded to the 255 steps between its extremes, zero being one of them."""
    with torch.no_grad():
        low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
        scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
        zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def round_weight(weight: Tensor) -> Tensor:
    """float (C_out, ...) rounded to multiples of its channel's largest absolute value / 127."""
    with torch.no_grad():
        scale = weight.detach().flatten(1).abs().amax(1).float() / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).eps)
        zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _round(module, inputs):
    if not module.training:
        return None
    # An attribute of the instance comes before the parameter, which stays where it is: names in the
    # state and in the optimizer do not change, as they would under a parametrisation.
    module.__dict__["weight"] = round_weight(module._parameters["weight"])
    return (round_activation(inputs[0]), *inputs[1:])


def _restore(module, inputs, output):
    module.__dict__.pop("weight", None)
