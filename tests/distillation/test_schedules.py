"""Weight schedules, values worked by hand."""

import pytest
from detectron2.config import CfgNode

from helpers.small_detectors import small_config
from hkd_d2.distillation.schedules import WeightSchedule


def test_shapes():
    constant = WeightSchedule(weight=2.0, max_iter=10)
    assert [constant(i) for i in (0, 5, 9)] == [2, 2, 2]
    warm = WeightSchedule(weight=2.0, max_iter=10, warmup_iters=4)
    assert [warm(i) for i in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    # falls from 2 at the end of the warm-up (2) to a quarter of it at 10; half way is 6
    linear = WeightSchedule(2.0, 10, warmup_iters=2, decay="linear", end_factor=0.25)
    assert [linear(i) for i in (2, 6, 10, 99)] == [2.0, 1.25, 0.5, 0.5]
    # (1 - cos(pi/4)) / 2 = 0.146447 of the way at a quarter of the time
    cosine = WeightSchedule(1.0, 8, decay="cosine")
    assert [cosine(i) for i in (0, 2, 4, 8)] == pytest.approx([1, 0.853553, 0.5, 0])
    stop = WeightSchedule(2.0, 10, stop_iter=3)
    assert [stop(i) for i in (2, 3, 9)] == [2, 0, 0]
    assert not stop.stopped(2) and stop.stopped(3)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("WEIGHT", -1.0, "HKD.REGION.WEIGHT is -1.0"),
        ("WEIGHT", float("nan"), "HKD.REGION.WEIGHT is nan"),
        ("SCHEDULE.DECAY", "steps", "choose from constant, linear, cosine"),
        ("SCHEDULE.WARMUP_ITERS", -3, "HKD.REGION.SCHEDULE.WARMUP_ITERS is -3"),
        ("SCHEDULE.END_FACTOR", 1.5, "HKD.REGION.SCHEDULE.END_FACTOR is 1.5"),
    ],
)
def test_bad_values(key, value, sentence):
    cfg: CfgNode = small_config()
    cfg.merge_from_list([f"HKD.REGION.{key}", value])
    with pytest.raises(ValueError, match=sentence):
        WeightSchedule.from_config(cfg.HKD.REGION, 10, "REGION")
