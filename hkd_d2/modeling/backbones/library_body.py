"""Bodies of torchvision and timm under Detectron2's FPN, named by ``HKD.BACKBONE.BODY``."""

import itertools

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import nn

from hkd_d2.modeling.backbones.fpn import attach_fpn
from hkd_d2.modeling.backbones.pretrained import (
    load_torchvision_weights,
    require_pixels,
    wants_pretrained,
)

_STRIDES = (4, 8, 16, 32)
# Height and width of the image that strides are measured on; not square, so that a channels-last
# output is not mistaken for a map.
_BLANK = (64, 96)


class LibraryBody(Backbone):
    """A library's network cut into the stages whose outputs lie at strides 4, 8, 16 and 32.

    Features are named res2 to res5 as Detectron2's ResNets name theirs, each
    (N, channels, H / stride, W / stride) for H and W that are multiples of 32.
    """

    def __init__(self, network: nn.Module, name: str):
        """
        Args:
            network: maps (N, 3, H, W) to the four maps, finest first.
            name: what the config calls it, for the message.

        Raises:
            ValueError: the maps are not four of these strides with channels second.
        """
        super().__init__()
        self.network = network
        try:
            maps = _on_blank_image(network)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"{name} takes no image of just any size ({error}).") from error
        if [_stride(x) for x in maps] != list(_STRIDES):
            raise ValueError(
                f"{name} gives maps of shape {[tuple(x.shape) for x in maps]} for an image of "
                f"{_BLANK}; a body needs (N, channels, height, width) at strides 4, 8, 16 and 32."
            )
        self._out_features = [f"res{i}" for i in range(2, 6)]
        self._out_feature_strides = dict(zip(self._out_features, _STRIDES, strict=True))
        self._out_feature_channels = {
            key: x.shape[1] for key, x in zip(self._out_features, maps, strict=True)
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._out_features, self.network(x), strict=True))


class _Stages(nn.ModuleList):
    """Modules in a row; the output of each is kept."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for stage in self:
            x = stage(x)
            outputs.append(x)
        return outputs


@BACKBONE_REGISTRY.register()
def build_library_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> LibraryBody:
    """The body that ``HKD.BACKBONE.BODY`` names: ``torchvision/<model>`` or ``timm/<model>``.

    From torchvision come the models with a sequential ``features`` (MobileNet, EfficientNet,
    ConvNeXt, VGG, ...) and the ResNets; from timm those with ``features_only``. Each feature is the
    last output at its stride. Reads ``MODEL.RESNETS.NORM`` for what becomes of the batch norms: BN
    keeps them, SyncBN shares statistics between processes, FrozenBN fixes them.

    Args:
        cfg: config of the detector.
        input_shape: channels of the image; 3.

    Raises:
        ValueError: an unknown or unsuitable body, or a config that does not suit it.
        ImportError: timm is needed and not installed.
        FileNotFoundError: the pretrained weights are not to be had.
    """
    body = cfg.HKD.BACKBONE.BODY
    norm = cfg.MODEL.RESNETS.NORM
    library, _, name = body.partition("/")
    if library not in ("torchvision", "timm") or not name:
        raise ValueError(
            f"HKD.BACKBONE.BODY is {body!r}; give torchvision/<model> or timm/<model>."
        )
    if norm not in ("BN", "SyncBN", "FrozenBN"):
        raise ValueError(
            f"MODEL.RESNETS.NORM is {norm!r}; a library body has batch norms, so choose BN, SyncBN "
            "or FrozenBN."
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}; library bodies train "
            "whole: set 0."
        )
    if input_shape.channels != 3:
        raise ValueError(f"{body} takes images of 3 channels and not {input_shape.channels}.")
    build = _torchvision_body if library == "torchvision" else _timm_body
    return build(cfg, name, norm)


@BACKBONE_REGISTRY.register()
def build_library_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """:func:`build_library_backbone` under Detectron2's FPN: p2 to p6."""
    return attach_fpn(cfg, build_library_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_library_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """:func:`build_library_backbone` under an FPN for one-stage detectors: p3 to p7."""
    return attach_fpn(cfg, build_library_backbone(cfg, input_shape), one_stage=True)


def _torchvision_body(cfg: CfgNode, name: str, norm: str) -> LibraryBody:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"HKD.BACKBONE.BODY names {name!r}, which torchvision {torchvision.__version__} does "
            "not have; torchvision.models.list_models(module=torchvision.models) lists them."
        )
    model = torchvision.models.get_model(name, weights=None)
    if wants_pretrained(cfg):
        require_pixels(cfg, f"torchvision/{name}")
        model.load_state_dict(load_torchvision_weights(name))
    stages = _cut(model, name)
    if norm == "SyncBN":
        stages = nn.SyncBatchNorm.convert_sync_batchnorm(stages)
    elif norm == "FrozenBN":
        stages = FrozenBatchNorm2d.convert_frozen_batchnorm(stages)
    return LibraryBody(stages, f"torchvision/{name}")


