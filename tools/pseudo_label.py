#!/usr/bin/env python
"""Label images with a teacher's detections, as a pool for HKD.DATA.PSEUDO.

    python tools/pseudo_label.py --config-file configs/teacher_retinanet_citypersons.yaml \\
        --weights output/teacher_retinanet_citypersons/model_final.pth \\
        --dataset citypersons_train --out output/pools/citypersons_retinanet.json
    python tools/pseudo_label.py ... --images FOLDER --out POOL.json

A pool that is there is replaced when the new one is complete. On a machine without a GPU add
MODEL.DEVICE cpu.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import os
import sys

import torch
from detectron2.config import get_cfg

from hkd_d2.config import add_hkd_config
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.data.image_files import check_image_files, find_images
from hkd_d2.data.pseudo_labels import check_pool_target, write_pool
from hkd_d2.engine.pseudo_labels import label_images

# Version of what the tool writes, in the pool's info.
TOOL = "hkd_d2 tools/pseudo_label.py 1"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the teacher's config")
    parser.add_argument("--weights", required=True, help="the teacher's checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME", help="a registered data set")
    source.add_argument("--images", metavar="FOLDER", help="every image in a folder and below")
    parser.add_argument("--out", required=True, metavar="POOL.json")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.4,
        metavar="S",
        help="keep detections above this score [0.4, of older configs of the released code]",
    )
    parser.add_argument(
        "--classes", metavar="A,B", help="the teacher's class names in order, where not known"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(f"The config file '{args.config_file}' does not exist.")
        check_pool_target(args.out)
        cfg = get_cfg()
        add_hkd_config(cfg)
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("MODEL.DEVICE is cuda and no GPU is found; add 'MODEL.DEVICE cpu'.")
        register_datasets(cfg)
        records = check_records(args.dataset) if args.dataset else find_images(args.images)
        check_image_files(records, args.dataset or args.images)
        pool = label_images(
            cfg,
            args.weights,
            records,
            score_threshold=args.score_threshold,
            classes=args.classes.split(",") if args.classes else None,
            info={"tool": TOOL, "teacher_config": args.config_file, "teacher_options": args.opts},
        )
        write_pool(args.out, pool)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HKD_TRACEBACK"):
            raise
        sys.exit(f"pseudo_label.py: {error}")
    print(
        f"{args.out}: {len(pool['images'])} images, {len(pool['annotations'])} detections above "
        f"{args.score_threshold}"
    )


if __name__ == "__main__":
    main()
