"""Pedestrian detection scores inside Detectron2: log-average miss rate beside COCO AP."""

import hkd_d2._requirements  # noqa: F401  isort: skip

import contextlib
import io
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import detectron2.utils.comm as comm
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_d2.data.annotation_rules import ignore_flags, pedestrian_category
from hkd_d2.evaluation.coco_rows import PEDESTRIAN, check_ground_truth, read_truth
from hkd_d2.evaluation.crowdhuman import CrowdHumanResult, evaluate_crowdhuman
from hkd_d2.evaluation.matching import countable
from hkd_d2.evaluation.miss_rate import MissRateResult, evaluate_miss_rate, format_table
from hkd_d2.evaluation.protocols import (
    CITYPERSONS,
    MISSING_POINTS,
    CrowdHumanProtocol,
    Protocol,
    Setup,
    select_protocol,
    select_setups,
)
from hkd_d2.files import write_text

__all__ = [
    "EXTRA_KEYS",
    "PedestrianEvaluator",
    "check_test_set",
    "coco_ground_truth",
    "pedestrian_class",
]

# What some protocols read of an annotation, passed on as it is.
EXTRA_KEYS = ("occlusion", "truncation", "label")

logger = logging.getLogger(__name__)


class PedestrianEvaluator(DatasetEvaluator):
    """Log-average miss rate of every setup, and COCO AP, of one class of a registered dataset.

    Results are ``{"miss_rate": {setup: percent}, "bbox": {"AP", "AP50", "AP75", "APs", "APm",
    "APl"}}``, all in percent; see :mod:`hkd_d2.evaluation.miss_rate`. By CrowdHuman's protocol
    ``"crowdhuman": {"AP", "MR^-2", "JI"}`` is in the place of ``"miss_rate"``. For COCO's AP every
    box that is not ignored counts, whatever its height, and ignored boxes are COCO crowds; the 100
    detections of highest score in an image take part, and an AP without any countable box is NaN.

    Works in distributed evaluation, where the main process has the results and the others get an
    empty dict. An image that several processes evaluate counts once.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        missing_point: str | None = None,
        setups: Mapping[str, Setup] | Iterable[str] | None = None,
        category: int | None = None,
        predicted_class: int | None = None,
        protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
        height_scale: float = 1.0,
    ):
        """
        Args:
            dataset_name: a dataset in ``DatasetCatalog``; :func:`coco_ground_truth` says which keys
                of its records are read.
            output_dir: where ``detections_<dataset>.json`` (COCO results, of the category that the
                pedestrians have in the data set's own file, else 1) and
                ``miss_rate_<dataset>.json`` (scores, curves and rules) go; None writes nothing.
            missing_point: a key of :data:`hkd_d2.evaluation.protocols.MISSING_POINTS`; None for the
                protocol's.
            setups: names out of the protocol's setups, or setups of your own by name; None for all
                of the protocol's.
            category: contiguous class index of the pedestrians; None for the one that the data
                set's class names tell (:func:`pedestrian_class`).
            predicted_class: the detector's own index of that class where its class list is another,
                as a COCO model's; None for ``category``.
            protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.
            height_scale: of resized images
                (:meth:`hkd_d2.evaluation.protocols.Protocol.scaled`).

        Raises:
            ValueError: on an unknown ``missing_point``, setup or ``protocol``, or on malformed
                records.
        """
        protocol = _scaled(protocol, height_scale)
        if isinstance(protocol, Protocol):
            protocol = replace(protocol, missing_point=missing_point or protocol.missing_point)
            if protocol.missing_point not in MISSING_POINTS:
                raise ValueError(
                    f"missing_point is {missing_point!r}; choose one of "
                    f"{', '.join(MISSING_POINTS)}."
                )
            self._setups = select_setups(setups, protocol)
        self._protocol = protocol
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        category = pedestrian_class(dataset_name) if category is None else category
        self._predicted_class = category if predicted_class is None else predicted_class
        self._file_category = _file_category(dataset_name, category)
        self._ground_truth = coco_ground_truth(DatasetCatalog.get(dataset_name), category, protocol)
        self._image_ids = {image["id"] for image in self._ground_truth["images"]}
        self.reset()

    def reset(self):
        self._detections = {}  # image id -> its detections, in COCO's result format

    def process(self, inputs: list[dict], outputs: list[dict]):
        """Keep the detections of a batch.

        Args:
            inputs: dataset records, each with its ``image_id``.
            outputs: the model's, each with ``instances`` in pixels of the original image:
                ``pred_boxes`` (R, 4), ``scores`` (R,) and ``pred_classes`` (R,).

        Raises:
            ValueError: if an image is not one of the dataset.
        """
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            if image_id not in self._image_ids:
                raise ValueError(
                    f"Image {image_id!r} is not in dataset {self._dataset_name!r}; evaluate with "
                    "the data loader of this dataset."
                )
            self._detections[image_id] = _coco_detections(
                output["instances"], image_id, self._predicted_class
            )

    def evaluate(self) -> OrderedDict:
        """Score everything processed since :meth:`reset`.

        Returns:
            the two groups of scores on the main process, an empty dict on the others.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        by_image = {image: rows for part in gathered for image, rows in part.items()}
        if len(by_image) < len(self._image_ids):
            logger.warning(
                "The model saw %d of the %d images of %s; the others count as images without "
                "detections.",
                len(by_image),
                len(self._image_ids),
                self._dataset_name,
            )
        detections = [row for image in sorted(by_image) for row in by_image[image]]
        own = {"category_id": self._file_category}
        self._write("detections", [row | own for row in detections])

        if isinstance(self._protocol, CrowdHumanProtocol):
            scores = {"crowdhuman": self._score_crowdhuman(detections)}
        else:
            scores = {"miss_rate": self._score_miss_rate(detections)}
        average_precision = _coco_average_precision(self._ground_truth, detections)
        logger.info("COCO AP on %s:\n%s", self._dataset_name, create_small_table(average_precision))
        return OrderedDict(**scores, bbox=average_precision)

    def _score_miss_rate(self, detections: list[dict]) -> dict[str, float]:
        results = evaluate_miss_rate(
            self._ground_truth, detections, self._setups, protocol=self._protocol
        )
        self._write("miss_rate", self._describe(results))
        missing_point = self._protocol.missing_point
        logger.info(
            "Log-average miss rate on %s by protocol %s (missing reference points: %s, %s):\n%s",
            self._dataset_name,
            self._protocol.name,
            missing_point,
            MISSING_POINTS[missing_point],
            format_table(results),
        )
        return {name: result.miss_rate for name, result in results.items()}

    def _score_crowdhuman(self, detections: list[dict]) -> dict[str, float]:
        result = evaluate_crowdhuman(self._ground_truth, detections, self._protocol)
        self._write("crowdhuman", self._describe_crowdhuman(result))
        table = create_small_table(result.percent())
        logger.info("CrowdHuman's scores on %s:\n%s", self._dataset_name, table)
        return result.percent()

    def _describe_crowdhuman(self, result: CrowdHumanResult) -> dict[str, Any]:
        countable = result.num_ground_truth > 0
        return {
            "dataset": self._dataset_name,
            "num_images": len(self._image_ids),
            "protocol": self._protocol.name,
            "rules": self._protocol.rules(),
            "num_ground_truth": result.num_ground_truth,
            "num_detections": result.num_detections,
            "scores": result.percent() if countable else None,
            "curve": {
                "score": result.scores.tolist(),
                "fppi": result.fppi.tolist(),
                "miss": result.miss.tolist() if countable else None,
                "precision": result.precision.tolist(),
            },
        }

    def _describe(self, results: Mapping[str, MissRateResult]) -> dict[str, Any]:
        """Scores, curves and the rules behind them, ready for JSON."""
        setups = {}
        for name, result in results.items():
            countable = result.num_ground_truth > 0
            setups[name] = {
                **result.setup.ranges(),
                "num_ground_truth": result.num_ground_truth,
                "num_detections": result.num_detections,
                "miss_rate": result.miss_rate,
                "reference_miss": result.reference_miss.tolist() if countable else None,
                "curve": {
                    "score": result.scores.tolist(),
                    "fppi": result.fppi.tolist(),
                    "miss": result.miss.tolist() if countable else None,
                },
            }
        return {
            "dataset": self._dataset_name,
            "num_images": len(self._image_ids),
            "protocol": self._protocol.name,
            "rules": self._protocol.rules(),
            "missing_point": self._protocol.missing_point,
            "missing_point_rule": MISSING_POINTS[self._protocol.missing_point],
            "reference_fppi": list(self._protocol.reference_fppi),
            "setups": setups,
        }

    def _write(self, what: str, content) -> None:
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            path = os.path.join(self._output_dir, f"{what}_{self._dataset_name}.json")
            write_text(path, json.dumps(content))
            logger.info("Wrote %s", path)


def _scaled(
    protocol: Protocol | CrowdHumanProtocol | str, height_scale: float
) -> Protocol | CrowdHumanProtocol:
    protocol = select_protocol(protocol)
    if height_scale == 1:
        return protocol
    if isinstance(protocol, CrowdHumanProtocol):
        raise ValueError(
            "HKD.EVALUATION.HEIGHT_SCALE is set and protocol 'crowdhuman' has no heights; leave it "
            "at 1."
        )
    return protocol.scaled(height_scale)


def pedestrian_class(dataset_name: str) -> int:
    """Contiguous class index of the pedestrians of a registered data set; 0 without class names.

    Raises:
        ValueError: the class names do not tell; the message lists them.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    if not names:
        return 0
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return pedestrian_category(categories, range(len(names)), f"Data set {dataset_name!r}")


def _file_category(dataset_name: str, category: int) -> int:
    """The category's id in the data set's own file."""
    numbers = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id", {})
    return next((own for own, number in numbers.items() if number == category), PEDESTRIAN)


def check_test_set(
    dataset_name: str,
    records: list[dict],
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
    height_scale: float = 1.0,
) -> dict[str, int]:
    """Check that a test set has somebody to find, before hours go into a model for it.

    Args:
        dataset_name: a registered data set.
        records: its records.
        protocol: the rules, or a name out of :data:`hkd_d2.evaluation.protocols.PROTOCOLS`.
        height_scale: of resized images.

    Returns:
        How many pedestrians each setup counts, before any rule that asks what was detected.

    Raises:
        ValueError: no setup counts anybody; the message says why.
    """
    protocol = _scaled(protocol, height_scale)
    category = pedestrian_class(dataset_name)
    truth = read_truth(coco_ground_truth(records, category, protocol), "the ground truth", protocol)
    if isinstance(protocol, CrowdHumanProtocol):
        counts = {"all": int((~truth.ignore).sum())}
    else:
        counts = {
            name: int(countable(setup, truth, protocol).sum())
            for name, setup in protocol.setups.items()
        }
    if not any(counts.values()):
        rows, ignored = len(truth.ignore), int(truth.ignore.sum())
        why = (
            "it has no box of a pedestrian"
            if not rows
            else f"of its {rows} boxes of pedestrians {ignored} are ignored, and the others lie "
            f"outside the ranges of the setups {', '.join(counts)}"
        )
        raise ValueError(
            f"Test set {dataset_name!r} has nobody to find by protocol {protocol.name!r}: {why}; "
            "choose another DATASETS.TEST or HKD.EVALUATION.PROTOCOL, or leave DATASETS.TEST empty."
        )
    return counts


def coco_ground_truth(
    dataset_dicts: list[dict],
    category: int = 0,
    protocol: Protocol | CrowdHumanProtocol | str = CITYPERSONS,
) -> dict[str, Any]:
    """Turn Detectron2 records into ground truth for :func:`evaluate_miss_rate`.

    The result has the layout of CityPersons' ``val_gt.json``: annotations with ``id`` (the
    records' own where all have one and no two the same, else from 1, in order), ``image_id``,
    ``category_id`` 1, ``iscrowd``, ``ignore``, ``bbox`` [x, y, w, h], ``height`` and
    ``vis_ratio``, and what else of :data:`EXTRA_KEYS` a record has.

    Args:
        dataset_dicts: records with ``file_name``, ``image_id`` (int), ``height``, ``width`` and
            ``annotations``, each with ``bbox``, ``bbox_mode`` (XYWH_ABS or XYXY_ABS) and
            ``category_id``, and where it applies ``iscrowd``, ``ignore`` (0 or 1; a crowd is
            ignored in any case), ``vis_ratio`` (1 where missing) and ``height`` (the box's).
        category: contiguous index of the pedestrians; annotations of other classes are left out.
        protocol: by whose rules the result will be evaluated: what it has to have.

    Raises:
        ValueError: if a record lacks a key, has a box in another mode, or if image ids are not
            unique integers.
    """
    images, annotations = [], []
    for row, record in enumerate(dataset_dicts):
        _require(record, ("file_name", "image_id", "height", "width", "annotations"), row)
        images.append(
            {
                "id": record["image_id"],
                "im_name": os.path.basename(record["file_name"]),
                "height": record["height"],
                "width": record["width"],
            }
        )
        for annotation in record["annotations"]:
            _require(annotation, ("category_id", "bbox", "bbox_mode"), row, record["file_name"])
            if annotation["category_id"] != category:
                continue
            box = _xywh(annotation, record["file_name"])
            ignore, crowd = ignore_flags(annotation, f"An annotation of {record['file_name']}")
            annotations.append(
                {
                    "id": annotation.get("id"),
                    "image_id": record["image_id"],
                    "category_id": PEDESTRIAN,
                    "iscrowd": crowd,
                    "ignore": int(ignore or crowd),
                    "bbox": box,
                    "height": annotation.get("height", box[3]),
                    "vis_ratio": annotation.get("vis_ratio", 1.0),
                }
                | {key: annotation[key] for key in EXTRA_KEYS if key in annotation}
            )
    ids = {row["id"] for row in annotations}
    if None in ids or len(ids) < len(annotations):
        for number, row in enumerate(annotations, 1):
            row["id"] = number
    ground_truth = {
        "images": images,
        "categories": [{"id": PEDESTRIAN, "name": "pedestrian"}],
        "annotations": annotations,
    }
    check_ground_truth(ground_truth, "the dataset's ground truth", protocol)
    return ground_truth


def _require(content: dict, keys: tuple[str, ...], row: int, owner: str = "") -> None:
    for key in keys:
        if key not in content:
            what = f"An annotation of {owner}" if owner else content.get("file_name", "It")
            raise ValueError(
                f"Dataset record {row} is incomplete: {what} has no {key!r}; "
                "add it where the dataset is loaded."
            )


def _xywh(annotation: dict, file_name: str) -> list[float]:
    # BoxMode.convert takes a list through float32; a height at the bound of a setup must not move.
    x, y, c, d = annotation["bbox"]
    mode = annotation["bbox_mode"]
    if mode == BoxMode.XYWH_ABS:
        return [x, y, c, d]
    if mode == BoxMode.XYXY_ABS:
        return [x, y, c - x, d - y]
    raise ValueError(
        f"An annotation of {file_name} has bbox_mode {mode!r}; load boxes as XYWH_ABS or XYXY_ABS."
    )


def _coco_detections(instances: Instances, image_id: int, category: int) -> list[dict[str, Any]]:
    boxes = BoxMode.convert(
        instances.pred_boxes.tensor.detach().cpu().float(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    )
    return [
        {"image_id": image_id, "category_id": PEDESTRIAN, "bbox": box, "score": score}
        for box, score, label in zip(
            boxes.tolist(),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            strict=True,
        )
        if label == category
    ]


def _coco_average_precision(ground_truth: dict, detections: list[dict]) -> dict[str, float]:
    # pycocotools overwrites ``ignore`` by ``iscrowd``, and wants areas and ids from 1.
    truth = [
        row | {"id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": row["ignore"]}
        for number, row in enumerate(ground_truth["annotations"], 1)
    ]
    found = [
        row | {"id": number, "area": row["bbox"][2] * row["bbox"][3]}
        for number, row in enumerate(detections, 1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _coco_index(ground_truth, truth), _coco_index(ground_truth, found), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {
        name: float(value) * 100 if value >= 0 else float("nan")
        for name, value in zip(names, evaluation.stats[: len(names)], strict=True)
    }


def _coco_index(ground_truth: dict, annotations: list[dict]) -> COCO:
    # COCO.loadRes fails on an empty list, so the index is built by hand.
    index = COCO()
    index.dataset = ground_truth | {"annotations": annotations}
    index.createIndex()
    return index
