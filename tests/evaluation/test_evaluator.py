"""PedestrianEvaluator through a registered dataset, against Detectron2's own COCO evaluator."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.structures import Boxes, BoxMode, Instances

from helpers.published_data import CITYPERSONS, needs_citypersons
from helpers.rules import rule
from helpers.two_processes import run_in_two_processes
from hkd_d2.evaluation import (
    PROTOCOLS,
    PedestrianEvaluator,
    check_test_set,
    coco_ground_truth,
    evaluate_miss_rate,
    load_detections,
    load_ground_truth,
    pedestrian_class,
)

NAME = "hkd_tiny_pedestrians"


def annotation(box, mode=BoxMode.XYWH_ABS, category=0, **more):
    return {"bbox": box, "bbox_mode": mode, "category_id": category} | more


def records():
    """Four images: two people and an ignored one, a crowd and a rider, one person, nobody."""
    annotations = [
        [
            annotation([10, 20, 30, 70], ignore=0, vis_ratio=0.8, iscrowd=0),
            annotation([200.5, 40.25, 250.5, 160.25], BoxMode.XYXY_ABS),
            annotation([300, 50, 40, 90], ignore=1, vis_ratio=1.0),
        ],
        [
            annotation([0, 0, 300, 200], iscrowd=1),
            annotation([400, 100, 30, 80], category=1),
        ],
        [annotation([500, 100, 25, 60], vis_ratio=0.4, ignore=0)],
        [],
    ]
    return [
        {
            "file_name": f"some/where/{number}.png",
            "image_id": number,
            "height": 480,
            "width": 640,
            "annotations": rows,
        }
        for number, rows in zip((2, 5, 3, 9), annotations, strict=True)
    ]


PREDICTIONS = {  # image id -> (XYXY box, score, class)
    2: [
        ([11, 22, 41, 91], 0.95, 0),
        ([198, 42, 251, 158], 0.7, 0),
        ([201, 60, 262, 190], 0.65, 0),
        ([305, 55, 338, 139], 0.8, 0),
        ([10, 20, 40, 90], 0.99, 1),
    ],
    5: [([20, 20, 50, 90], 0.9, 0), ([400, 100, 430, 180], 0.6, 0)],
    3: [([501, 98, 526, 161], 0.5, 0)],
    9: [],
}


def instances(predictions):
    output = Instances((480, 640))
    output.pred_boxes = Boxes(torch.tensor([box for box, _, _ in predictions]).reshape(-1, 4))
    output.scores = torch.tensor([score for _, score, _ in predictions])
    output.pred_classes = torch.tensor([label for *_, label in predictions], dtype=torch.int64)
    return output


class Detector(torch.nn.Module):
    def __init__(self, predictions):
        super().__init__()
        self.predictions = predictions

    def forward(self, inputs):
        return [{"instances": instances(self.predictions[row["image_id"]])} for row in inputs]


@pytest.fixture
def dataset():
    DatasetCatalog.register(NAME, records)
    MetadataCatalog.get(NAME).thing_classes = ["pedestrian", "rider"]
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def run(evaluator, predictions=PREDICTIONS):
    loader = [[row] for row in records()]
    return inference_on_dataset(Detector(predictions), loader, evaluator)


def test_ground_truth_has_the_layout_of_the_benchmark():
    ground_truth = coco_ground_truth(records())
    assert ground_truth["images"][0] == {"id": 2, "im_name": "2.png", "height": 480, "width": 640}
    assert [image["id"] for image in ground_truth["images"]] == [2, 5, 3, 9]
    assert ground_truth["annotations"] == [
        {
            "id": number,
            "image_id": image,
            "category_id": 1,
            "iscrowd": crowd,
            "ignore": ignore,
            "bbox": box,
            "height": box[3],
            "vis_ratio": vis,
        }
        for number, image, crowd, ignore, box, vis in (
            (1, 2, 0, 0, [10, 20, 30, 70], 0.8),
            (2, 2, 0, 0, [200.5, 40.25, 50.0, 120.0], 1.0),
            (3, 2, 0, 1, [300, 50, 40, 90], 1.0),
            (4, 5, 1, 1, [0, 0, 300, 200], 1.0),
            (5, 3, 0, 0, [500, 100, 25, 60], 0.4),
        )
    ]
    riders = coco_ground_truth(records(), category=1)["annotations"]
    assert [row["bbox"] for row in riders] == [[400, 100, 30, 80]]


def test_scores_of_the_tiny_set(dataset, tmp_path):
    results = run(PedestrianEvaluator(dataset, str(tmp_path)))
    # Reasonable: 2 countable people, 4 images. By score: 0.95 found; 0.9 in the crowd and 0.8 on
    # the ignored person do not count; 0.7 found; 0.65 false; 0.6 on the rider, of another class
    # and so a false positive; 0.5 on a person out of range. Recall is 1 before any false positive.
    assert results["miss_rate"]["Reasonable"] == 0
    # Heavily occluded: 1 countable person. The bare ones are ignored here and absorb 0.65 too (63 %
    # of its area), so 0.6 is false (FPPI 0.25) and 0.5 a hit. The six values under 0.25 have no
    # operating point and read the last recall, 1, by the official rule; the others read 1 as well.
    assert results["miss_rate"]["Reasonable_occ=heavy"] == 0
    written = json.loads((tmp_path / f"miss_rate_{dataset}.json").read_text())
    assert written["missing_point"] == "official" and "wraps" in written["missing_point_rule"]
    heavy = written["setups"]["Reasonable_occ=heavy"]
    assert (heavy["height"], heavy["visibility"]) == ([50, 1e10], [0.2, 0.65])
    assert heavy["reference_miss"] == [0] * 9
    assert heavy["curve"]["fppi"] == [0.25, 0.25]
    assert heavy["curve"]["miss"] == [1, 0]
    assert heavy["curve"]["score"] == pytest.approx([0.6, 0.5])
    assert written["setups"]["small"]["num_ground_truth"] == 1
    assert written["setups"]["middle"]["reference_miss"] is None  # nobody of this size
    assert results["miss_rate"]["middle"] == -100.0
    print_csv_format(results)  # what Detectron2's trainer does with them


def test_setups_and_rule_are_passed_on(dataset, tmp_path):
    evaluator = PedestrianEvaluator(dataset, str(tmp_path), "matlab", ["heavy", "large"])
    assert list(run(evaluator)["miss_rate"]) == ["heavy", "large"]
    written = json.loads((tmp_path / f"miss_rate_{dataset}.json").read_text())
    assert list(written["setups"]) == ["heavy", "large"]
    assert written["setups"]["heavy"]["reference_miss"] == [1] * 6 + [0] * 3


@rule("Reports name protocol and rules")
@pytest.mark.parametrize("name", ["citypersons", "caltech"])
def test_the_report_says_protocol_and_rules(dataset, tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    results = run(PedestrianEvaluator(dataset, str(tmp_path), protocol=name))
    protocol = PROTOCOLS[name]
    assert list(results["miss_rate"]) == list(protocol.setups)
    written = json.loads((tmp_path / f"miss_rate_{dataset}.json").read_text())
    assert written["protocol"] == name and written["missing_point"] == protocol.missing_point
    assert written["rules"] == json.loads(json.dumps(protocol.rules()))
    assert written["setups"]["All"]["height"] == [20, 1e10]
    assert f"by protocol {name}" in caplog.text


def test_crowdhumans_scores(dataset, tmp_path):
    results = run(PedestrianEvaluator(dataset, str(tmp_path), protocol="crowdhuman"))
    # Both ignored boxes absorb, 0.65 is a duplicate and 0.6 a rider. By score: 0.95 hit, 0.7 hit,
    # 0.65 false, 0.6 false, 0.5 hit: recall 1/3, 2/3, 2/3, 2/3, 1, precision 1, 1, 2/3, 1/2, 3/5.
    # Left of the first point nothing counts: 1/3 (1 + 1)/2 + 1/3 (1/2 + 3/5)/2 = 31/60.
    assert results["crowdhuman"]["AP"] == pytest.approx(100 * 31 / 60)
    assert results["bbox"]["AP"] > 0 and "miss_rate" not in results
    written = json.loads((tmp_path / f"crowdhuman_{dataset}.json").read_text())
    assert written["rules"]["matching"] == "weight"
    assert written["scores"] == results["crowdhuman"]
    assert written["curve"]["fppi"] == [0, 0, 0.25, 0.5, 0.5]


def test_what_protocols_read_is_passed_on():
    rows = records()
    rows[0]["annotations"][0] |= {"occlusion": 40, "truncation": 10, "label": "pedestrian"}
    first, second, *_ = coco_ground_truth(rows)["annotations"]
    assert (first["occlusion"], first["truncation"], first["label"]) == (40, 10, "pedestrian")
    assert not {"occlusion", "truncation", "label"} & second.keys()
    with pytest.raises(ValueError, match=r"annotations\[1\] has no 'occlusion'"):
        coco_ground_truth(rows, protocol="kaist")


def test_the_written_detections_score_the_same(dataset, tmp_path):
    results = run(PedestrianEvaluator(dataset, str(tmp_path)))
    ground_truth = coco_ground_truth(records())
    path = tmp_path / f"detections_{dataset}.json"
    detections = load_detections(path, ground_truth)
    assert len(detections) == 7 and {row["category_id"] for row in detections} == {1}
    again = evaluate_miss_rate(ground_truth, detections)
    assert {name: result.miss_rate for name, result in again.items()} == results["miss_rate"]


def test_average_precision_equals_detectron2s(dataset, tmp_path):
    """Ignored boxes written as crowds into a COCO file, scored by Detectron2's evaluator."""
    ground_truth = coco_ground_truth(records())
    for row in ground_truth["annotations"]:
        row["iscrowd"] = row["ignore"]
        row["area"] = row["bbox"][2] * row["bbox"][3]
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    reference_name = f"{NAME}_reference"
    MetadataCatalog.get(reference_name).set(
        json_file=str(tmp_path / "gt.json"),
        thing_classes=["pedestrian"],
        thing_dataset_id_to_contiguous_id={1: 0},
    )
    pedestrians = {
        image: [row for row in rows if row[2] == 0] for image, rows in PREDICTIONS.items()
    }
    reference = COCOEvaluator(reference_name, ("bbox",), False, use_fast_impl=False)
    expected = run(reference, pedestrians)["bbox"]
    MetadataCatalog.remove(reference_name)
    got = run(PedestrianEvaluator(dataset))["bbox"]
    assert 0 < got["AP"] < got["AP50"]
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert got[name] == pytest.approx(expected[name], nan_ok=True, abs=0)


