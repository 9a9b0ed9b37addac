"""Pre-train a backbone by HSAKD or HSSAKD on labelled images, for a detector's MODEL.WEIGHTS.

    hkd pretrain --config-file pretraining/hsakd_folder.yaml --out output/pretrained \\
        HKD.PRETRAINING.ROOT crops
    hkd train --config-file student_citypersons.yaml MODEL.WEIGHTS output/pretrained/backbone.pth

Without a GPU add MODEL.DEVICE cpu.
"""

import argparse

from hkd_d2.cli.arguments import add_options, config_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="a path, or the name of a packaged config (configs/pretraining/)",
    )
    parser.add_argument("--out", metavar="DIR", help="the same as OUTPUT_DIR DIR")
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    from detectron2.utils.logger import setup_logger

    from hkd_d2.config import load_config
    from hkd_d2.devices import check_device
    from hkd_d2.engine.run import check_writable
    from hkd_d2.pretraining.training import pretrain

    options = config_options(args)
    if args.out is not None:
        options += ["OUTPUT_DIR", args.out]
    cfg = load_config(args.config_file, options)
    check_device(cfg.MODEL.DEVICE)
    check_writable(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="hkd_d2")
    pretrain(cfg)
    return 0
