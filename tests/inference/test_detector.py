"""A detector from a file finds what Detectron2 finds, in any company and from any thread."""

import concurrent.futures
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image

import hkd_d2
from helpers.command import run_code
from helpers.rules import rule
from helpers.small_detectors import cascade_config, one_stage_config, save_teacher, small_config
from hkd_d2.inference import Detections, Detector

CONFIGS = {
    "two-stage": small_config,
    "cascade": cascade_config,
    "retinanet": lambda: one_stage_config("RetinaNet"),
    "fcos": lambda: one_stage_config("FCOS"),
}


def images(sizes=((64, 96), (70, 50), (128, 192), (64, 96))):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def save_detector(folder, cfg):
    """Weights with ``config.yaml`` beside them, as training leaves them."""
    config_file, weights = save_teacher(cfg, folder, "model")
    Path(config_file).rename(folder / "config.yaml")
    return weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("two_stage"), small_config())


@rule("A detector from a file finds what Detectron2 finds, in any company and from any thread")
@pytest.mark.parametrize("form", ["RGB", "BGR"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_finds_what_detectron2_finds(tmp_path, kind, form):
    cfg = CONFIGS[kind]()
    cfg.INPUT.FORMAT = form
    cfg.MODEL.PIXEL_MEAN = [100.0, 110.0, 120.0]
    weights = save_detector(tmp_path, cfg)
    detector = hkd_d2.load_detector(weights)
    assert isinstance(detector, Detector)
    cfg.MODEL.WEIGHTS = weights
    predictor = DefaultPredictor(cfg)
    for image, found in zip(images(), detector.detect(images()), strict=True):
        wanted = predictor(image[:, :, ::-1])["instances"]
        assert len(found) == len(wanted) > 5
        # images of one size run together, which rounds otherwise
        np.testing.assert_allclose(found.boxes, wanted.pred_boxes.tensor, atol=1e-3)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
        np.testing.assert_array_equal(found.classes, wanted.pred_classes)
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert found.classes.dtype == np.int64
        assert (np.diff(found.scores) <= 0).all()


@rule("A detector from a file finds what Detectron2 finds, in any company and from any thread")
def test_company_and_order_change_nothing(weights):
    detector = hkd_d2.load_detector(weights, batch_size=1)
    together = detector.detect(images())
    for image, found in zip(images(), together, strict=True):
        alone = detector.detect([image])[0]
        np.testing.assert_array_equal(alone.boxes, found.boxes)
    assert detector.detect([]) == []


def test_paths_and_pictures(weights, tmp_path):
    detector = hkd_d2.load_detector(weights)
    array = images()[0]
    Image.fromarray(array).save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    for found in detector.detect([array, path, str(path), Image.open(path)]):
        np.testing.assert_allclose(found.boxes, detector.detect([array])[0].boxes, atol=1e-3)
    with pytest.raises(ValueError, match="put the one image into a list"):
        detector.detect(array)
    with pytest.raises(ValueError, match="put the one image into a list"):
        detector.detect(str(path))


@rule("A detector from a file finds what Detectron2 finds, in any company and from any thread")
def test_several_threads(weights):
    detector = hkd_d2.load_detector(weights, batch_size=1)
    alone = [detector.detect([image])[0] for image in images()]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: detector.detect([images()[i % 4]])[0], range(24)))
    for i, one in enumerate(found):
        np.testing.assert_array_equal(one.boxes, alone[i % 4].boxes)
        np.testing.assert_array_equal(one.scores, alone[i % 4].scores)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", CONFIGS)
def test_thresholds(tmp_path, kind):
    weights = save_detector(tmp_path, CONFIGS[kind]())
    every = hkd_d2.load_detector(weights).detect(images())
    middle = float(np.median(every[0].scores))
    high = hkd_d2.load_detector(weights, score_threshold=middle)
    assert high.metadata["score_threshold"] == middle
    for found, above in zip(every, high.detect(images()), strict=True):
        np.testing.assert_array_equal(above.scores, found.above(middle).scores)
    assert 0 < len(every[0].above(middle)) < len(every[0])
    few = hkd_d2.load_detector(weights, nms_threshold=0.1).detect(images())
    assert len(few[0]) < len(every[0])


