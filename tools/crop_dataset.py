#!/usr/bin/env python
"""Cut crops of objects and of background from detection data sets, to pre-train a backbone on.

    python tools/crop_dataset.py --config-file configs/student_citypersons.yaml --out crops
    python tools/pretrain_backbone.py --config-file configs/pretraining/hsakd_folder.yaml \\
        HKD.PRETRAINING.ROOT crops

Writes train and val with one folder a class in each. A crop is a square around an object that
training counts (HKD.DATA.MIN_HEIGHT and MIN_VISIBILITY), or one of an object's size where there is
none. Data sets are DATASETS.TRAIN and DATASETS.TEST of the config, or those of --train and --val;
HKD.DATA.REGISTER registers more.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip
import hkd_d2._quiet  # noqa: F401  isort: skip

import argparse
import os
import sys
from collections import Counter

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from hkd_d2.config import add_hkd_config
from hkd_d2.data.crops import Crop, check_crop_target, plan_crops, write_crops
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.data.image_files import check_image_files


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", help="such as configs/student_citypersons.yaml")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="empty or not there")
    for split, key in (("train", "DATASETS.TRAIN"), ("val", "DATASETS.TEST")):
        parser.add_argument(
            f"--{split}", type=lambda text: text.split(","), metavar="A,B", help=f"[{key}]"
        )
    parser.add_argument("--size", type=int, default=128, help="largest side, pixels [%(default)s]")
    parser.add_argument(
        "--context",
        type=float,
        default=0.1,
        help="added on every side, in parts of the longer side of the box [%(default)s]",
    )
    parser.add_argument(
        "--background",
        type=float,
        default=1.0,
        help="crops of the background for each object [%(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the background's places")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(argv)
    for name, least in (("size", 8), ("context", 0.0), ("background", 0.0), ("seed", 0)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name} is {getattr(args, name)}; give at least {least}")
    return args


def plan_split(args, cfg, split: str, names: list[str]) -> tuple[list[dict], list[Crop]]:
    """Records and crops of the data sets of a split, their images looked at."""
    if not names:
        raise ValueError(
            f"There is no data set for {split}; name one with --{split}, or in the config."
        )
    records, classes = [], None
    for name in names:
        found = check_records(name)
        check_image_files(found, name)
        records += found
        theirs = list(MetadataCatalog.get(name).thing_classes)
        if theirs != (classes or theirs):
            raise ValueError(
                f"'{name}' has other classes than '{names[0]}'; give sets with one list."
            )
        classes = theirs
    node = cfg.HKD.DATA
    try:
        crops = plan_crops(
            records,
            classes,
            min_height=node.MIN_HEIGHT,
            min_visibility=node.MIN_VISIBILITY,
            context=args.context,
            background=args.background,
            seed=args.seed,
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from error
    return records, crops


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        check_crop_target(args.out)
        cfg = get_cfg()
        add_hkd_config(cfg)
        if args.config_file:
            if not os.path.isfile(args.config_file):
                raise FileNotFoundError(f"The config file '{args.config_file}' does not exist.")
            cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        register_datasets(cfg)
        names = {
            "train": args.train or list(cfg.DATASETS.TRAIN),
            "val": args.val or list(cfg.DATASETS.TEST),
        }
        splits = {split: plan_split(args, cfg, split, names[split]) for split in names}
        write_crops(args.out, splits, args.size)
    except (ValueError, OSError) as error:
        if os.environ.get("HKD_TRACEBACK"):
            raise
        sys.exit(f"crop_dataset.py: {error}")
    for split, (_, crops) in splits.items():
        counts = Counter(crop.label for crop in crops)
        print(f"{args.out}/{split}: {', '.join(f'{n} {label}' for label, n in counts.items())}")


if __name__ == "__main__":
    main()