def test_another_class_can_be_the_pedestrian(dataset):
    results = run(PedestrianEvaluator(dataset, category=1))
    # one rider, and one detection of class 1, in another image, before which nothing is found
    assert results["miss_rate"]["Reasonable"] == 100
    assert results["bbox"]["AP"] == 0


def test_no_detections(dataset, tmp_path):
    nothing = {image: [] for image in PREDICTIONS}
    results = run(PedestrianEvaluator(dataset, str(tmp_path)), nothing)
    assert results["miss_rate"]["Reasonable"] == 100
    assert results["bbox"]["AP"] == 0 and math.isnan(results["bbox"]["APs"])
    assert json.loads((tmp_path / f"detections_{dataset}.json").read_text()) == []


def test_log_names_the_rule_and_partial_runs(dataset, caplog):
    caplog.set_level(logging.INFO)
    evaluator = PedestrianEvaluator(dataset, missing_point="matlab")
    evaluator.process([records()[0]], [{"instances": instances(PREDICTIONS[2])}])
    evaluator.evaluate()
    assert "saw 1 of the 4 images" in caplog.text
    assert "missing reference points: matlab, recall 0" in caplog.text
    assert "reference points, because" not in caplog.text  # the curve starts with a person
    evaluator.reset()
    assert evaluator.evaluate()["miss_rate"]["Reasonable"] == 100


