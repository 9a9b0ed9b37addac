#!/usr/bin/env python
"""Pre-train a backbone by HSAKD or HSSAKD on labelled images, for a detector's MODEL.WEIGHTS.

    python tools/pretrain_backbone.py --config-file configs/pretraining/hsakd_folder.yaml \\
        HKD.PRETRAINING.ROOT crops OUTPUT_DIR output/pretrained
    python tools/train_net.py --config-file configs/student_citypersons.yaml \\
        MODEL.WEIGHTS output/pretrained/backbone.pth

On a machine without a GPU add MODEL.DEVICE cpu.
"""

import argparse
import sys

from detectron2.config import get_cfg
from detectron2.utils.logger import setup_logger

from hkd_d2.config import add_hkd_config
from hkd_d2.pretraining.training import pretrain


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="such as configs/pretraining/*.yaml")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    args = parser.parse_args()
    cfg = get_cfg()
    add_hkd_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        setup_logger(cfg.OUTPUT_DIR, name="hkd_d2")
        pretrain(cfg)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"pretrain_backbone.py: {error}")


if __name__ == "__main__":
    main()