def _cut(model: nn.Module, name: str) -> _Stages:
    """A torchvision classifier without its head, cut behind the last module at each stride."""
    if isinstance(getattr(model, "features", None), nn.Sequential):
        row = _Stages(model.features)
    elif hasattr(model, "layer4"):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        row = _Stages([stem, model.layer1, model.layer2, model.layer3, model.layer4])
    else:
        row = _Stages()
    ends = {_stride(x): i + 1 for i, x in enumerate(_on_blank_image(row))}
    if not set(_STRIDES) <= ends.keys():
        raise ValueError(
            f"torchvision/{name} is not a row of modules with maps at strides 4, 8, 16 and 32; "
            "choose a MobileNet, EfficientNet, ConvNeXt, ResNet or a body of timm."
        )
    cuts = [0] + [ends[stride] for stride in _STRIDES]
    return _Stages(nn.Sequential(*row[a:b]) for a, b in itertools.pairwise(cuts))


def _on_blank_image(network: nn.Module) -> list[torch.Tensor]:
    """Outputs of ``network`` for an image of zeros, which leaves no trace in running statistics."""
    network.eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, 3, *_BLANK))
    network.train()
    return outputs


def _stride(x: torch.Tensor) -> int:
    """Stride of the map ``x`` that the blank image gave; 0 for anything that is not a map."""
    if x.dim() != 4 or 0 in x.shape or x.shape[2] * _BLANK[1] != x.shape[3] * _BLANK[0]:
        return 0
    return _BLANK[0] // x.shape[2]


def _timm_body(cfg: CfgNode, name: str, norm: str) -> LibraryBody:
    try:
        import timm
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
    except ImportError as error:
        raise ImportError(
            f"HKD.BACKBONE.BODY is timm/{name} and timm is not installed: run pip install timm, "
            "or take a body of torchvision."
        ) from error
    if not timm.is_model(name):
        raise ValueError(
            f"HKD.BACKBONE.BODY names {name!r}, which timm {timm.__version__} does not have; "
            "timm.list_models() lists them."
        )
    # The four coarsest maps; a body whose finest is at stride 2 puts that one out as well.
    options = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    try:
        network = timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, ValueError, AssertionError, AttributeError, IndexError) as error:
        raise ValueError(f"timm/{name} gives no four feature maps ({error}).") from error
    if wants_pretrained(cfg):
        about = timm.get_pretrained_cfg(name)
        mean, std = ([255 * v for v in row] for row in (about.mean, about.std))
        require_pixels(cfg, f"timm/{name}", mean, std)
        try:
            network = timm.create_model(name, pretrained=True, **options)
        # Which error says "no network" is up to the version of the download library.
        except Exception as error:
            raise FileNotFoundError(
                f"The ImageNet weights of timm/{name} could not be had ({error}): fill timm's "
                "cache where there is a network, or set HKD.BACKBONE.PRETRAINED to False."
            ) from error
    if norm == "SyncBN":
        network = convert_sync_batchnorm(network)
    elif norm == "FrozenBN":
        network = freeze_batch_norm_2d(network)
    return LibraryBody(network, f"timm/{name}")
