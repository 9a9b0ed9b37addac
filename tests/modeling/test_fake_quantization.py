"""A student that trains under INT8's rounding."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from helpers.rules import rule
from helpers.small_detectors import make_batch, save_teacher, small_config
from hkd_d2.modeling.fake_quantization import (
    fake_quantize,
    is_predictor,
    round_activation,
    round_weight,
)

pytestmark = rule("An INT8 file has the weights that training under its rounding saw")


def test_activations_by_hand():
    """Steps of 255 / 255 = 1 from -55 to 200: halves to the even neighbour, zero stays zero."""
    x = torch.tensor([-55.0, -0.4, 0.0, 0.6, 1.5, 2.5, 200.0])
    assert round_activation(x).tolist() == [-55, 0, 0, 1, 2, 2, 200]
    # The range holds zero, whatever the tensor does.
    assert round_activation(torch.tensor([510.0, 509.2])).tolist() == [510, 510]
    assert round_activation(torch.zeros(3)).tolist() == [0, 0, 0]
    assert round_activation(torch.zeros(0, 4)).shape == (0, 4)


def test_weights_by_hand():
    """Each channel has steps of its own."""
    w = torch.tensor([[127.0, 1.4, -0.6], [1.27, 0.014, -0.006], [0.0, 0.0, 0.0]])
    wanted = [[127, 1, -1], [1.27, 0.01, -0.01], [0, 0, 0]]
    np.testing.assert_allclose(round_weight(w).numpy(), wanted, rtol=1e-6)


def test_gradients_pass_straight_through():
    x = torch.randn(3, 5, requires_grad=True)
    round_activation(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 5))
    w = torch.randn(3, 5, requires_grad=True)
    (round_weight(w) * 2).sum().backward()
    assert torch.equal(w.grad, torch.full((3, 5), 2.0))


def test_a_layer_computes_with_rounded_numbers_in_training_alone():
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    plain, keys = layer(x), list(layer.state_dict())
    assert fake_quantize(nn.Sequential(layer)) == ["0"]
    rounded = layer(x)
    wanted = nn.functional.conv2d(round_activation(x), round_weight(layer.weight), layer.bias)
    assert torch.equal(rounded, wanted) and not torch.equal(rounded, plain)
    rounded.square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert list(layer.state_dict()) == keys and isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.eval()(x), plain)


def test_the_weight_is_back_after_an_error():
    layer = nn.Linear(3, 4)
    fake_quantize(nn.Sequential(layer))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert "weight" not in vars(layer) and isinstance(layer.weight, nn.Parameter)


def distilled(folder, enabled):
    cfg = small_config()
    config_file, weights = save_teacher(small_config(channels=24), folder)
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = str(config_file), str(weights)
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TERMS = ["pyramid", "logit"]
    cfg.HKD.STUDENT.FAKE_QUANTIZATION = enabled
    torch.manual_seed(0)
    return build_model(cfg)


def test_the_student_is_rounded_and_the_teacher_is_not(tmp_path):
    losses = {}
    for enabled in (False, True):
        model = distilled(tmp_path, enabled).train()
        hooked = {n for n, m in model.student.named_modules() if m._forward_pre_hooks}
        assert not any(m._forward_pre_hooks for m in model.teacher.model.modules())
        torch.manual_seed(1)
        with EventStorage():
            losses[enabled] = model(make_batch())
        assert bool(hooked) == enabled
    layers = [n for n, m in model.student.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert hooked == {n for n in layers if not is_predictor(n)}
    assert set(layers) - hooked == {
        "proposal_generator.rpn_head.objectness_logits",
        "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    assert losses[True].keys() == losses[False].keys()
    for name, loss in losses[True].items():
        assert loss.isfinite()
        torch.testing.assert_close(loss, losses[False][name], rtol=0.2, atol=0.05)
    assert not torch.equal(losses[True]["loss_hkd_pyramid"], losses[False]["loss_hkd_pyramid"])
