"""Whole detectors side by side: turns, statistics and miss rate by hand."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from helpers.red_detector import RedDetector, street
from helpers.rules import rule
from hkd_d2.inference import benchmark as models
from hkd_d2.visualization.latency import plot_accuracy_latency

pytestmark = rule("Models are compared in one run, in turns, with the evaluator's own miss rate")


def test_detectors_take_turns_on_the_same_images(monkeypatch):
    monkeypatch.setattr(models, "PAUSE", 0)
    monkeypatch.setattr(models, "WARM_UP", 1)
    calls, detectors = [], {}
    for name in "ab":
        detectors[name] = detector = RedDetector()
        find = detector.detect

        def detect(images, name=name, find=find):
            calls.append((name, len(images)))
            return find(images)

        detector.detect = detect
    images = [street(x=x) for x in (10, 30, 50)]
    samples = models.time_detectors(detectors, images, [1, 4], rounds=3)
    assert all(len(samples[name][batch]) == 3 for name in "ab" for batch in (1, 4))
    # Four rounds with the warm-up, each call after one that is not timed; they begin by turns.
    orders = [calls[i : i + 8 : 2] for i in range(0, 32, 8)]
    ab = [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    ba = [("b", 1), ("a", 1), ("b", 4), ("a", 4)]
    assert orders == [ba, ab, ba, ab]


def test_times_by_hand():
    times = models.summarise_times({1: [0.01, 0.02, 0.03], 8: [0.1] * 4})
    assert times["1"]["p50_ms"] == pytest.approx(20)
    assert times["1"]["p90_ms"] == pytest.approx(28)  # four fifths of the way from 20 to 30
    assert times["8"]["images_per_s"] == pytest.approx(80)


@pytest.mark.parametrize(("score", "pedestrian", "rate"), [(0.9, 0, 50.0), (0.9, 1, 100.0)])
def test_miss_rate_by_hand(tmp_path, score, pedestrian, rate):
    """Two images with a pedestrian of 60 pixels each; the detector sees the red one alone."""
    records = []
    for number in range(2):
        image = street(y=10, height=60)
        if number:
            image[...] = 60
        path = tmp_path / f"{number}.png"
        Image.fromarray(image).save(path)
        row = {"bbox": [40, 10, 20, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        size = {"height": 96, "width": 128}
        records.append({"file_name": str(path), "image_id": number, "annotations": [row], **size})
    found = models.score_detector(RedDetector(score), records, pedestrian=pedestrian)
    assert found["Reasonable"] == pytest.approx(rate)
    assert found["Reasonable_occ=heavy"] is None


def test_an_exported_file_weighs_what_its_weights_do():
    class Exported(RedDetector):
        def __init__(self, weights):
            super().__init__()
            self.metadata["weights_sha256"] = weights

    from detectron2.modeling import build_model

    from helpers.small_detectors import small_config
    from hkd_d2.inference.torch_backend import TorchDetector

    model = build_model(small_config()).eval()
    real = TorchDetector(model, {"class_names": ["a"], "weights_sha256": "same"})
    detectors = {"real": real, "same": Exported("same"), "other": Exported("other")}
    weights = models.weigh_detectors(detectors, (64, 96))
    assert weights["real"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert weights["same"] == weights["real"] and weights["real"]["gflops"] > 0
    assert weights["other"] == {"parameters": None, "gflops": None}


def test_plot_without_a_miss_rate(tmp_path):
    row = {"model": "a", "miss_rate": {"Reasonable": None}, "latency": {"1": {}}}
    plot_accuracy_latency([row], tmp_path / "plot.png", "Reasonable", "none")
    assert np.asarray(Image.open(tmp_path / "plot.png")).size
