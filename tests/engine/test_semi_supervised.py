"""SAD from end to end: a tiny teacher labels images, and a student learns from both kinds."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.modeling import RetinaNet, build_model
from detectron2.utils.events import EventStorage

from helpers.pseudo_labelled import write_images, write_labelled
from helpers.rules import rule
from helpers.small_detectors import one_stage_config, save_teacher
from hkd_d2.config import add_hkd_config
from hkd_d2.data import PedestrianMapper
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.data.pseudo_labels import file_sha256, read_pseudo_labels, write_pseudo_labels
from hkd_d2.engine import Trainer
from hkd_d2.engine.pseudo_labels import label_images

THRESHOLD = 0.65  # within the scores of the random teacher
ARCHITECTURE = "IgnoreAwareRetinaNet"


@pytest.fixture
def teacher(tmp_path):
    """Config file and weights of a RetinaNet that is the student's architecture."""
    return save_teacher(one_stage_config(ARCHITECTURE), tmp_path)


def read(config_file):
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(config_file)
    return cfg


@pytest.fixture
def cfg(teacher, tmp_path):
    """A run of SAD: four labelled images, a file of six that the teacher labelled."""
    records = write_images(tmp_path / "file", 6)
    pseudo = label_images(
        read(teacher[0]), teacher[1], records, score_threshold=THRESHOLD, classes=["pedestrian"]
    )
    write_pseudo_labels(str(tmp_path / "file.json"), pseudo)
    cfg = one_stage_config(ARCHITECTURE)
    cfg.MODEL.META_ARCHITECTURE = "HKDDetector"
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS = teacher
    cfg.HKD.TERMS = ["adl"]
    name = f"semi_{tmp_path.name}"
    cfg.HKD.DATA.REGISTER = [[name, "coco", *write_labelled(tmp_path / "labelled", 4)]]
    cfg.HKD.DATA.PSEUDO = [str(tmp_path / "file.json")]
    cfg.HKD.DATA.MIN_HEIGHT = 20
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 1e-4, 6, 3
    return cfg


@rule("Pseudo-labels are what Detectron2 detects")
def test_a_pool_holds_what_detectron2_detects(cfg, teacher):
    pseudo = read_pseudo_labels(cfg.HKD.DATA.PSEUDO[0])
    assert pseudo.info["teacher_sha256"] == file_sha256(teacher[1])
    assert pseudo.info["score_threshold"] == THRESHOLD and pseudo.classes == ["pedestrian"]
    stock = read(teacher[0])
    stock.MODEL.WEIGHTS = teacher[1]
    stock.MODEL.RETINANET.SCORE_THRESH_TEST = THRESHOLD
    stock.DATASETS.TEST = ()
    predict = DefaultPredictor(stock)
    number = 0
    for record in pseudo.records:
        image = detection_utils.read_image(record["file_name"], format="BGR")
        found = predict(image)["instances"]
        boxes = found.pred_boxes.tensor.numpy()
        boxes[:, 2:] -= boxes[:, :2]
        ours = np.array([row["bbox"] for row in record["annotations"]]).reshape(-1, 4)
        assert np.allclose(ours, boxes, atol=1e-4)
        assert found.scores.min() > THRESHOLD
        number += len(ours)
    assert number > 6


def test_a_student_of_the_teachers_own_architecture(cfg, tmp_path):
    trainer = run(cfg)
    lines = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.json").open()]
    assert {"loss_hkd_adl", "loss_cls", "loss_box_reg"} <= set().union(*lines)
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses and np.isfinite(losses).all()
    # Same architecture, other weights: the student has them all, and has not the teacher's.
    ours, theirs = trainer.model.student, trainer.model.teacher.model
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other and a.shape == b.shape
    assert not torch.equal(ours.head.cls_score.weight, theirs.head.cls_score.weight)


def run(cfg, resume=False):
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)
    trainer = Trainer(cfg)
    seen = []
    step = trainer._trainer
    step._data_loader_iter_obj = recorded(iter(step.data_loader), seen)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    trainer.seen = seen
    return trainer


def recorded(batches, seen):
    for batch in batches:
        seen.append([Path(x["file_name"]).parent.name == "file" for x in batch])
        yield batch


@rule("Every batch holds the ratio of labelled and pseudo-labelled images")
def test_a_resumed_run_goes_on_with_the_mixture(cfg, tmp_path):
    whole = run(cfg)
    assert whole.seen == [[False, True]] * 6
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000002.pth")
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 3
    assert resumed.seen == [[False, True]] * 3


