"""Several processes that train together: how they are started, and that they agree."""

import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from hkd_d2.modeling.checkpoint import state_sha256

T = TypeVar("T")
# What torchrun tells a process that it starts.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    return all(name in os.environ for name in VARIABLES)


def is_restart() -> bool:
    """Whether torchrun started the processes again after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def run_under_torchrun(function: Callable[..., Any], device: str, *args: Any) -> Any:
    """Join the group of processes that torchrun started and call ``function(*args)``.

    Args:
        device: ``MODEL.DEVICE``; with CUDA each process takes the GPU of its local rank.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    rank, local_rank, world, local_world = (int(os.environ[name]) for name in VARIABLES[:4])
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if local_world > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_world} processes on this machine, which has "
                f"{torch.cuda.device_count()} GPUs; give --nproc-per-node that number at most."
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank, world_size=world, init_method="env://"
    )
    try:
        comm.create_local_process_group(local_world)
        comm.synchronize()
        return function(*args)
    finally:
        torch.distributed.destroy_process_group()


def on_all_processes(action: Callable[[], T]) -> T:
    """Run ``action`` on every process; where it fails on one, all raise, and none waits.

    Raises:
        ValueError, OSError: of this process, or ValueError with the sentence of another.
    """
    result, error = None, None
    try:
        result = action()
    except (ValueError, OSError) as raised:
        error = raised
    sentences = comm.all_gather("" if error is None else str(error))
    if error is not None:
        raise error
    if any(sentences):
        raise ValueError(next(s for s in sentences if s))
    return result


def check_agreement(iteration: int, model: torch.nn.Module, cfg: CfgNode) -> None:
    """Check that all processes begin with one iteration, one set of parameters and one config.

    Raises:
        ValueError: in every process, where one of them differs.
    """
    if comm.get_world_size() == 1:
        return
    parameters = {name: value for name, value in model.named_parameters()}
    own = {
        "first iteration": iteration,
        "parameters": state_sha256(parameters)[:12],
        "config": config_hash(cfg),
    }
    every = comm.all_gather(own)
    for key, value in every[0].items():
        for rank, other in enumerate(every):
            if other[key] != value:
                raise ValueError(
                    f"The {key} of process 0 is {value} and that of process {rank} is "
                    f"{other[key]}; start all processes with one command and one config."
                )


def config_hash(cfg: CfgNode) -> str:
    """Of what has to be the same on all machines: all but paths and the number of workers."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.DATALOADER.NUM_WORKERS = "", "", 0
    cfg.HKD.TEACHER.CONFIG_FILE, cfg.HKD.TEACHER.WEIGHTS, cfg.HKD.DATA.REGISTER = "", "", []
    cfg.HKD.DATA.PSEUDO = [os.path.basename(path) for path in cfg.HKD.DATA.PSEUDO]
    return hashlib.sha256(cfg.dump().encode()).hexdigest()[:12]
