#!/usr/bin/env python
"""Train or evaluate a detector, plain or beside its teacher, with Detectron2's own arguments.

    python tools/train_net.py --config-file configs/hkd_citypersons.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/student_citypersons.yaml --eval-only \\
        MODEL.WEIGHTS output/hkd_citypersons/model_final.pth

On a machine without a GPU add MODEL.DEVICE cpu.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip

import os
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from hkd_d2.config import add_hkd_config
from hkd_d2.data.datasets import check_records, register_datasets
from hkd_d2.engine import Trainer
from hkd_d2.modeling.checkpoint import StudentCheckpointer

# What the user can mend is one sentence; what is ours to mend keeps its traceback.
MENDABLE = (ValueError, FileNotFoundError, ImportError)


def setup(args):
    """Make the config of the command line, and start logging."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    if not os.path.isfile(args.config_file):
        raise FileNotFoundError(
            f"The config file '{args.config_file}' does not exist; name one with --config-file, "
            "such as configs/hkd_citypersons.yaml."
        )
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    teacher = cfg.HKD.TEACHER.CONFIG_FILE
    beside = Path(args.config_file).parent / teacher
    if teacher and beside.is_file():
        cfg.HKD.TEACHER.CONFIG_FILE = str(beside)
    if args.eval_only:
        cfg.HKD.BACKBONE.PRETRAINED = False  # the checkpoint has every weight
        if cfg.MODEL.META_ARCHITECTURE == "HKDDetector" and not cfg.HKD.EVALUATION.TEACHER:
            # The student is evaluated alone, so its teacher need not be there.
            cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("MODEL.DEVICE is cuda and no GPU is found; add 'MODEL.DEVICE cpu'.")
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="hkd_d2")
    return cfg


def main(args):
    """Run on one process; returns the metrics."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    register_datasets(cfg)
    for name in cfg.DATASETS.TEST:
        check_records(name)
    model = Trainer.build_model(cfg)
    checkpointer = StudentCheckpointer(model, cfg.OUTPUT_DIR)
    last = checkpointer.get_checkpoint_file() if args.resume else ""
    checkpointer.load_complete(last or cfg.MODEL.WEIGHTS, args.config_file)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def invoke_main():
    """Parse the command line and launch one process a GPU."""
    args = default_argument_parser().parse_args()
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except MENDABLE as error:
        if os.environ.get("HKD_TRACEBACK"):
            raise
        sys.exit(f"train_net.py: {error}")
    except ProcessRaisedException as error:
        # One process of several: its traceback came as text, and ends with the error.
        last = str(error).strip().splitlines()[-1]
        kind, _, sentence = last.partition(": ")
        if os.environ.get("HKD_TRACEBACK") or kind not in [e.__name__ for e in MENDABLE]:
            raise
        sys.exit(f"train_net.py: {sentence}")


if __name__ == "__main__":
    invoke_main()
