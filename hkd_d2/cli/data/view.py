"""Draw samples of a data set with every annotated box.

    hkd data view citypersons_val --out samples.png
    hkd data view citypersons DIR val --number 4
    hkd data view coco annotations.json IMAGES

Pedestrians that count, ignored rows and crowds differ in colour and dashes, visible parts are
dashed; the legend counts them.
"""

import argparse
import os

from hkd_d2.cli.arguments import data_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="FORMAT SOURCE PART, or a registered name"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="its HKD.DATA.REGISTER has the name, its MIN_HEIGHT and MIN_VISIBILITY say which rows "
        "training ignores",
    )
    parser.add_argument(
        "--number", type=int, default=4, metavar="N", help="of samples [%(default)s]"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draw [%(default)s]"
    )
    parser.add_argument("--out", metavar="PICTURE.png", help="[samples_<data set>.png]")


def run(args: argparse.Namespace) -> int:
    from hkd_d2.data.datasets import check_records, register_datasets
    from hkd_d2.visualization import plot_samples, sample_records

    if len(args.data) not in (1, 3):
        raise ValueError("A data set is one NAME, or three words: FORMAT SOURCE PART.")
    if args.number < 1:
        raise ValueError(f"--number is {args.number}; give 1 or more.")
    bounds = (0.0, 0.0)  # without a config rows are told apart by their own flags
    if args.config_file:
        from hkd_d2.config import load_config

        cfg = load_config(args.config_file)
        register_datasets(cfg)
        bounds = (cfg.HKD.DATA.MIN_HEIGHT, cfg.HKD.DATA.MIN_VISIBILITY)
    name = data_name(args.data)
    records = check_records(name)
    out = args.out or f"samples_{'_'.join(map(os.path.basename, args.data))}.png"
    samples = sample_records(records, args.number, args.seed)
    title = f"{' '.join(args.data)}: {len(samples)} of {len(records)} images"
    counts = plot_samples(samples, out, title, *bounds)
    print(f"wrote {out}: " + ", ".join(f"{role} {count}" for role, count in counts.items()))
    return 0
