"""The images a run trains on, and the loader that mixes labelled and pseudo-labelled ones."""

import itertools
import logging
import os
from fractions import Fraction

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch.utils.data import Sampler

from hkd_d2.data.datasets import check_records
from hkd_d2.data.pseudo_labels import (
    check_pseudo_label_teacher,
    file_sha256,
    in_classes_of,
    read_pseudo_labels,
)

# Seed of the draw of LABELED_SHARE: the same images in every run, whatever its SEED.
SHARE_SEED = 0


def labelled_sets(cfg: CfgNode) -> dict[str, list[dict]]:
    """The records of each data set of ``DATASETS.TRAIN`` whose labels the run may use.

    Of every set ``HKD.DATA.LABELED_SHARE`` is drawn; a larger share contains a smaller one.

    Raises:
        ValueError: a set that is not registered or empty, or a share that is none or rounds to no
            image of a set.
    """
    share = cfg.HKD.DATA.LABELED_SHARE
    if not 0 < share <= 1:
        raise ValueError(
            f"HKD.DATA.LABELED_SHARE is {share}; give a share above 0 and of at most 1."
        )
    sets = {name: check_records(name) for name in cfg.DATASETS.TRAIN}
    if share == 1:
        return sets
    part = {}
    for name, records in sets.items():
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SHARE_SEED))
        if round(share * len(records)) < 1:
            raise ValueError(
                f"HKD.DATA.LABELED_SHARE {share} of the {len(records)} images of '{name}' is less "
                f"than one image; raise it to {1 / len(records):.2g} at least."
            )
        chosen = order[: round(share * len(records))].sort().values
        part[name] = [records[i] for i in chosen.tolist()]
    return part


