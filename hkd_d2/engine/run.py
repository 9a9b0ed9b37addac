"""A training or an evaluation from its command line: config, checks, one process a GPU."""

import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import os
import tempfile
import urllib.parse

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from hkd_d2.config import load_config, student_config
from hkd_d2.configuration.files import find_config
from hkd_d2.data.datasets import check_records, register_dataset, register_datasets
from hkd_d2.devices import check_device
from hkd_d2.engine.processes import (
    is_restart,
    on_all_processes,
    run_under_torchrun,
    started_by_torchrun,
)
from hkd_d2.engine.run_folder import claim_folder
from hkd_d2.engine.trainer import Trainer
from hkd_d2.inference.torch_backend import load_config as load_detector_config
from hkd_d2.modeling.checkpoint import StudentCheckpointer
from hkd_d2.ports import check_port


def launch_run(args: argparse.Namespace) -> None:
    """Train or evaluate.

    Args:
        args: what Detectron2's default_argument_parser returns: ``config_file``, ``resume``,
            ``eval_only``, ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url`` and
            ``opts``. Where they are there, ``datasets`` are arguments of :func:`register_dataset`,
            and ``beside`` is a checkpoint whose folder has the config, which nobody named.

    Raises:
        ValueError, OSError, ImportError: one sentence that says what to change.
    """
    if not args.config_file:
        raise ValueError("No config is given; name one with --config-file.")
    if not getattr(args, "beside", None):
        args.config_file = str(find_config(args.config_file))
    cfg = read_config(args)
    if started_by_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1:
            raise ValueError(
                "torchrun starts the processes itself; leave out --num-gpus and --num-machines, "
                "and give torchrun --nproc-per-node and --nnodes."
            )
        check_run(cfg, args, int(os.environ["WORLD_SIZE"]))
        args.resume = args.resume or is_restart()
        run_under_torchrun(run_process, cfg.MODEL.DEVICE, args)
        return
    check_run(cfg, args, args.num_gpus * args.num_machines)
    if args.num_gpus * args.num_machines > 1 and args.machine_rank == 0:
        check_address(args.dist_url)
    launch(
        run_process,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config of the command line, its data sets known."""
    for entry in getattr(args, "datasets", []):
        register_dataset(*entry)
    beside = getattr(args, "beside", None)
    if beside:
        cfg = load_detector_config(beside, None, args.opts)
    else:
        cfg = load_config(args.config_file, args.opts)
    teacher = cfg.HKD.TEACHER.CONFIG_FILE
    if teacher:
        near = os.path.join(os.path.dirname(args.config_file), teacher)
        if os.path.isfile(near):
            cfg.HKD.TEACHER.CONFIG_FILE = near
    if args.eval_only:
        cfg.HKD.BACKBONE.PRETRAINED = False  # the checkpoint has every weight
        if not cfg.HKD.EVALUATION.TEACHER:
            # The student is evaluated alone, so its teacher need not be there.
            cfg = student_config(cfg)
    return cfg


def check_run(cfg: CfgNode, args: argparse.Namespace, processes: int) -> None:
    """Check what a machine has to have for a run, before its processes start.

    Args:
        processes: of all machines.

    Raises:
        ValueError, OSError: one sentence that says what to change.
    """
    check_device(cfg.MODEL.DEVICE)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if min(args.num_gpus, args.num_machines) < 1:
        raise ValueError("--num-gpus or --num-machines is less than 1; give 1 or more.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank is {args.machine_rank}; of {args.num_machines} machines give 0 to "
            f"{args.num_machines - 1}."
        )
    gpus = torch.cuda.device_count()
    if gpus and args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus is {args.num_gpus} and this machine has {gpus}; give {gpus} at most."
        )
    if cfg.SOLVER.AMP.ENABLED and not on_gpu and not args.eval_only:
        raise ValueError(
            "SOLVER.AMP.ENABLED needs a GPU and MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE}; set SOLVER.AMP.ENABLED False."
        )
    if cfg.SOLVER.IMS_PER_BATCH % processes and not args.eval_only:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes "
            "cannot share; give a multiple."
        )
    check_writable(cfg.OUTPUT_DIR)


def check_address(url: str) -> None:
    """Raise ValueError for a --dist-url that the processes of this machine cannot meet at."""
    if not url.startswith("tcp://"):
        return
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        port = None
    if not port or not host:
        raise ValueError(f"--dist-url is '{url}'; give tcp://HOST:PORT, the port from 1 to 65535.")
    check_port(host, port)


def check_writable(folder: str) -> None:
    """Make the folder; raise OSError where nothing can be written into it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR is '{folder}', where nothing can be written ({error.strerror}); give "
            "another folder."
        ) from error


def run_process(args: argparse.Namespace) -> dict | None:
    """Run on one process; returns the metrics."""
    cfg = read_config(args)
    cfg.freeze()
    if not args.eval_only:
        on_all_processes(
            lambda: comm.is_main_process() and claim_folder(cfg.OUTPUT_DIR, args.resume)
        )
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="hkd_d2")
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
