"""ResNets of Detectron2's own blocks with a factor on every channel count.

Detectron2's builder has fixed widths for ResNet-18 and 34. Here every channel count of the stem and
the stages is multiplied by ``HKD.BACKBONE.WIDTH_MULTIPLIER``, rounded to a multiple of 8, and
``HKD.BACKBONE.BLOCKS`` may make the stages shorter. At width 1.0 the network is Detectron2's to the
last parameter name, so that the weights published for it load.
"""

import logging
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from hkd_d2.modeling.backbones.fpn import attach_fpn
from hkd_d2.modeling.backbones.norm import resolve_norm
from hkd_d2.modeling.backbones.pretrained import (
    load_torchvision_weights,
    require_pixels,
    wants_pretrained,
)

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_BATCH_NORMS = ("BN", "SyncBN", "FrozenBN")


@BACKBONE_REGISTRY.register()
def build_slim_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet-18, 34 or 50 of ``HKD.BACKBONE.WIDTH_MULTIPLIER`` times the usual channels.

    Reads ``MODEL.RESNETS``: DEPTH, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS and, for bottlenecks,
    WIDTH_PER_GROUP (all three before the multiplier), NORM, STRIDE_IN_1X1 and OUT_FEATURES;
    ``MODEL.BACKBONE.FREEZE_AT``; ``HKD.BACKBONE``: WIDTH_MULTIPLIER, BLOCKS and PRETRAINED. Groups,
    dilation and deformable convolutions are for Detectron2's own builder.

    Args:
        cfg: config of the detector.
        input_shape: channels of the image.

    Returns:
        ResNet: res2 to res5, as far as OUT_FEATURES asks, at strides 4 to 32.

    Raises:
        ValueError: a depth, width, number of blocks or norm that cannot be built, or a config that
            does not suit the pretrained weights.
        FileNotFoundError: the pretrained weights are not to be had.
    """
    resnets, ours = cfg.MODEL.RESNETS, cfg.HKD.BACKBONE
    depth, width = resnets.DEPTH, ours.WIDTH_MULTIPLIER
    _check(cfg)
    # A full-width network keeps Detectron2's GN, whose published weights have 32 groups.
    norm = resolve_norm(resnets.NORM, "MODEL.RESNETS.NORM")
    if width == 1:
        norm = resnets.NORM

    stem_channels = _scale(resnets.STEM_OUT_CHANNELS, width)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=stem_channels, norm=norm)
    stages, in_channels = [], stem_channels
    for i, num_blocks in enumerate(ours.BLOCKS or _BLOCKS[depth]):
        out_channels = _scale(resnets.RES2_OUT_CHANNELS * 2**i, width)
        if depth == 50:
            kwargs = {
                "block_class": BottleneckBlock,
                "bottleneck_channels": _scale(resnets.WIDTH_PER_GROUP * 2**i, width),
                "stride_in_1x1": resnets.STRIDE_IN_1X1,
            }
        else:
            kwargs = {"block_class": BasicBlock}
        stages.append(
            ResNet.make_stage(
                num_blocks=num_blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
                **kwargs,
            )
        )
        in_channels = out_channels
    body = ResNet(stem, stages, out_features=resnets.OUT_FEATURES)
    if wants_pretrained(cfg):
        _load_imagenet(cfg, body)
    return body.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """:func:`build_slim_resnet_backbone` under Detectron2's FPN: p2 to p6.

    The FPN has ``MODEL.FPN.OUT_CHANNELS`` channels; the multiplier does not touch it.
    """
    return attach_fpn(cfg, build_slim_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_slim_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """:func:`build_slim_resnet_backbone` under an FPN for one-stage detectors: p3 to p7."""
    return attach_fpn(cfg, build_slim_resnet_backbone(cfg, input_shape), one_stage=True)


def slice_resnet_state_dict(
    full: Mapping[str, torch.Tensor], body: ResNet
) -> dict[str, torch.Tensor]:
    """Cut the weights of a slim ResNet out of those of torchvision's full-width one.

    Each convolution keeps, of its output channels, those with the largest batch norm scale |gamma|
    (the magnitude criterion of network slimming, arXiv 1708.06519); the layers that write into one
    residual stream keep the same ones, chosen by the sum of their |gamma|. Ties go to the lower
    index and the order of channels stays. Input channels follow from the layer before. Norms are
    cut alike; behind a layer that has lost inputs their running statistics no longer fit and have
    to be learnt anew. A body with fewer blocks takes the first of each stage; at full width nothing
    is cut.

    Args:
        full: state dict of ``torchvision.models.resnet<depth>`` with torchvision's names (conv1,
            bn1, layer1.0.conv1, downsample); the classifier is ignored.
        body: the slim body, with batch norms.

    Returns:
        dict[str, Tensor]: a value for each entry of ``body.state_dict()`` but num_batches_tracked.

    Raises:
        ValueError: ``full`` lacks a layer of ``body`` or has fewer channels.
    """
    full = {_detectron2_name(name): value for name, value in full.items()}
    widths = {name: m.out_channels for name, m in body.named_modules() if hasattr(m, "norm")}

    def keep(stream: list[str]) -> torch.Tensor:
        missing = [name for name in stream if f"{name}.norm.weight" not in full]
        if missing:
            raise ValueError(
                f"The full-width weights have no layer {missing[0]}: take those of this body's "
                "depth, with a stem as wide as theirs and no more blocks in any stage."
            )
        score = sum(full[f"{name}.norm.weight"].abs() for name in stream)
        width = widths[stream[0]]
        if width > len(score):
            raise ValueError(
                f"The body's {stream[0]} has {width} channels and the full-width weights only "
                f"{len(score)}: nothing can be cut for HKD.BACKBONE.WIDTH_MULTIPLIER above 1."
            )
        return score.argsort(descending=True, stable=True)[:width].sort().values

    # Layer, the stream it reads and the one it writes; a stream is the list of layers that write
    # it, complete once the body has been walked through.
    stream = ["stem.conv1"]
    layers = [("stem.conv1", None, stream)]
    for stage_name, stage in zip(body.stage_names, body.stages, strict=True):
        for i, block in enumerate(stage):
            prefix, inner = f"{stage_name}.{i}", stream
            if block.shortcut is not None:
                stream = [f"{prefix}.shortcut"]
                layers.append((stream[0], inner, stream))
            *first, last = (name for name, _ in block.named_children() if name != "shortcut")
            for name in first:
                own = [f"{prefix}.{name}"]
                layers.append((own[0], inner, own))
                inner = own
            stream.append(f"{prefix}.{last}")
            layers.append((f"{prefix}.{last}", inner, stream))

    sliced = {}
    for name, source, target in layers:
        rows = keep(target)
        weight = full[f"{name}.weight"][rows]
        sliced[f"{name}.weight"] = weight if source is None else weight[:, keep(source)]
        for entry in ("weight", "bias", "running_mean", "running_var"):
            sliced[f"{name}.norm.{entry}"] = full[f"{name}.norm.{entry}"][rows]
    return sliced


def _check(cfg: CfgNode) -> None:
    """One sentence for each setting that cannot be built."""
    resnets, ours = cfg.MODEL.RESNETS, cfg.HKD.BACKBONE
    if resnets.DEPTH not in _BLOCKS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; slim ResNets have depth "
            f"{', '.join(map(str, _BLOCKS))}."
        )
    if resnets.DEPTH < 50 and resnets.RES2_OUT_CHANNELS != 64:
        raise ValueError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; ResNet-"
            f"{resnets.DEPTH} has 64 before the width multiplier."
        )
    # From 8 channels on, twice as many never round to the same multiple of 8.
    if resnets.RES2_OUT_CHANNELS * ours.WIDTH_MULTIPLIER < 8:
        raise ValueError(
            f"HKD.BACKBONE.WIDTH_MULTIPLIER is {ours.WIDTH_MULTIPLIER}, which leaves res2 fewer "
            "than 8 channels; 0.125 is the least for ResNet-18 and 34."
        )
    if ours.BLOCKS and (len(ours.BLOCKS) != 4 or min(ours.BLOCKS) < 1):
        raise ValueError(
            f"HKD.BACKBONE.BLOCKS is {list(ours.BLOCKS)}; give four numbers of at least 1, or []."
        )
    if resnets.NUM_GROUPS != 1 or resnets.RES5_DILATION != 1 or any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "Slim ResNets have neither groups, dilation nor deformable convolutions: set "
            "MODEL.RESNETS.NUM_GROUPS and RES5_DILATION to 1 and DEFORM_ON_PER_STAGE to False, or "
            "take Detectron2's build_resnet_fpn_backbone."
        )


def _scale(channels: int, width: float) -> int:
    """``channels`` times ``width``, to the nearest multiple of 8; exact at width 1."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def _detectron2_name(name: str) -> str:
    """torchvision's name of a ResNet entry in Detectron2's terms."""
    if name.startswith(("conv1.", "bn1.")):
        name = f"stem.{name}"
    for stage in range(1, 5):
        name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    for i in (1, 2, 3):
        name = name.replace(f"bn{i}.", f"conv{i}.norm.")
    return name


