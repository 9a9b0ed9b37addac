"""Which images a run trains on, and in which mixture."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from helpers.pseudo_labelled import (
    LABELLED_BOX,
    POOL_BOX,
    pseudo_labels_of,
    semi_supervised_config,
    write_images,
)
from helpers.rules import rule
from helpers.two_processes import run_in_two_processes
from hkd_d2.data import PedestrianMapper
from hkd_d2.data.datasets import register_datasets
from hkd_d2.data.loader import (
    MixedTrainingSampler,
    build_train_loader,
    labelled_sets,
    pseudo_label_sets,
)


@pytest.fixture
def cfg(tmp_path):
    """Four labelled images and a file of six others."""
    before = set(DatasetCatalog.list())
    cfg = semi_supervised_config(tmp_path)
    register_datasets(cfg)
    yield cfg
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def batches(cfg, number):
    loader = build_train_loader(cfg, PedestrianMapper(cfg, True))
    return list(itertools.islice(loader, number))


def is_pseudo(batch):
    return [Path(x["file_name"]).parent.name == "file" for x in batch]


def pseudo_sets(cfg):
    return pseudo_label_sets(cfg, labelled_sets(cfg))


@rule("Every batch holds the ratio of labelled and pseudo-labelled images")
@pytest.mark.parametrize(("workers", "batch"), [(0, 4), (2, 2)])
def test_every_batch_holds_the_ratio(cfg, workers, batch):
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.INPUT.RANDOM_FLIP = "none"
    found = batches(cfg, 30)
    assert [sum(is_pseudo(b)) for b in found] == [batch // 2] * 30
    images = {x["file_name"] for batch in found for x in batch}
    assert len(images) == 10  # all of both kinds
    for image in itertools.chain(*found):
        (box,) = image["instances"].gt_boxes.tensor.tolist()
        x, y, w, h = LABELLED_BOX
        assert box == (POOL_BOX if "/file/" in image["file_name"] else [x, y, x + w, y + h])


@pytest.mark.parametrize(
    ("ratio", "batch", "expected"),
    [  # of the first n images floor(n r / (1 + r)) are of the file
        (1.0, 1, [0, 1, 0, 1, 0, 1]),
        (1.0, 3, [1, 2, 1, 2, 1, 2]),
        (3.0, 4, [3, 3, 3, 3, 3, 3]),
        (0.5, 2, [0, 1, 1, 0, 1, 1]),
        (0.5, 6, [2, 2, 2, 2, 2, 2]),
        (2.0, 1, [0, 1, 1, 0, 1, 1]),
    ],
)
def test_ratios_and_batches_that_do_not_fit(cfg, ratio, batch, expected):
    cfg.HKD.DATA.PSEUDO_RATIO, cfg.SOLVER.IMS_PER_BATCH = ratio, batch
    assert [sum(is_pseudo(b)) for b in batches(cfg, 6)] == expected


def test_a_long_stream_does_not_drift():
    stream = itertools.islice(MixedTrainingSampler(5, 7, ratio=0.1, seed=0), 110000)
    assert sum(i >= 5 for i in stream) == 10000


def test_the_same_seed_gives_the_same_stream_and_each_kind_is_shuffled_whole():
    first, again, other = (
        list(itertools.islice(MixedTrainingSampler(4, 6, seed=s), 24)) for s in (3, 3, 4)
    )
    assert first == again != other
    labelled, pseudo = first[::2], first[1::2]
    assert sorted(labelled[:4]) == sorted(labelled[4:8]) == [0, 1, 2, 3]
    assert sorted(pseudo[:6]) == sorted(pseudo[6:]) == [4, 5, 6, 7, 8, 9]


def one_rank(rank, cfg, path):
    register_datasets(cfg)
    found = [[x["file_name"] for x in batch] for batch in batches(cfg, 12)]
    torch.save(found, f"{path}.{rank}")


@pytest.mark.long
@rule("Every batch holds the ratio of labelled and pseudo-labelled images")
@pytest.mark.parametrize("batch", [2, 4])
def test_two_processes_have_other_images_and_the_ratio(cfg, tmp_path, batch):
    cfg.SOLVER.IMS_PER_BATCH = batch  # of both
    run_in_two_processes(one_rank, cfg, str(tmp_path / "names"))
    ranks = [torch.load(f"{tmp_path}/names.{r}") for r in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert len(first) == len(second) == batch // 2
        assert sum("/file/" in name for name in first + second) == batch // 2
    # Together they go through the labelled images, each has another half of every shuffle.
    for kind, size in (("/labelled/", 4), ("/file/", 6)):
        mine, theirs = ([n for b in rank for n in b if kind in n][: size // 2] for rank in ranks)
        assert len(set(mine) | set(theirs)) == size


def test_without_pools_the_loader_is_detectron2s(cfg):
    cfg.HKD.DATA.PSEUDO = []
    found = batches(cfg, 4)
    assert not any(sum(is_pseudo(b)) for b in found)
    assert len({x["file_name"] for b in found for x in b}) == 4


def test_a_share_of_the_labels(cfg):
    cfg.HKD.DATA.PSEUDO = []
    names = {}
    for share in (0.2, 0.25, 0.5, 0.75, 1.0):
        cfg.HKD.DATA.LABELED_SHARE = share
        (records,) = labelled_sets(cfg).values()
        names[share] = [r["file_name"] for r in records]
        assert names[share] == sorted(names[share])
        assert {x["file_name"] for b in batches(cfg, 8) for x in b} == set(names[share])
    assert [len(n) for n in names.values()] == [1, 1, 2, 3, 4]
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(names.values()))
    cfg.SEED = 77
    cfg.HKD.DATA.LABELED_SHARE = 0.5
    assert [r["file_name"] for r in labelled_sets(cfg)[cfg.DATASETS.TRAIN[0]]] == names[0.5]
    for wrong in (0.0, 1.5):
        cfg.HKD.DATA.LABELED_SHARE = wrong
        with pytest.raises(ValueError, match=f"HKD.DATA.LABELED_SHARE is {wrong}; give a share"):
            labelled_sets(cfg)
    cfg.HKD.DATA.LABELED_SHARE = 0.1
    with pytest.raises(ValueError, match="0.1 of the 4 images .* raise it to 0.25 at least"):
        labelled_sets(cfg)


def test_labelled_images_leave_the_pool_with_a_warning(cfg, tmp_path, caplog):
    (labelled,) = labelled_sets(cfg).values()
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(pseudo_labels_of(labelled)))
    cfg.HKD.DATA.PSEUDO = [str(path)]
    with pytest.raises(
        ValueError, match="the file is empty, all its 4 images are labelled in DATA"
    ):
        pseudo_sets(cfg)
    cfg.HKD.DATA.LABELED_SHARE = 0.25
    with caplog.at_level(logging.WARNING):
        (rest,) = pseudo_sets(cfg).values()
    assert "1 of its 4 images are labelled in DATASETS.TRAIN and left out" in caplog.text
    assert len(rest) == 3
    (used,) = labelled_sets(cfg).values()
    assert not {r["file_name"] for r in rest} & {r["file_name"] for r in used}


def test_a_pool_named_twice(cfg, tmp_path):
    (path,) = cfg.HKD.DATA.PSEUDO
    (tmp_path / "link.json").symlink_to(path)
    for again in (path, str(tmp_path / "link.json"), f"{tmp_path}/../{tmp_path.name}/file.json"):
        cfg.HKD.DATA.PSEUDO = [path, again]
        with pytest.raises(ValueError, match="HKD.DATA.PSEUDO names the file '.*' twice"):
            pseudo_sets(cfg)
    copy = tmp_path / "copy.json"
    copy.write_text(Path(path).read_text())
    cfg.HKD.DATA.PSEUDO = [path, str(copy)]
    with pytest.raises(ValueError, match="copy.json: the image '.*001.png' is in the file .*too"):
        pseudo_sets(cfg)
    copy.write_text(json.dumps(pseudo_labels_of(write_images(tmp_path / "more", 2))))
    assert [len(r) for r in pseudo_sets(cfg).values()] == [6, 2]


def test_pool_images_that_are_tested(cfg, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "file/003.png", "height": 64, "width": 96}],
        "annotations": [],
        "categories": [{"id": 1, "name": "pedestrian"}],
    }
    (tmp_path / "test.json").write_text(json.dumps(content))
    cfg.HKD.DATA.REGISTER = [["tested", "coco", str(tmp_path / "test.json"), str(tmp_path)]]
    register_datasets(cfg)
    cfg.DATASETS.TEST = ("tested",)
    with pytest.raises(ValueError, match="003.png' is in the test set 'tested' too; make the file"):
        pseudo_sets(cfg)


def test_other_refusals(cfg, tmp_path):
    for ratio in (0.0, -1.0, 101.0):
        cfg.HKD.DATA.PSEUDO_RATIO = ratio
        with pytest.raises(ValueError, match=f"HKD.DATA.PSEUDO_RATIO is {ratio}; give a number"):
            batches(cfg, 1)
    cfg.HKD.DATA.PSEUDO_RATIO = 1.0
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match="with HKD.DATA.PSEUDO it has to be TrainingSampler"):
        batches(cfg, 1)
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"abc")
    cfg.HKD.TEACHER.WEIGHTS = str(weights)
    with pytest.raises(ValueError, match="made by another teacher .*than HKD.TEACHER.WEIGHTS"):
        pseudo_sets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    DatasetCatalog.register("nameless", lambda: DatasetCatalog.get(name))
    cfg.DATASETS.TRAIN = ("nameless",)
    with pytest.raises(ValueError, match="'nameless' has no class names to compare"):
        pseudo_sets(cfg)


def test_images_without_a_box_may_be_filtered(cfg, tmp_path):
    path = Path(cfg.HKD.DATA.PSEUDO[0])
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:2]
    path.write_text(json.dumps(content))
    assert len({x["file_name"] for b in batches(cfg, 12) for x in b}) == 10
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert len({x["file_name"] for b in batches(cfg, 12) for x in b}) == 6