@rule("ADL leaves out the undecided anchors and no other, on either kind of image")
def test_adl_counts_every_anchor_that_the_labels_decide(cfg):
    """On file images as on others: all but those between the matcher's thresholds."""
    cfg.HKD.DATA.MIN_HEIGHT = 0  # no ignore rows, so that Detectron2's labels are the labels
    register_datasets(cfg)
    mapper = PedestrianMapper(cfg, True)
    model = build_model(cfg).train()
    records = (
        check_records(cfg.DATASETS.TRAIN[0])[:1]
        + read_pseudo_labels(cfg.HKD.DATA.PSEUDO[0]).records
    )
    stock = copy.deepcopy(model.student)
    for record in (records[0], records[1]):
        batch = [mapper(copy.deepcopy(record))]
        with EventStorage(1):
            loss = model(copy.deepcopy(batch))["loss_hkd_adl"]
        # The same in Detectron2's own steps and float64.
        with torch.no_grad():
            logits = []
            for detector in (stock, model.teacher.model):
                images = detector.preprocess_image(batch)
                features = detector.backbone(images.tensor)
                features = [features[name] for name in detector.head_in_features]
                maps = detector.head(features)[0]
                (maps,) = detector._transpose_dense_predictions([maps], [1])
                logits.append(torch.cat(maps, 1)[0, :, 0].double())
            anchors = stock.anchor_generator(features)
            labels = RetinaNet.label_anchors(stock, anchors, [batch[0]["instances"]])[0][0]
        p, q = (x.sigmoid() for x in logits)
        cross_entropy = -(q * p.log() + (1 - q) * (1 - p).log())
        losses = (1 - (-cross_entropy).exp()) ** 2 * 0.5 * cross_entropy
        undecided = labels == -1
        assert 0 < undecided.sum() < len(labels)
        expected = losses[~undecided].sum() / (q**1.8).sum().clamp(min=1)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.item() != pytest.approx(
            (losses.sum() / (q**1.8).sum().clamp(min=1)).item(), rel=1e-4
        )


@rule("What cannot work stops the run before its first step, with one sentence")
def test_what_does_not_fit_stops_the_run_before_the_first_step(cfg, tmp_path):
    (path,) = cfg.HKD.DATA.PSEUDO
    cfg.HKD.DATA.PSEUDO = [path, path]
    with pytest.raises(ValueError, match="names the file '.*' twice"):
        Trainer(cfg)
    cfg.HKD.DATA.PSEUDO = [path]
    content = json.loads(Path(path).read_text())

    def changed(**changes):
        Path(path).write_text(json.dumps({**content, **changes}))

    changed(info={**content["info"], "teacher_sha256": "0" * 64})
    with pytest.raises(ValueError, match="made by another teacher"):
        Trainer(cfg)
    changed(categories=[{"id": 1, "name": "person"}])
    with pytest.raises(ValueError, match="the classes person and DATASETS.TRAIN pedestrian"):
        Trainer(cfg)
    cfg.HKD.TEACHER.CLASS_MAP = [0]  # says that the person is the pedestrian
    Trainer(cfg)
    changed(annotations=[])
    with pytest.raises(ValueError, match="the file is empty"):
        Trainer(cfg)
    changed()
    image = Path(content["info"]["image_root"], content["images"][2]["file_name"])
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(ValueError, match="file.json: the image '.*003.png' cannot be read"):
        Trainer(cfg)
    image.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 images are missing"):
        Trainer(cfg)


def test_boxes_of_a_pool_may_be_too_small_to_count(cfg):
    cfg.HKD.DATA.MIN_HEIGHT = 50
    register_datasets(cfg)
    loader = Trainer.build_train_loader(cfg)
    images = [x for batch in itertools.islice(loader, 6) for x in batch]
    pseudo = [x["instances"] for x in images if Path(x["file_name"]).parent.name == "file"]
    small = [i.gt_boxes.tensor[:, 3] - i.gt_boxes.tensor[:, 1] < 49 for i in pseudo]
    assert sum(s.sum() for s in small) > 0
    for instances, ignored in zip(pseudo, small, strict=True):
        assert instances.gt_ignore[ignored].all()


def test_labelling_refuses(teacher, tmp_path):
    records = write_images(tmp_path / "file", 1)
    cfg = read(teacher[0])
    with pytest.raises(ValueError, match="1 classes and 2 are named"):
        label_images(cfg, teacher[1], records, score_threshold=0.5, classes=["a", "b"])
    with pytest.raises(ValueError, match="'nowhere' is not registered.*--classes"):
        cfg.DATASETS.TRAIN = ("nowhere",)
        label_images(cfg, teacher[1], records, score_threshold=0.5)
    with pytest.raises(ValueError, match="The score threshold is 1.0; give a number from 0"):
        label_images(cfg, teacher[1], records, score_threshold=1.0, classes=["a"])
    with pytest.raises(FileNotFoundError, match="nowhere.pth' do not exist"):
        label_images(cfg, "nowhere.pth", records, score_threshold=0.5, classes=["a"])
    other, weights = save_teacher(one_stage_config("RetinaNet", width=0.5), tmp_path, "other")
    with pytest.raises(ValueError, match="is not a checkpoint of the teacher"):
        label_images(cfg, weights, records, score_threshold=0.5, classes=["a"])
