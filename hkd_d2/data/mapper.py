"""The rule for pedestrians in training, and the mapper that keeps the others as ignore rows."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode
from PIL import Image

from hkd_d2.data.image_files import size_sentence
from hkd_d2.data.images import read_data_image


def is_ignored(annotation: dict, min_height: float, min_visibility: float) -> bool:
    """Tell whether training ignores a row: flagged, a crowd, too small or too hidden.

    Args:
        annotation: a row of a record (see :mod:`hkd_d2.data.datasets.records`); ``ignore``,
            ``iscrowd`` and ``vis_ratio`` may be missing.
        min_height: pixels of the original image; a box of exactly this height counts.
        min_visibility: visible share of the body; exactly this share counts.
    """
    height = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)[3]
    return bool(
        annotation.get("ignore", 0)
        or annotation.get("iscrowd", 0)
        or height < min_height
        or annotation.get("vis_ratio", 1.0) < min_visibility
    )


def training_counts(
    records: list[dict], min_height: float = 50, min_visibility: float = 0.0
) -> dict[str, int]:
    """Count what training sees.

    Args:
        records: see :mod:`hkd_d2.data.datasets.records`.
        min_height, min_visibility: see :func:`is_ignored`.

    Returns:
        dict: ``images``, ``rows``, ``pedestrians`` (rows that the file does not ignore),
        ``positives`` (rows that training does not ignore) and ``positive_images`` (images with
        any).
    """
    positives = [
        sum(not is_ignored(row, min_height, min_visibility) for row in r["annotations"])
        for r in records
    ]
    rows = [row for r in records for row in r["annotations"]]
    return {
        "images": len(records),
        "rows": len(rows),
        "pedestrians": sum(not (row.get("ignore") or row.get("iscrowd")) for row in rows),
        "positives": sum(positives),
        "positive_images": sum(n > 0 for n in positives),
    }


class UnusableRecord(ValueError):
    """An image of a data set cannot be used: one sentence that names it.

    PyTorch raises an error of a loader's worker again with a text that holds all of the worker's
    traceback, and the sentence last; here only the sentence is kept.
    """

    def __init__(self, text: str):
        super().__init__(text.rsplit("UnusableRecord: ", 1)[-1].strip())


class PedestrianMapper(DatasetMapper):
    """Detectron2's DatasetMapper, but rows that do not count stay as ignore rows.

    Detectron2 drops crowds, so that the persons in them become background. Here every row stays.
    Images, boxes of rows that count, and random numbers drawn equal those of DatasetMapper.

    In training ``instances`` has, for R boxes in pixels of the augmented image:

    - ``gt_boxes`` (Boxes, (R, 4) float32 XYXY), clipped to the image; empty ones are dropped
    - ``gt_classes`` ((R,) int64), -1 for ignore rows
    - ``gt_ignore`` ((R,) bool), see :func:`is_ignored`
    - ``gt_visible_boxes`` (Boxes, (R, 4) float32 XYXY), clipped alike; equal to ``gt_boxes`` where
      the visible part is unknown or was cropped away
    """

    @configurable
    def __init__(self, is_train: bool, *, min_height: float, min_visibility: float, **kwargs):
        """
        Args:
            is_train: whether annotations are wanted.
            min_height, min_visibility: see :func:`is_ignored`.
            kwargs: of DatasetMapper.

        Raises:
            ValueError: masks, keypoints or precomputed proposals are configured.
        """
        super().__init__(is_train, **kwargs)
        if self.use_instance_mask or self.use_keypoint or self.proposal_topk is not None:
            raise ValueError(
                "PedestrianMapper gives boxes only; set MODEL.MASK_ON, MODEL.KEYPOINT_ON and "
                "MODEL.LOAD_PROPOSALS to False."
            )
        self.min_height = min_height
        self.min_visibility = min_visibility

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {
            **super().from_config(cfg, is_train),
            "min_height": cfg.HKD.DATA.MIN_HEIGHT,
            "min_visibility": cfg.HKD.DATA.MIN_VISIBILITY,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: a record (see :mod:`hkd_d2.data.datasets.records`).

        Returns:
            dict: the record with ``image`` ((C, H, W) uint8 tensor in INPUT.FORMAT) and, in
            training, ``instances``.

        Raises:
            UnusableRecord: a ValueError; the image cannot be read, its size is not the record's, or
                nothing of it is left after resizing.
        """
        record = copy.deepcopy(dataset_dict)
        path = record["file_name"]
        try:
            image = read_data_image(path)
        except (ValueError, OSError) as error:
            raise UnusableRecord(str(error)) from error
        size = image.shape[:2]
        stated = record.setdefault("height", size[0]), record.setdefault("width", size[1])
        if size != stated:
            raise UnusableRecord(size_sentence(path, stated, size))
        if self.image_format != "RGB":
            image = utils.convert_PIL_to_numpy(Image.fromarray(image), self.image_format)
        seen = T.AugInput(image)
        try:
            transforms = self.augmentations(seen)
        except ValueError as error:
            raise UnusableRecord(
                f"The image '{path}' of {size[1]}x{size[0]} pixels cannot be resized or cropped "
                f"({error}); cut or remove it, or change INPUT."
            ) from error
        record["image"] = torch.as_tensor(np.array(seen.image.transpose(2, 0, 1), order="C"))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, seen.image.shape[:2])
        return record

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        rows = dataset_dict.pop("annotations")
        ignore = [is_ignored(row, self.min_height, self.min_visibility) for row in rows]
        full = self._boxes(rows, "bbox", transforms, image_shape)
        visible = self._boxes(rows, "vis_bbox", transforms, image_shape)

        instances = utils.annotations_to_instances(full, image_shape)
        instances.gt_ignore = torch.tensor(ignore, dtype=torch.bool)
        instances.gt_classes[instances.gt_ignore] = -1
        boxes = instances.gt_boxes.tensor
        visible = utils.annotations_to_instances(visible, image_shape).gt_boxes
        known = visible.nonempty(threshold=1e-5)[:, None]
        instances.gt_visible_boxes = Boxes(torch.where(known, visible.tensor, boxes))
        dataset_dict["instances"] = utils.filter_empty_instances(instances)

    @staticmethod
    def _boxes(rows, key, transforms, image_shape):
        return [
            utils.transform_instance_annotations(
                {
                    "bbox": row.get(key, [0, 0, 0, 0]),
                    "bbox_mode": row["bbox_mode"],
                    "category_id": row["category_id"],
                },
                transforms,
                image_shape,
            )
            for row in rows
        ]