def test_bad_use_is_refused(dataset):
    with pytest.raises(ValueError, match="missing_point is 'none'"):
        PedestrianEvaluator(dataset, missing_point="none")
    with pytest.raises(ValueError, match="setup 'Night' is unknown"):
        PedestrianEvaluator(dataset, setups=["Night"])
    with pytest.raises(ValueError, match="protocol 'ecp' is unknown"):
        PedestrianEvaluator(dataset, protocol="ecp")
    with pytest.raises(ValueError, match="Image 77 is not in dataset"):
        PedestrianEvaluator(dataset).process([{"image_id": 77}], [{"instances": instances([])}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[2].pop("image_id"), r"record 2 .*some/where/3.png has no 'image_id'"),
        (lambda rows: rows[0]["annotations"][0].pop("bbox"), r"2.png has no 'bbox'"),
        (lambda rows: rows[0].update(image_id=5), "image id twice"),
        (lambda rows: rows[0].update(image_id="2"), "id '2'; make it an integer"),
        (lambda rows: rows[0]["annotations"][0].update(bbox_mode=BoxMode.XYWHA_ABS), "bbox_mode"),
    ],
)
def test_malformed_records_are_named(change, message):
    rows = records()
    change(rows)
    with pytest.raises(ValueError, match=message):
        coco_ground_truth(rows)


