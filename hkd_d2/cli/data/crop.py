"""Cut crops of objects and of background from detection data sets, to pre-train a backbone on.

    hkd data crop --config-file student_citypersons.yaml --out crops
    hkd pretrain --config-file pretraining/hsakd_folder.yaml HKD.PRETRAINING.ROOT crops

Writes train and val with one folder a class in each. A crop is a square around an object that
training counts (HKD.DATA.MIN_HEIGHT and MIN_VISIBILITY), or one of an object's size where there is
none. Data sets are DATASETS.TRAIN and DATASETS.TEST of the config, or those of --train and --val.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from hkd_d2.cli.arguments import add_data, add_options, config_options, data_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="FILE", help="such as student_citypersons.yaml")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="empty or not there")
    for split in ("train", "val"):
        add_data(parser, f"--{split}", f"data of {split} instead, several names as A,B")
    parser.add_argument(
        "--size", type=int, default=128, metavar="N", help="largest side, pixels [%(default)s]"
    )
    parser.add_argument(
        "--context",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="added on every side, in parts of the longer side of the box [%(default)s]",
    )
    parser.add_argument(
        "--background",
        type=float,
        default=1.0,
        metavar="NUMBER",
        help="crops of the background for each object [%(default)s]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the background's places [%(default)s]"
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    from hkd_d2.config import load_config
    from hkd_d2.data.crops import check_crop_target, write_crops
    from hkd_d2.data.datasets import register_datasets

    for name, least in (("size", 8), ("context", 0.0), ("background", 0.0), ("seed", 0)):
        if not getattr(args, name) >= least:
            raise ValueError(f"--{name} is {getattr(args, name)}; give at least {least}.")
    options = config_options(args)
    check_crop_target(args.out)
    cfg = load_config(args.config_file, options)
    register_datasets(cfg)
    names = {
        "train": data_names(args.train) or list(cfg.DATASETS.TRAIN),
        "val": data_names(args.val) or list(cfg.DATASETS.TEST),
    }
    splits = {split: plan_split(args, cfg, split, names[split]) for split in names}
    write_crops(args.out, splits, args.size)
    for split, (_, crops) in splits.items():
        counts = Counter(crop.label for crop in crops)
        print(f"{args.out}/{split}: {', '.join(f'{n} {label}' for label, n in counts.items())}")
    return 0


def data_names(words: Sequence[str] | None) -> list[str]:
    """Names of registered data sets: A,B is two."""
    words = words or []
    return words[0].split(",") if len(words) == 1 else [data_name(words)] if words else []


def plan_split(args, cfg, split: str, names: list[str]) -> tuple[list[dict], list]:
    """Records and crops of the data sets of a split, their images looked at."""
    from detectron2.data import MetadataCatalog

    from hkd_d2.data.crops import plan_crops
    from hkd_d2.data.datasets import check_records
    from hkd_d2.data.image_files import check_image_files

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