def _load_imagenet(cfg: CfgNode, body: ResNet) -> None:
    """Fill ``body`` with the channels cut from torchvision's ImageNet ResNet of its depth."""
    resnets = cfg.MODEL.RESNETS
    require_pixels(cfg, f"torchvision's ResNet-{resnets.DEPTH}")
    if resnets.NORM not in _BATCH_NORMS:
        raise ValueError(
            f"The pretrained weights need MODEL.RESNETS.NORM BN, SyncBN or FrozenBN instead of "
            f"{resnets.NORM!r}: set one, or HKD.BACKBONE.PRETRAINED to False."
        )
    if resnets.DEPTH == 50 and resnets.STRIDE_IN_1X1:
        raise ValueError(
            "torchvision's ResNet-50 strides in the 3x3 convolution: set "
            "MODEL.RESNETS.STRIDE_IN_1X1 to False, or HKD.BACKBONE.PRETRAINED to False."
        )
    if cfg.HKD.BACKBONE.WIDTH_MULTIPLIER < 1 and (
        resnets.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 1
    ):
        logging.getLogger(__name__).warning(
            "The running statistics of a sliced ResNet do not fit and are frozen here: "
            "MODEL.RESNETS.NORM BN or SyncBN with MODEL.BACKBONE.FREEZE_AT 0 learns them anew."
        )
    # The first version is what Detectron2's torchvision/R-50.pkl was made of, so that teacher and
    # student start alike.
    full = load_torchvision_weights(f"resnet{resnets.DEPTH}", "IMAGENET1K_V1")
    missing, unexpected = body.load_state_dict(slice_resnet_state_dict(full, body), strict=False)
    assert not unexpected and all(n.endswith("num_batches_tracked") for n in missing), missing
