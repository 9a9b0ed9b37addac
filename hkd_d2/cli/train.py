"""Train a detector, plain or beside its teacher.

    hkd train --config-file hkd_citypersons.yaml --num-gpus 8
    hkd train --config-file student_citypersons.yaml --eval-only \\
        MODEL.WEIGHTS output/hkd_citypersons/model_final.pth

The arguments are Detectron2's own. Without a GPU add MODEL.DEVICE cpu.
"""

import argparse
import os

from hkd_d2.cli.arguments import add_options, config_options

# Detectron2's default: one a user, so that processes which were left behind are noticed.
PORT = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a path, or the name of a packaged config (configs/)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead")
    parser.add_argument("--out", metavar="DIR", help="the same as OUTPUT_DIR DIR")
    add_processes(parser)
    add_options(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Detectron2's arguments of a run in several processes."""
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes of this machine [1]"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="[1]")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="N", help="this machine's number [0]"
    )
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{PORT}",
        metavar="URL",
        help="where the processes meet [%(default)s]",
    )


def run(args: argparse.Namespace) -> int:
    args.opts = config_options(args)
    if args.out is not None:
        args.opts += ["OUTPUT_DIR", args.out]
    from hkd_d2.engine.run import launch_run

    launch_run(args)
    return 0
