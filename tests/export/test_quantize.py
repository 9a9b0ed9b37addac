"""INT8 files: which layers, which numbers, and what they still find."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import hkd_d2
from helpers.rules import rule
from helpers.small_detectors import one_stage_config, save_teacher, small_config
from hkd_d2.export.formats import Shape, export
from hkd_d2.export.quantize import find_layers, quantize
from hkd_d2.inference.torch_backend import build_detector
from hkd_d2.modeling.fake_quantization import is_predictor, round_activation, round_weight

pytestmark = rule("An INT8 file has the weights that training under its rounding saw")

STEM = "backbone.bottom_up.stem.conv1.weight"
PREDICT = {
    "rpn_head.objectness_logits.weight",
    "rpn_head.anchor_deltas.weight",
    "predictors.0.cls_score.weight",
    "predictors.0.bbox_pred.weight",
}


def images(count=6):
    """Blocks of colour, so that neighbours are alike as in pictures."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    return list(coarse.repeat(8, axis=1).repeat(8, axis=2))


def exported(cfg, folder, shape=Shape()):  # noqa: B008
    save_teacher(cfg, folder, "model_final")
    model, metadata = build_detector(folder / "model_final.pth", folder / "model_final.yaml")
    export(model, metadata, folder / "model.onnx", "onnx", shape)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A detector, its ONNX and INT8 files, and the record of the latter."""
    folder = tmp_path_factory.mktemp("int8")
    model = exported(small_config(), folder)
    record = quantize(folder / "model.onnx", images(), folder / "int8.onnx", data="blocks")
    return model, folder, record


def rounded_weights(path):
    """Dequantised weights of a file, by the name of the float weight."""
    graph = onnx.load(path).graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    return {
        name.removesuffix("_quantized"): (value, values[name.removesuffix("_quantized") + "_scale"])
        for name, value in values.items()
        if name.endswith(".weight_quantized")
    }


def test_the_record_and_the_file_agree(pair):
    _, folder, record = pair
    assert (record["data"], record["images"], record["min_sqnr"]) == ("blocks", 6, 20.0)
    assert set(record["float"]) >= PREDICT and not set(record["int8"]) & set(record["float"])
    weights = rounded_weights(folder / "int8.onnx")
    assert set(weights) == set(record["int8"])
    assert all(value.dtype == np.int8 for value, _ in weights.values())
    metadata = hkd_d2.load_detector(folder / "int8.onnx").metadata
    plain = hkd_d2.load_detector(folder / "model.onnx").metadata
    assert metadata == plain | {"quantization": record}
    assert not [p.name for p in folder.iterdir() if p.name.startswith("part-")]
    assert (folder / "int8.onnx").stat().st_size < 0.7 * (folder / "model.onnx").stat().st_size


def test_weights_are_those_of_the_training_under_rounding(pair):
    """PyTorch's rounding in training and onnxruntime's in the file are the same numbers."""
    model, folder, record = pair
    value, scale = rounded_weights(folder / "int8.onnx")[STEM]
    wanted = round_weight(model.backbone.bottom_up.stem.conv1.weight.detach()).numpy()
    found = value.astype(np.float32) * scale[:, None, None, None]
    np.testing.assert_allclose(found, wanted, atol=float(scale.max()) * 1e-3)


def test_signal_over_noise_of_the_stem_by_pytorch(pair):
    """Of the first convolution, whose input is known, from its definition."""
    model, _, record = pair
    conv = model.backbone.bottom_up.stem.conv1
    batch = torch.from_numpy(np.stack(images()[:4])).permute(0, 3, 1, 2)
    batch = batch.flip(1) if record and model.input_format == "BGR" else batch
    x = (batch.float() - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        wanted = torch.nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        weight = round_weight(conv.weight)
        found = torch.nn.functional.conv2d(
            round_activation(x), weight, None, conv.stride, conv.padding
        )
        noise = (round_activation(found) - wanted).double().square().sum()
    sqnr = 10 * math.log10(wanted.double().square().sum() / noise)
    assert sqnr == pytest.approx(record["int8"][STEM], abs=0.3)


def test_layers_below_the_bound_stay_float(pair, tmp_path):
    _, folder, record = pair
    bound = float(np.median(list(record["int8"].values())))
    second = quantize(
        folder / "model.onnx", images(), tmp_path / "int8.onnx", data="blocks", min_sqnr=bound
    )
    wanted = {name for name, value in record["int8"].items() if value >= bound}
    assert 0 < len(wanted) < len(record["int8"])
    assert set(second["int8"]) == set(rounded_weights(tmp_path / "int8.onnx")) == wanted
    assert set(second["float"]) == (set(record["int8"]) - wanted) | PREDICT


def test_it_finds_what_the_float_file_finds(pair):
    """The best boxes of an untrained head, whose proposals rounding shuffles, are near."""
    _, folder, _ = pair
    for image in images(3):
        plain = hkd_d2.load_detector(folder / "model.onnx").detect([image])[0]
        int8 = hkd_d2.load_detector(folder / "int8.onnx").detect([image])[0]
        assert len(int8) > 5
        gaps = np.abs(int8.boxes[None] - plain.boxes[:, None]).max(axis=2)
        assert np.median(gaps.min(axis=1)) < 3
        nearest = int8.scores[gaps.argmin(axis=1)]
        assert np.median(np.abs(nearest - plain.scores)) < 0.02


def test_levels_that_share_a_weight_are_one_layer(pair):
    _, folder, _ = pair
    layers = find_layers(onnx.load(folder / "model.onnx").graph)
    assert len(layers["rpn_head.conv.weight"].nodes) == 5
    assert len(layers[STEM].nodes) == 1
    assert {name for name in layers if is_predictor(name)} == PREDICT


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS"])
def test_one_stage(architecture, tmp_path):
    """RetinaNet's p6 is read by its head and, behind a ReLU, by p7."""
    exported(one_stage_config(architecture), tmp_path, Shape((64, 96), 2))
    record = quantize(tmp_path / "model.onnx", images(), tmp_path / "int8.onnx", data="blocks")
    assert len(record["int8"]) > 10
    assert {is_predictor(name) for name, value in record["float"].items() if value is None} == {
        True
    }
    assert len(hkd_d2.load_detector(tmp_path / "int8.onnx").detect(images(3))) == 3


def test_bad_input(pair, tmp_path):
    _, folder, _ = pair
    model = folder / "model.onnx"
    with pytest.raises(FileNotFoundError, match="'nowhere.onnx' does not exist"):
        quantize("nowhere.onnx", images(), tmp_path / "x.onnx", data="")
    with pytest.raises(ValueError, match="no images to calibrate on"):
        quantize(model, [], tmp_path / "x.onnx", data="")
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(folder / "int8.onnx", images(), tmp_path / "x.onnx", data="")
    with pytest.raises(ValueError, match="No layer of .* reaches 200 dB; lower the bound"):
        quantize(model, images(2), tmp_path / "x.onnx", data="", min_sqnr=200)
    assert not list(tmp_path.iterdir())