def test_metadata(weights):
    detector = hkd_d2.load_detector(weights, class_names=["walker"])
    assert detector.class_names == ("walker",)
    assert hkd_d2.load_detector(weights).class_names == ("class_0",)  # its training set is unknown
    metadata = detector.metadata
    assert metadata["kind"] == "two-stage" and metadata["input_format"] == "BGR"
    assert (metadata["min_size"], metadata["max_size"]) == (64, 96)
    assert metadata["version"] == hkd_d2.__version__
    assert len(metadata["weights_sha256"]) == 64


def test_the_weights_hash_tells_weights_apart(tmp_path):
    cfg = small_config()
    weights = save_detector(tmp_path, cfg)
    before = hkd_d2.load_detector(weights).metadata["weights_sha256"]
    assert hkd_d2.load_detector(weights).metadata["weights_sha256"] == before
    state = torch.load(weights, weights_only=True)
    state["model"]["roi_heads.box_predictor.cls_score.bias"][0] += 1e-3
    torch.save(state, weights)
    assert hkd_d2.load_detector(weights).metadata["weights_sha256"] != before


@rule("A distilled student needs no teacher to detect")
def test_a_distilled_student_needs_no_teacher(tmp_path, hkd_cfg):
    """Its config names a teacher; neither its files nor its terms are looked for."""
    plain = small_config()
    weights = save_detector(tmp_path, plain)
    wanted = hkd_d2.load_detector(weights).detect(images())
    hkd_cfg.HKD.TEACHER.CONFIG_FILE = hkd_cfg.HKD.TEACHER.WEIGHTS = "gone"
    (tmp_path / "config.yaml").write_text(hkd_cfg.dump())
    found = hkd_d2.load_detector(weights).detect(images())
    np.testing.assert_array_equal(found[0].boxes, wanted[0].boxes)


def test_what_is_refused(weights, tmp_path):
    load = hkd_d2.load_detector
    with pytest.raises(FileNotFoundError, match="none.pth' does not exist"):
        load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="none of .pth"):
        load(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="backend is 'tensorrt'"):
        load(weights, "tensorrt")
    with pytest.raises(ValueError, match="score_threshold is 1.5"):
        load(weights, score_threshold=1.5)
    with pytest.raises(ValueError, match="1 classes and 2 are named"):
        load(weights, class_names=["a", "b"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        load(weights, batch_size=0)
    lonely = tmp_path / "lonely.pth"
    lonely.write_bytes(Path(weights).read_bytes())
    with pytest.raises(FileNotFoundError, match="give config_file"):
        load(lonely)
    (tmp_path / "config.yaml").write_text("MODEL: {NO_SUCH_KEY: 1}")
    with pytest.raises(ValueError, match="MODEL.NO_SUCH_KEY .*, line 1.* is no config key"):
        load(lonely)
    assert load(lonely, config_file=Path(weights).parent / "config.yaml").metadata
    lonely.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load(lonely, config_file=Path(weights).parent / "config.yaml")


def test_no_code_runs_from_a_config(weights, tmp_path):
    touched = tmp_path / "touched"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{touched}']\n")
    with pytest.raises(ValueError, match="evil.yaml', line 1: the tag .*os.mkdir is refused"):
        hkd_d2.load_detector(weights, config_file=evil)
    assert not touched.exists()


def test_above_and_len():
    found = Detections(
        np.zeros((3, 4), np.float32), np.array([0.9, 0.5, 0.1]), np.zeros(3, np.int64), ("a",)
    )
    assert len(found) == 3 and len(found.above(0.5)) == 1 and found.above(0.5).class_names == ("a",)


def test_images_need_neither_torch_nor_detectron2():
    code = (
        "import sys; sys.modules.update(torch=None, detectron2=None); "
        "import hkd_d2.inference as i; print(i.load_detector.__name__)"
    )
    assert run_code(code).stdout.strip() == "load_detector"
