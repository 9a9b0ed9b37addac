"""What builds no model is one sentence that names the config."""

import pytest

from helpers.small_detectors import small_config
from hkd_d2.modeling.build import build_from_config


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("MODEL.BACKBONE.NAME", "build_nothing", "KeyError: No object named 'build_nothing'"),
        ("MODEL.META_ARCHITECTURE", "Nothing", "KeyError: No object named 'Nothing'"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p9"], "builds no model"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]], "builds no model"),
        ("MODEL.FPN.OUT_CHANNELS", -1, "builds no model"),
    ],
)
def test_one_sentence(key, value, reason):
    cfg = small_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match="The config of 'a.yaml' builds no model") as raised:
        build_from_config(cfg, "'a.yaml'")
    said = str(raised.value)
    assert reason in said and "\n" not in said and raised.value.__cause__ is not None
