"""Classes of data sets beside each other, and data sets in which nothing counts."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from helpers.small_datasets import write_image
from hkd_d2.data.checks import (
    check_anything_counts,
    check_class_lists,
    check_class_map,
    why_ignored,
)
from hkd_d2.data.datasets import check_records, register_dataset


@pytest.fixture
def named(request):
    """A function that gives a data set of a class list a place in the catalog."""
    names = []

    def make(*classes):
        names.append(f"{request.node.name}_{len(names)}")
        MetadataCatalog.get(names[-1]).thing_classes = list(classes)
        return names[-1]

    yield make
    for name in names:
        MetadataCatalog.remove(name)


AB, BA, A = ("pedestrian", "rider"), ("rider", "pedestrian"), ("pedestrian",)


@pytest.mark.parametrize(
    ("training", "test"),
    [
        ([AB], [AB]),
        ([AB, AB], []),
        ([A], [("person",)]),
        ([A], [(" Pedestrian",)]),
        ([AB], [A]),  # no rider in the test set
        ([A], [AB]),  # riders are no matter
    ],
)
def test_lists_that_agree(named, training, test):
    check_class_lists([named(*c) for c in training], [named(*c) for c in test])


@pytest.mark.parametrize(
    ("training", "test"),
    [([AB], [BA]), ([AB, BA], []), ([AB, A], []), ([A], [("car",)]), ([AB], [("car", *AB)])],
)
def test_lists_that_differ_are_both_named(named, training, test):
    sets = [[named(*c) for c in training], [named(*c) for c in test]]
    with pytest.raises(ValueError) as caught:
        check_class_lists(*sets)
    for classes in (*training, *test):
        assert ", ".join(classes) in str(caught.value)


def test_a_set_without_names_is_passed_over(named):
    check_class_lists([named(*AB)], ["a set that nobody registered"])
    MetadataCatalog.remove("a set that nobody registered")


@pytest.mark.parametrize(
    ("student", "teacher", "class_map", "right"),
    [
        (A, A, [], True),
        (A, AB, [], False),
        (A, AB, [0], True),
        (A, AB, [1], False),
        (AB, BA, [1, 0], True),
        (AB, BA, [0, 1], False),
        (A, ("person", "car"), [0], True),
        (A, ("car", "person"), [0], False),
    ],
)
def test_the_teachers_map(named, student, teacher, class_map, right):
    sets = [named(*student)], [named(*teacher)]
    if right:
        check_class_map(*sets, class_map)
    else:
        with pytest.raises(ValueError, match="set HKD.TEACHER.CLASS_MAP to the index") as caught:
            check_class_map(*sets, class_map)
        assert ", ".join(student) in str(caught.value)
        assert ", ".join(teacher) in str(caught.value)


def row(height=60, visible=1.0, **flags):
    return {
        "bbox": [0.0, 0.0, 20.0, float(height)],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "vis_ratio": visible,
        **flags,
    }


def test_the_rule_that_a_row_falls_to():
    assert why_ignored(row(50, 0.3), 50, 0.3) is None
    assert why_ignored(row(49.9, 0.1), 50, 0.3) == "height"
    assert why_ignored(row(50, 0.29), 50, 0.3) == "visibility"
    assert why_ignored(row(10, ignore=1), 50, 0.3) == "flag"
    assert why_ignored(row(60, iscrowd=1), 50, 0.3) == "flag"


@pytest.fixture
def bounds(hkd_cfg):
    hkd_cfg.HKD.DATA.MIN_HEIGHT, hkd_cfg.HKD.DATA.MIN_VISIBILITY = 50, 0.3
    return hkd_cfg


@pytest.fixture
def hkd_cfg():
    from detectron2.config import get_cfg

    from hkd_d2.config import add_hkd_config

    cfg = get_cfg()
    add_hkd_config(cfg)
    return cfg


def test_nothing_counts_is_refused_with_the_reasons(bounds):
    rows = [row(40), row(30), row(60, 0.1), row(ignore=1)]
    with pytest.raises(ValueError) as caught:
        check_anything_counts(bounds, {"mine": [{"annotations": rows}, {"annotations": []}]})
    assert str(caught.value) == (
        "None of the 4 boxes of 'mine' counts in training: 1 are ignored or crowds by the file, 2 "
        "are lower than HKD.DATA.MIN_HEIGHT 50, 1 are less visible than HKD.DATA.MIN_VISIBILITY "
        "0.3; lower these bounds or name other annotations."
    )
    with pytest.raises(ValueError, match="'mine' has no boxes in the 1 images"):
        check_anything_counts(bounds, {"mine": [{"annotations": []}]})


def test_one_set_of_several_may_be_empty_but_no_file_of_pseudo_labels(bounds, caplog):
    full, empty = [{"annotations": [row()]}], [{"annotations": [row(20)]}]
    with caplog.at_level(logging.WARNING):
        check_anything_counts(bounds, {"one": full, "two": empty})
    assert "None of the 1 boxes of 'two' counts" in caplog.text
    bounds.HKD.DATA.PSEUDO = ["labels.json"]
    with pytest.raises(ValueError, match="None of the 1 boxes of 'labels.json' counts"):
        check_anything_counts(bounds, {"one": full, "labels.json": empty})


def test_a_run_on_sets_of_other_order_is_refused(tmp_path, hkd_cfg):
    """From the files to the sentence, by the check that a run makes first."""
    from hkd_d2.engine.preflight import check_data

    write_image(tmp_path / "a.png", (100, 200))
    for split, names in (("train", AB), ("val", BA)):
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 100, "width": 200}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": i, "bbox": [9 * i, 10, 20, 60]}
                for i in (1, 2)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        register_dataset(f"order_{split}", "coco", str(tmp_path / f"{split}.json"), str(tmp_path))
    hkd_cfg.DATASETS.TRAIN, hkd_cfg.DATASETS.TEST = ("order_train",), ("order_val",)
    try:
        assert len(check_records("order_train")) == 1
        with pytest.raises(ValueError, match="pedestrian, rider and 'order_val' rider, pedestrian"):
            check_data(hkd_cfg)
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"order_{split}")
            MetadataCatalog.remove(f"order_{split}")