def evaluate_on_rank(rank, output_dir):
    DatasetCatalog.register(NAME, records)
    evaluator = PedestrianEvaluator(NAME, output_dir)
    # both see the second image, as a sampler that pads the last round makes them
    for row in records()[:2] if rank == 0 else records()[1:]:
        evaluator.process([row], [{"instances": instances(PREDICTIONS[row["image_id"]])}])
    results = evaluator.evaluate()
    Path(output_dir, f"rank{rank}.json").write_text(json.dumps(results))


@pytest.mark.long
def test_two_processes_score_as_one(dataset, tmp_path):
    run_in_two_processes(evaluate_on_rank, str(tmp_path))
    expected = run(PedestrianEvaluator(dataset))
    results = json.loads((tmp_path / "rank0.json").read_text())
    assert results["miss_rate"] == expected["miss_rate"]
    np.testing.assert_equal(results["bbox"], expected["bbox"])  # NaN equals NaN
    assert json.loads((tmp_path / "rank1.json").read_text()) == {}


@needs_citypersons
def test_validation_set_survives_the_way_through_records():
    ground_truth = load_ground_truth(CITYPERSONS / "val_gt.json")
    by_image = {image["id"]: [] for image in ground_truth["images"]}
    for row in ground_truth["annotations"]:
        keys = ("bbox", "iscrowd", "ignore", "vis_ratio")
        by_image[row["image_id"]].append(
            {key: row[key] for key in keys} | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        )
    rebuilt = coco_ground_truth(
        [
            {
                "file_name": f"val/{image['im_name']}",
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": by_image[image["id"]],
            }
            for image in ground_truth["images"]
        ]
    )
    assert rebuilt["images"] == ground_truth["images"]
    for row in ground_truth["annotations"]:
        del row["vis_bbox"]
    assert rebuilt["annotations"] == ground_truth["annotations"]


def test_the_pedestrians_class_is_told_by_its_name(dataset, tmp_path):
    assert pedestrian_class(dataset) == 0
    MetadataCatalog.remove(dataset)
    assert pedestrian_class(dataset) == 0  # no names
    metadata = MetadataCatalog.get(dataset)
    metadata.thing_classes = ["rider", "pedestrian"]
    metadata.thing_dataset_id_to_contiguous_id = {4: 0, 7: 1}
    assert pedestrian_class(dataset) == 1
    run(PedestrianEvaluator(dataset, output_dir=str(tmp_path)))
    written = json.loads((tmp_path / f"detections_{dataset}.json").read_text())
    # That of class 1 alone, under its number in the data set's own file.
    assert [(row["image_id"], row["category_id"]) for row in written] == [(2, 7)]


def test_a_test_set_without_anybody_to_find_is_refused(dataset):
    counts = check_test_set(dataset, records())
    assert counts["All"] > 0
    nobody = [record | {"annotations": []} for record in records()]
    with pytest.raises(ValueError, match="nobody to find .*: it has no box of a pedestrian"):
        check_test_set(dataset, nobody)
    with pytest.raises(ValueError, match="lie outside the ranges of the setups Reasonable"):
        check_test_set(dataset, records(), height_scale=100)