def pseudo_label_sets(cfg: CfgNode, labelled: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The records of each file of ``HKD.DATA.PSEUDO``, in the classes of the labelled sets.

    An image that is labelled too is left out, with a warning: its ground truth is better
    than a guess, and a file of a whole data set serves every labelled part of it.

    Raises:
        FileNotFoundError: a missing file or image.
        ValueError: a file that is named twice, is damaged or empty, shares an image with another
            file or with a test set, was made by another teacher than ``HKD.TEACHER.WEIGHTS``
            (where that is set), has other classes, or holds labelled images alone.
    """
    if not cfg.HKD.DATA.PSEUDO:
        return {}
    weights = cfg.HKD.TEACHER.WEIGHTS
    sha256 = file_sha256(weights) if weights else ""
    training_set = next(iter(labelled))
    classes = MetadataCatalog.get(training_set).get("thing_classes")
    if classes is None:
        raise ValueError(
            f"'{training_set}' has no class names to compare with those of HKD.DATA.PSEUDO; set "
            "thing_classes in its metadata."
        )
    taken = {_file(r): name for name, records in labelled.items() for r in records}
    tested = {_file(r): name for name in cfg.DATASETS.TEST for r in check_records(name)}
    files = [os.path.realpath(path) for path in cfg.HKD.DATA.PSEUDO]
    seen_in, pseudo_sets = {}, {}
    for path, file in zip(cfg.HKD.DATA.PSEUDO, files, strict=True):
        if files.count(file) > 1:
            raise ValueError(f"HKD.DATA.PSEUDO names the file '{path}' twice; name it once.")
        pseudo = read_pseudo_labels(path)
        if weights:
            check_pseudo_label_teacher(pseudo, weights, sha256)
        records = []
        for record in in_classes_of(pseudo, classes, cfg.HKD.TEACHER.CLASS_MAP):
            image = _file(record)
            if image in tested:
                raise ValueError(
                    f"{path}: the image '{image}' is in the test set '{tested[image]}' too; make "
                    "the file without the images of DATASETS.TEST."
                )
            if image in seen_in:
                raise ValueError(
                    f"{path}: the image '{image}' is in the file '{seen_in[image]}' too; make "
                    "files that have no image in common."
                )
            seen_in[image] = path
            if image not in taken:
                records.append(record)
        if not records:
            raise ValueError(
                f"{path}: the file is empty, all its {len(pseudo.records)} images are labelled in "
                "DATASETS.TRAIN; make a file of other images or lower HKD.DATA.LABELED_SHARE."
            )
        if len(records) < len(pseudo.records):
            log_first_n(
                logging.WARNING,
                f"{path}: {len(pseudo.records) - len(records)} of its {len(pseudo.records)} images "
                "are labelled in DATASETS.TRAIN and left out of it.",
                name=__name__,
                key="message",
            )
        pseudo_sets[path] = records
    return pseudo_sets


def build_train_loader(cfg: CfgNode, mapper) -> torch.utils.data.DataLoader:
    """Detectron2's training loader, over the labelled images or over these and pseudo-labels.

    Raises:
        ValueError, FileNotFoundError: see :func:`labelled_sets` and :func:`pseudo_label_sets`.
    """
    node = cfg.HKD.DATA
    if not node.PSEUDO and node.LABELED_SHARE == 1:
        return build_detection_train_loader(cfg, mapper=mapper)
    labelled = labelled_sets(cfg)
    pseudo_sets = pseudo_label_sets(cfg, labelled)
    labelled, pseudo = ([r for s in sets.values() for r in s] for sets in (labelled, pseudo_sets))
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        labelled, pseudo = map(filter_images_with_only_crowd_annotations, (labelled, pseudo))
    if not pseudo:
        return build_detection_train_loader(cfg, mapper=mapper, dataset=labelled)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}; with HKD.DATA.PSEUDO it "
            "has to be TrainingSampler."
        )
    return build_detection_train_loader(
        cfg,
        mapper=mapper,
        dataset=labelled + pseudo,
        sampler=MixedTrainingSampler(
            len(labelled),
            len(pseudo),
            ratio=node.PSEUDO_RATIO,
            batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        ),
        # It would gather batches by shape, whatever their kind.
        aspect_ratio_grouping=False,
    )


class MixedTrainingSampler(Sampler):
    """Endless indices of two kinds of images at a fixed ratio, each kind shuffled by itself.

    Two of Detectron2's ``TrainingSampler``, with the same seed on all processes and other images on
    each, are read in turn: of the first n images of the stream that the processes' batches make
    one after another, floor(n r / (1 + r)) are pseudo-labelled, r the ratio. So a batch, of a
    process and of all together, holds the ratio exactly where it can, and differs from it by less
    than one image where it cannot; at 1:1 single images alternate, labelled first.

    Args:
        labelled: number of labelled images, indices 0 to ``labelled`` - 1.
        pseudo: number of pseudo-labelled images, whose indices follow.
        ratio (float): pseudo-labelled images for each labelled one, 0.01 to 100.
        batch_size (int): images a process and step.
        seed (int): of the shuffles; None for one that the processes agree on.

    Raises:
        ValueError: a ratio out of range.
    """

    def __init__(self, labelled: int, pseudo: int, *, ratio=1.0, batch_size=1, seed=None):
        if not 0.01 <= ratio <= 100:
            raise ValueError(f"HKD.DATA.PSEUDO_RATIO is {ratio}; give a number from 0.01 to 100.")
        self.offset = labelled
        self.labelled = TrainingSampler(labelled, seed=seed)
        self.pseudo = TrainingSampler(pseudo, seed=None if seed is None else seed + 1)
        # Whole numbers, so that a long stream does not drift.
        ratio = Fraction(ratio).limit_denominator(1000)
        self.share = ratio / (1 + ratio)
        self.start = comm.get_rank() * batch_size

    def __iter__(self):
        labelled, pseudo = iter(self.labelled), (i + self.offset for i in self.pseudo)
        share = self.share
        for number in itertools.count(self.start):
            before, after = (n * share.numerator // share.denominator for n in (number, number + 1))
            yield next(pseudo if after > before else labelled)


def _file(record: dict) -> str:
    return os.path.realpath(record["file_name"])
