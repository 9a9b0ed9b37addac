"""Score a trained detector on a data set under Detectron2: miss rate of every setup, and COCO AP.

    hkd evaluate --model output/quickstart/hkd_seed0/model_final.pth
    hkd evaluate --model student.pth --config-file student.yaml --data citypersons DIR val

The student of a distilled one is evaluated alone. Detections and curves go to inference/ in the
output. 'hkd benchmark' scores exported files. Without a GPU add MODEL.DEVICE cpu.
"""

import argparse
from pathlib import Path

from hkd_d2.cli.arguments import (
    add_config_file,
    add_data,
    add_options,
    config_options,
)
from hkd_d2.cli.train import add_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="its checkpoint")
    add_config_file(parser, "its config")
    add_data(parser, "--data", "data in the place of the config's DATASETS.TEST")
    parser.add_argument("--out", metavar="DIR", default="output/evaluate", help="[%(default)s]")
    add_processes(parser)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    model = Path(args.model)
    if model.suffix in (".onnx", ".pt2", ".ts"):
        raise ValueError(f"'{model}' is an exported file; score it with hkd benchmark.")
    options = [*config_options(args), "OUTPUT_DIR", args.out, "MODEL.WEIGHTS", args.model]
    args.beside = None if args.config_file else args.model
    args.config_file = args.config_file or str(model.parent / "config.yaml")
    args.datasets = []
    if args.data:
        name = args.data[0]
        if len(args.data) == 3:
            # Files are named after the data set, so its name has no folder.
            name = "_".join(Path(word).name for word in args.data)
            args.datasets = [(name, *args.data)]
        options += ["DATASETS.TEST", f"('{name}',)"]
    args.opts, args.eval_only, args.resume = options, True, False
    from hkd_d2.engine.run import launch_run

    launch_run(args)
    return 0
