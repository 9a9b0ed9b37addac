#!/usr/bin/env python
"""Draw samples of a data set with every annotated box.

    python tools/visualize_data.py citypersons_val --out samples.png
    python tools/visualize_data.py citypersons DIR val --number 4
    python tools/visualize_data.py coco annotations.json IMAGES

The data set is a registered name, or an entry of HKD.DATA.REGISTER without the name. Pedestrians
that count, ignored rows and crowds differ in colour and dashes, visible parts are dashed; the
legend counts them.
"""

import argparse
import os
import sys

from detectron2.config import get_cfg

from hkd_d2.config import add_hkd_config
from hkd_d2.data.datasets import check_records, register_dataset, register_datasets
from hkd_d2.visualization import plot_samples, sample_records


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset", nargs="+", metavar="DATASET", help="NAME, or FORMAT ROOT SPLIT, as above"
    )
    parser.add_argument("--config-file", help="a config whose HKD.DATA.REGISTER has the name")
    parser.add_argument("--number", type=int, default=4, help="of samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--out", metavar="PICTURE.png", help="default: samples_<data set>.png")
    args = parser.parse_args(argv)
    if len(args.dataset) not in (1, 3):
        parser.error("a data set is one NAME, or three words: FORMAT ROOT SPLIT")
    if args.number < 1:
        parser.error("--number must be at least 1")
    return args


def visualize(args) -> str:
    """Write the picture; returns what was drawn, in words."""
    if args.config_file:
        cfg = get_cfg()
        add_hkd_config(cfg)
        cfg.merge_from_file(args.config_file)
        register_datasets(cfg)
    name = args.dataset[0]
    if len(args.dataset) == 3:
        form, source, part = args.dataset
        name = " ".join(args.dataset)  # cannot be anyone else's
        register_dataset(name, form, source, part)
    records = check_records(name)
    out = args.out or f"samples_{'_'.join(map(os.path.basename, args.dataset))}.png"
    samples = sample_records(records, args.number, args.seed)
    title = f"{name}: {len(samples)} of {len(records)} images"
    counts = plot_samples(samples, out, title)
    return f"wrote {out}: " + ", ".join(f"{role} {count}" for role, count in counts.items())


def main(argv: list[str] | None = None) -> int:
    try:
        print(visualize(parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f"visualize_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
