"""Classifiers with auxiliary branches: slim ResNets of the detectors, wide ResNets for CIFAR."""

import copy
import re

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from torch import nn

from hkd_d2.configuration.keys import default_config
from hkd_d2.modeling.backbones.slim_resnet import build_slim_resnet_backbone

TURNS = 4  # of 90 degrees, the upright image among them


class AugmentedClassifier(nn.Module):
    """A body, its classifier, and a branch behind every stage for class and rotation together.

    A branch has copies of the remaining stages, behind the last stage one more like it with stride
    1, and a linear layer to 4 N joint labels 4 c + j, for N classes and j quarter turns
    (winycg/HSAKD, 28c8dc2). Of its weights only the layout is the stages'.

    Args:
        body: with ``stem``, ``stages`` (list of nn.Sequential) and, for what comes
            before the average over cells, ``finish``; a Detectron2 ResNet needs none.
        num_classes: N.
    """

    def __init__(self, body: nn.Module, num_classes: int):
        super().__init__()
        self.body = body
        finish = getattr(body, "finish", nn.Identity())
        channels = body.stages[-1][-1].out_channels
        self.classifier = nn.Linear(channels, num_classes)
        self.branches = nn.ModuleList()
        for i in range(len(body.stages)):
            later = body.stages[i + 1 :] or [body.one_more_stage()]
            branch = nn.Sequential(*copy.deepcopy(list(later)), copy.deepcopy(finish))
            branch.apply(start_anew)
            branch.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
            branch.append(nn.Linear(channels, TURNS * num_classes))
            self.branches.append(branch)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (B, N) alone, of images (B, 3, H, W), normalised."""
        x = self.body.stem(images)
        for stage in self.body.stages:
            x = stage(x)
        return self.finish(x)

    def forward(self, images: torch.Tensor, detach: bool = False):
        """Class logits (B, N), and joint logits (B, 4 N) of every branch, first stage first.

        Args:
            images: (B, 3, H, W), normalised.
            detach: stop the branches' gradients before the body.
        """
        x, joint = self.body.stem(images), []
        for stage, branch in zip(self.body.stages, self.branches, strict=True):
            x = stage(x)
            joint.append(branch(x.detach() if detach else x))
        return self.finish(x), joint

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body.finish(x) if hasattr(self.body, "finish") else x
        return self.classifier(x.mean((2, 3)))


def build_classifier(name: str, num_classes: int) -> AugmentedClassifier:
    """Build ``resnet18``, ``resnet34``, ``resnet50``, ``resnet18-0.5`` (of half the width, as
    ``HKD.BACKBONE.WIDTH_MULTIPLIER``), or ``wrn-40-2`` (depth 40, width 2).

    Raises:
        ValueError: another name.
    """
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return AugmentedClassifier(WideResNet(*map(int, found.groups())), num_classes)
    if found := re.fullmatch(r"resnet(18|34|50)(?:-([\d.]+))?", name):
        return AugmentedClassifier(SlimResNet(int(found[1]), float(found[2] or 1)), num_classes)
    raise ValueError(
        f"'{name}' is no network for pre-training; give a name like resnet34, resnet18-0.5 or "
        "wrn-40-2."
    )


class SlimResNet(nn.Module):
    """The body of a detector, :func:`build_slim_resnet_backbone` with batch norms.

    Attributes:
        resnet (ResNet): as a detector has it at ``backbone.bottom_up``.
    """

    def __init__(self, depth: int, width: float):
        super().__init__()
        cfg = default_config()
        cfg.MODEL.RESNETS.DEPTH, cfg.HKD.BACKBONE.WIDTH_MULTIPLIER = depth, width
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth == 50 else 64
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = "BN", False
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        self.resnet = build_slim_resnet_backbone(cfg, ShapeSpec(channels=3))

    @property
    def stem(self):
        return self.resnet.stem

    @property
    def stages(self):
        return self.resnet.stages

    def one_more_stage(self) -> nn.Sequential:
        """A stage as the last one, with as many channels in as out and stride 1."""
        last = list(self.stages[-1])
        # A block behind the first of a stage keeps size and channels.
        kind, channels = type(last[-1]), last[-1].out_channels
        options = {"bottleneck_channels": last[-1].conv1.out_channels}
        return nn.Sequential(
            *ResNet.make_stage(
                kind,
                len(last),
                in_channels=channels,
                out_channels=channels,
                norm="BN",
                **(options if hasattr(last[-1], "conv3") else {}),
            )
        )


class WideResNet(nn.Module):
    """The wide ResNet of CIFAR (arXiv 1605.07146): three stages of 16 k, 32 k and 64 k channels.

    Args:
        depth: 6 n + 4 layers, for n blocks a stage.
        width: k.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int, width: int):
        super().__init__()
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise ValueError(
                f"A wide ResNet of depth {depth} and width {width} cannot be built; the depth is "
                "6 n + 4, such as 16 or 40, and the width at least 1."
            )
        self.blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        widths = [16, *(16 * width * 2**i for i in range(3))]
        self.stages = nn.ModuleList(
            self.make_stage(*widths[i : i + 2], stride=2 if i else 1) for i in range(3)
        )
        self.finish = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.apply(start_anew)

    def make_stage(self, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        blocks = [PreActivatedBlock(channels_in, channels, stride)]
        blocks += [PreActivatedBlock(channels, channels, 1) for _ in range(self.blocks - 1)]
        return nn.Sequential(*blocks)

    def one_more_stage(self) -> nn.Sequential:
        """A stage as the last one, with as many channels in as out and stride 1."""
        channels = self.stages[-1][-1].out_channels
        return self.make_stage(channels, channels, 1)


class PreActivatedBlock(nn.Module):
    """Residual block: two 3x3 convolutions, each behind a batch norm and a ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.out_channels = channels
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.norm1(x))
        # Where the shape changes, the shortcut reads what the convolutions read.
        residual = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + residual


def start_anew(module: nn.Module) -> None:
    """Draw a convolution's weights (He et al.'s, by the outputs), reset a norm."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
