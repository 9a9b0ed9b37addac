"""Slim ResNets against torchvision and Detectron2's own builder; library bodies by their shapes."""

import sys
import urllib.error

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from hkd_d2.config import add_hkd_config
from hkd_d2.modeling.backbones import (
    build_slim_resnet_backbone,
    build_slim_resnet_fpn_backbone,
    slice_resnet_state_dict,
)
from hkd_d2.modeling.backbones.norm import group_norm

RES = ["res2", "res3", "res4", "res5"]
RGB = ShapeSpec(channels=3)


def config(depth=18, width=1.0, norm="BN", **keys):
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = RES
    cfg.MODEL.FPN.IN_FEATURES = RES
    cfg.HKD.BACKBONE.WIDTH_MULTIPLIER = width
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def torchvision_resnet(depth, seed=0):
    """A ResNet whose norms are far from the identity, without blowing features up."""
    torch.manual_seed(seed)
    net = torchvision.models.get_model(f"resnet{depth}", weights=None).eval().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return net


def torchvision_features(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    features = {}
    for i in range(1, 5):
        x = getattr(net, f"layer{i}")(x)
        features[f"res{i + 1}"] = x
    return features


# ---------------------------------------------------------------------------- slim ResNets


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", ""])
def test_full_width_is_detectron2s_own(depth, norm):
    cfg = config(depth, norm=norm, MODEL__FPN__NORM=norm)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = norm == "FrozenBN"  # as MSRA's weights need
    ours = build_slim_resnet_fpn_backbone(cfg, RGB)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    stock = build_backbone(cfg)

    def shapes(m):
        return {name: tuple(value.shape) for name, value in m.state_dict().items()}

    def trainable(m):
        return {name: p.requires_grad for name, p in m.named_parameters()}

    assert shapes(ours) == shapes(stock)
    assert trainable(ours) == trainable(stock)
    stock.load_state_dict(ours.state_dict())
    ours.eval(), stock.eval()
    x = torch.rand(1, 3, 64, 64)
    for name, feature in stock(x).items():
        torch.testing.assert_close(ours(x)[name], feature, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_full_slice_gives_torchvisions_features(depth, norm):
    full = torchvision_resnet(depth)
    body = build_slim_resnet_backbone(config(depth, norm=norm), RGB).eval().double()
    body.load_state_dict(slice_resnet_state_dict(full.state_dict(), body), strict=False)
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    expected = torchvision_features(full, x)
    for name, feature in body(x).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", [18, 50])
def test_slice_equals_the_full_network_whose_other_channels_are_dead(depth):
    """Zero scale and shift silence a channel, and |gamma| = 0 is what the cut drops first."""
    full = torchvision_resnet(depth)
    # Per torchvision norm: which channels live, one choice for each residual stream.
    generator = torch.Generator().manual_seed(1)

    def alive(channels):
        return torch.randperm(channels, generator=generator)[: channels // 2]

    stream = alive(64)
    silence = [(full.bn1, stream)]
    last = "bn2" if depth == 18 else "bn3"
    for i in range(1, 5):
        for block in getattr(full, f"layer{i}"):
            if block.downsample is not None:
                stream = alive(block.downsample[1].num_features)
                silence.append((block.downsample[1], stream))
            for name in ("bn1", "bn2", "bn3"):
                if hasattr(block, name):
                    norm = getattr(block, name)
                    silence.append((norm, stream if name == last else alive(norm.num_features)))
    for norm, keep in silence:
        dead = torch.ones(norm.num_features, dtype=torch.bool)
        dead[keep] = False
        norm.weight.data[dead] = 0
        norm.bias.data[dead] = 0

    body = build_slim_resnet_backbone(config(depth, width=0.5), RGB).eval().double()
    body.load_state_dict(slice_resnet_state_dict(full.state_dict(), body), strict=False)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    features = body(x)
    for name, expected in torchvision_features(full, x).items():
        # Channels keep their order; the dead ones of the full network are exactly 0 everywhere.
        living = expected.abs().sum(dim=(0, 2, 3)) > 0
        ours = features[name][:, features[name].abs().sum(dim=(0, 2, 3)) > 0]
        assert 0 < living.sum() <= features[name].shape[1]
        torch.testing.assert_close(ours, expected[:, living], rtol=1e-8, atol=1e-8)


def test_slice_keeps_the_largest_scales_in_order():
    full = torchvision_resnet(18).state_dict()
    # Only res3.0.conv1 is told apart: |gamma| is largest in the even channels.
    full["layer2.0.bn1.weight"] = torch.where(torch.arange(128) % 2 == 0, -2.0, 0.1).double()
    body = build_slim_resnet_backbone(config(18, width=0.5), RGB)
    sliced = slice_resnet_state_dict(full, body)
    assert torch.equal(
        sliced["res3.0.conv1.norm.running_mean"], full["layer2.0.bn1.running_mean"][::2]
    )
    # Stem and res2 have one stream between them, written by bn1 and each block's bn2.
    score = sum(full[n].abs() for n in ("bn1.weight", "layer1.0.bn2.weight", "layer1.1.bn2.weight"))
    keep = sorted(score.tolist(), reverse=True)[31]
    assert torch.equal(sliced["stem.conv1.weight"], full["conv1.weight"][score >= keep])


def test_slice_ties_take_the_lower_index():
    full = {
        name: torch.ones_like(value) if value.dim() == 1 else value
        for name, value in torchvision_resnet(18).state_dict().items()
    }
    body = build_slim_resnet_backbone(config(18, width=0.5), RGB)
    sliced = slice_resnet_state_dict(full, body)
    assert torch.equal(sliced["res5.1.conv2.weight"], full["layer4.1.conv2.weight"][:256, :256])


def test_slice_refuses_what_does_not_fit():
    full = torchvision_resnet(18).state_dict()
    wide = build_slim_resnet_backbone(config(18, width=1.5), RGB)
    with pytest.raises(ValueError, match="has 96 channels and the full-width weights only 64"):
        slice_resnet_state_dict(full, wide)
    deep = build_slim_resnet_backbone(config(34, width=0.25), RGB)
    with pytest.raises(ValueError, match="no layer res2.2.conv"):
        slice_resnet_state_dict(full, deep)


def test_blocks_and_width_set_the_shape():
    cfg = config(18, width=0.75, HKD__BACKBONE__BLOCKS=[1, 1, 2, 1], MODEL__FPN__OUT_CHANNELS=96)
    fpn = build_slim_resnet_fpn_backbone(cfg, RGB)
    assert [len(stage) for stage in fpn.bottom_up.stages] == [1, 1, 2, 1]
    channels = [spec.channels for spec in fpn.bottom_up.output_shape().values()]
    assert channels == [48, 96, 192, 384]
    outputs = fpn(torch.rand(1, 3, 64, 96))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        "p2": (1, 96, 16, 24),
        "p3": (1, 96, 8, 12),
        "p4": (1, 96, 4, 6),
        "p5": (1, 96, 2, 3),
        "p6": (1, 96, 1, 2),
    }
    full = torchvision_resnet(18).state_dict()
    missing = fpn.bottom_up.load_state_dict(slice_resnet_state_dict(full, fpn.bottom_up), False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)


def test_parameters_of_half_width_resnet18_by_hand():
    body = build_slim_resnet_backbone(config(18, width=0.5), RGB)
    # Convolutions: stem 3*32*49 = 4704; res2 4 * 32*32*9 = 36864; each later stage of c channels
    # c/2*c*9 + 3*c*c*9 + c/2*c: 129024+2048 at 64 (18432 + 110592 + 2048 = 131072), four times
    # that at 128, sixteen times at 256: 131072 * 21 = 2752512. Norms, two numbers a channel:
    # stem and res2 5 * 32, then 5 * (64 + 128 + 256): 2 * (160 + 2240) = 4800.
    assert sum(p.numel() for p in body.parameters()) == 4704 + 36864 + 2752512 + 4800


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.RESNETS.DEPTH", 101, "depth 18, 34, 50"),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "ResNet-18 has 64"),
        ("MODEL.RESNETS.NORM", "LayerNorm", "choose one of BN, SyncBN, FrozenBN, GN"),
        ("MODEL.RESNETS.RES5_DILATION", 2, "neither groups, dilation nor deformable"),
        ("HKD.BACKBONE.WIDTH_MULTIPLIER", 0.1, "0.125 is the least"),
        ("HKD.BACKBONE.BLOCKS", [2, 2, 2], "give four numbers"),
        ("HKD.BACKBONE.BLOCKS", [2, 2, 0, 2], "give four numbers"),
        ("MODEL.FPN.IN_FEATURES", ["res2", "c3"], r"body puts out \['res2', 'res3'"),
        ("MODEL.FPN.NORM", "bn", "MODEL.FPN.NORM is 'bn'"),
    ],
)
def test_slim_settings_that_cannot_be_built(key, value, message):
    cfg = config(18)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_slim_resnet_fpn_backbone(cfg, RGB)


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (32, 4), (48, 6), (64, 8), (128, 16), (256, 32), (2048, 32)]
)
def test_group_norm_has_at_least_eight_channels_a_group(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_slim_group_norm_network_trains():
    cfg = config(18, width=0.375, norm="GN", MODEL__FPN__NORM="GN", MODEL__FPN__OUT_CHANNELS=40)
    fpn = build_slim_resnet_fpn_backbone(cfg, RGB)
    sum(out.square().sum() for out in fpn(torch.rand(1, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fpn.parameters())
    assert fpn.bottom_up.stem.conv1.norm.num_groups == 3  # 24 channels


# ---------------------------------------------------------------------------- pretrained weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty download cache and no network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_pretrained_slim_resnet_is_cut_from_the_cached_file(cache, norm):
    full = torchvision_resnet(18).float().state_dict()
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    torch.save(full, cache / weights.url.rpartition("/")[2])
    cfg = config(18, width=0.5, norm=norm, HKD__BACKBONE__PRETRAINED=True)
    body = build_slim_resnet_backbone(cfg, RGB)
    for name, value in slice_resnet_state_dict(full, body).items():
        assert torch.equal(body.state_dict()[name], value)


@pytest.mark.parametrize("body", ["torchvision/resnet18", "slim"])
def test_pretrained_without_network_says_what_to_do(cache, body):
    cfg = config(HKD__BACKBONE__PRETRAINED=True)
    cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    if body != "slim":
        cfg.MODEL.BACKBONE.NAME = "build_library_fpn_backbone"
        cfg.HKD.BACKBONE.BODY = body
    with pytest.raises(FileNotFoundError, match="resnet18-.*no route.*HKD.BACKBONE.PRETRAINED"):
        build_backbone(cfg)
    # A trained detector is built without them.
    cfg.MODEL.WEIGHTS = "output/model_final.pth"
    build_backbone(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.FORMAT", "BGR", "expect INPUT.FORMAT RGB"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], r"MODEL.PIXEL_STD \[58.395, 57.12, 57.375\]"),
        ("MODEL.RESNETS.NORM", "GN", "need MODEL.RESNETS.NORM BN, SyncBN or FrozenBN"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1 to False"),
    ],
)
def test_pretrained_weights_need_their_own_settings(cache, key, value, message):
    cfg = config(50, HKD__BACKBONE__PRETRAINED=True)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_slim_resnet_backbone(cfg, RGB)


# ---------------------------------------------------------------------------- library bodies


def library(body, norm="BN", **keys):
    cfg = config(norm=norm, HKD__BACKBONE__BODY=body, **keys)
    cfg.MODEL.BACKBONE.NAME = "build_library_fpn_backbone"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


# Parameters of the part before the classifier: the published totals less the classifier.
# MobileNetV3-Large: 5483032 - (960 * 1280 + 1280 + 1280 * 1000 + 1000) = 2971952, and so on.
@pytest.mark.parametrize(
    ("body", "parameters", "channels"),
    [
        ("torchvision/mobilenet_v3_large", 2971952, [24, 40, 112, 960]),
        ("torchvision/mobilenet_v3_small", 927008, [16, 24, 48, 576]),
        ("torchvision/efficientnet_b0", 4007548, [24, 40, 112, 1280]),
        ("torchvision/resnet18", 11689512 - 513000, [64, 128, 256, 512]),
        ("timm/mobilenetv3_large_100", 2971952, [24, 40, 112, 960]),
        ("timm/tf_efficientnet_lite0", None, [24, 40, 112, 320]),
    ],
)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_library_bodies(body, parameters, channels, norm):
    if body.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    fpn = build_backbone(library(body, norm)).eval()
    shapes = fpn.bottom_up.output_shape()
    assert [spec.channels for spec in shapes.values()] == channels
    assert [spec.stride for spec in shapes.values()] == [4, 8, 16, 32]
    if norm == "BN" and parameters:
        assert sum(p.numel() for p in fpn.bottom_up.parameters()) == parameters
    outputs = fpn(torch.rand(1, 3, 64, 96))
    assert [tuple(out.shape[2:]) for out in outputs.values()] == [
        (16, 24), (8, 12), (4, 6), (2, 3), (1, 2)
    ]  # fmt: skip
    assert list(outputs) == ["p2", "p3", "p4", "p5", "p6"]
    kinds = {"BN": "BatchNorm", "FrozenBN": "FrozenBatchNorm", "SyncBN": "SyncBatchNorm"}
    norms = {type(m).__name__ for m in fpn.modules() if "BatchNorm" in type(m).__name__}
    assert norms and all(name.startswith(kinds[norm]) for name in norms)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_torchvision_body_computes_the_librarys_features(norm):
    """The cut loses no module, and frozen norms keep epsilon and statistics."""
    torch.manual_seed(0)
    body = build_backbone(library("torchvision/mobilenet_v3_small", norm)).bottom_up.eval()
    stock = torchvision.models.mobilenet_v3_small(weights=None).eval()
    values = [v for n, v in body.state_dict().items() if not n.endswith("num_batches_tracked")]
    entries = [
        v for n, v in stock.features.state_dict().items() if not n.endswith("num_batches_tracked")
    ]
    for value, entry in zip(values, entries, strict=True):
        entry.copy_(value)
    x = torch.rand(1, 3, 64, 64)
    # Behind these modules of the row the stride is 4, 8, 16, 32 (arXiv 1905.02244, table 2).
    features = body(x).values()
    for index, feature in zip((1, 3, 8, 12), features, strict=True):
        torch.testing.assert_close(feature, stock.features[: index + 1](x), atol=1e-5, rtol=1e-4)


def test_library_body_starts_untouched_and_in_training_mode():
    body = build_backbone(library("torchvision/mobilenet_v3_small"))
    assert all(module.training for module in body.modules())
    tracked = [v for n, v in body.state_dict().items() if n.endswith("num_batches_tracked")]
    assert tracked and not any(tracked)


def test_pretrained_library_body_is_the_cached_file(cache):
    stock = torchvision.models.mobilenet_v3_small(weights=None)
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    torch.save(stock.state_dict(), cache / weights.url.rpartition("/")[2])
    cfg = library("torchvision/mobilenet_v3_small", HKD__BACKBONE__PRETRAINED=True)
    body = build_backbone(cfg).bottom_up
    values = list(body.state_dict().values())
    entries = list(stock.features.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(values, entries, strict=True))


def test_pretrained_timm_body_wants_its_own_pixels():
    pytest.importorskip("timm")
    # tf_efficientnet_lite0 was trained with mean and deviation 0.5: 127.5 of 255.
    cfg = library("timm/tf_efficientnet_lite0", HKD__BACKBONE__PRETRAINED=True)
    with pytest.raises(ValueError, match=r"MODEL.PIXEL_MEAN \[127.5, 127.5, 127.5\]"):
        build_backbone(cfg)


def test_pretrained_timm_body_without_network(monkeypatch):
    timm = pytest.importorskip("timm")
    build = timm.create_model

    def no_network(name, pretrained, **options):
        if pretrained:
            raise OSError("no route to host")
        return build(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    cfg = library("timm/mobilenetv3_large_100", HKD__BACKBONE__PRETRAINED=True)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = (
        [255 * v for v in row]
        for row in (
            timm.get_pretrained_cfg("mobilenetv3_large_100").mean,
            timm.get_pretrained_cfg("mobilenetv3_large_100").std,
        )
    )
    with pytest.raises(FileNotFoundError, match="could not be had .no route to host"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mobilenet_v3_large", "give torchvision/<model> or timm/<model>"),
        ("torchvision/", "give torchvision/<model> or timm/<model>"),
        ("torchvision/mobilenet_v9", "which torchvision .* does not have"),
        ("torchvision/swin_t", "not a row of modules with maps at strides 4, 8, 16 and 32"),
        ("torchvision/alexnet", "not a row of modules with maps at strides 4, 8, 16 and 32"),
        ("timm/mobilenet_v9", "which timm .* does not have"),
        ("timm/test_vit", "gives maps of shape"),
    ],
)
def test_library_bodies_that_cannot_be_built(body, message):
    if body.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        build_backbone(library(body))


def test_library_body_settings():
    with pytest.raises(ValueError, match="library bodies train whole: set 0"):
        build_backbone(library("torchvision/resnet18", MODEL__BACKBONE__FREEZE_AT=2))
    with pytest.raises(ValueError, match="a library body has batch norms"):
        build_backbone(library("torchvision/resnet18", norm="GN"))


def test_missing_timm_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm is not installed: run pip install timm"):
        build_backbone(library("timm/mobilenetv3_large_100"))
