"""Detectron2's default trainer for pedestrian data, with or without distillation."""

import contextlib
import logging
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.utils import comm
from torch import nn

from hkd_d2.data.datasets import register_datasets
from hkd_d2.data.loader import build_train_loader
from hkd_d2.data.mapper import PedestrianMapper
from hkd_d2.engine import preflight
from hkd_d2.engine.checkpoints import PROCESSES, Checkpoints, load_process_state
from hkd_d2.engine.processes import check_agreement, on_all_processes
from hkd_d2.engine.resumable_loader import resumable
from hkd_d2.engine.solver import build_optimizer
from hkd_d2.engine.stopping import StopRequest
from hkd_d2.evaluation import PedestrianEvaluator
from hkd_d2.modeling.build import build_from_config
from hkd_d2.modeling.checkpoint import StudentCheckpointer, state_of
from hkd_d2.modeling.meta_arch import HKDDetector, forked_random_state
from hkd_d2.modeling.teacher import load_teacher_config

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains what ``MODEL.META_ARCHITECTURE`` names: a plain detector, or one beside its teacher.

    Before the first step it registers the data sets of the config and runs every check of
    :mod:`hkd_d2.engine.preflight`.

    Args:
        cfg: with the keys of :func:`hkd_d2.config.add_hkd_config`.

    Raises:
        ValueError, FileNotFoundError: by a check; one sentence says what to change.
    """

    def __init__(self, cfg: CfgNode):
        # As in DefaultTrainer, but for the checks, the checkpointer, and DDP on a CPU.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        register_datasets(cfg)
        datasets = preflight.check_data(cfg)
        model = self.build_model(cfg)
        preflight.check_labels(cfg, model, datasets)
        optimizer = self.build_optimizer(cfg, model)
        preflight.check_optimizer(model, optimizer)
        preflight.check_terms(model)
        data_loader = self.build_train_loader(cfg)
        on_cpu = cfg.MODEL.DEVICE == "cpu"
        ddp = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, resumable(data_loader), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StudentCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.stop = StopRequest()
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load ``MODEL.WEIGHTS``, or with ``resume`` all that the last whole checkpoint has.

        A run that goes on from its own checkpoint on a CPU ends bit for bit where it would have
        ended without a stop.

        Raises:
            ValueError: see :meth:`StudentCheckpointer.resume_or_load`.
        """
        content = on_all_processes(
            lambda: self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        )
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1  # the file has the iteration that was done
            if PROCESSES in content:
                on_all_processes(lambda: self._load_process_state(content[PROCESSES]))
            else:
                logger.warning(
                    "The checkpoint has no random states and no place in the data: from here on "
                    "images and draws are not those of an uninterrupted run."
                )
        check_agreement(self.start_iter, self.model, self.cfg)

    def _load_process_state(self, states):
        with state_of("the processes", self.checkpointer.resumed_file):
            load_process_state(self._trainer, states)

    def train(self):
        # TorchScript optimises the focal loss after its first call, which rounds otherwise then; a
        # resumed run begins with a first call.
        on_gpu = self.cfg.MODEL.DEVICE != "cpu"
        with (
            self.stop.listening(),
            torch.jit.optimized_execution(on_gpu),
            _without_tracebacks("detectron2.engine.train_loop"),
        ):
            super().train()
        # DefaultTrainer returns results only where the config says what to expect.
        return getattr(self, "_last_eval_results", None)

    def run_step(self):
        try:
            super().run_step()
        except FloatingPointError as error:  # Detectron2's, before the optimizer's step
            found = re.findall(r"'([^']+)': (?:np\.\w+\()?(-?(?:nan|inf))", str(error))
            losses = ", ".join(f"{name} {value}" for name, value in found)
            raise ValueError(
                f"The losses are not finite at iteration {self.iter} "
                f"({losses or str(error).splitlines()[0]}); go on from the last checkpoint with "
                "--resume, or start anew, with a smaller SOLVER.BASE_LR."
            ) from error

    def build_hooks(self):
        """Detectron2's, but for :class:`Checkpoints` and an evaluation that draws nothing from the
        run's random states, which a resumed run would lack."""
        kept = [
            hook
            for hook in super().build_hooks()
            if not isinstance(hook, (hooks.PeriodicCheckpointer, hooks.EvalHook))
        ]
        writers = [hook for hook in kept if isinstance(hook, hooks.PeriodicWriter)]
        node = self.cfg.SOLVER
        keep = self.cfg.HKD.SOLVER.KEEP_CHECKPOINTS
        return [
            *(hook for hook in kept if hook not in writers),
            Checkpoints(self.checkpointer, node.CHECKPOINT_PERIOD, keep, self.stop),
            hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate),
            *writers,
        ]

    def _evaluate(self):
        with forked_random_state():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As Detectron2's, for ``SOLVER.REFERENCE_WORLD_SIZE``; the terms' schedules and phases,
        every key under ``HKD`` that ends in ``_ITER`` or ``_ITERS``, follow the run's length."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            frozen = scaled.is_frozen()
            scaled.defrost()
            scale_iterations(scaled.HKD, num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE)
            if frozen:
                scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """As Detectron2's, with one sentence where the config builds none."""
        model = build_from_config(cfg, "the run")
        logging.getLogger("detectron2.trainer").info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, PedestrianMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=PedestrianMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, predicted_class=None):
        return PedestrianEvaluator(
            dataset_name,
            output_dir=f"{cfg.OUTPUT_DIR}/inference",
            missing_point=cfg.HKD.EVALUATION.MISSING_POINT or None,
            protocol=cfg.HKD.EVALUATION.PROTOCOL,
            height_scale=cfg.HKD.EVALUATION.HEIGHT_SCALE,
            predicted_class=predicted_class,
        )

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate the student, and with ``HKD.EVALUATION.TEACHER`` its teacher in the same run.

        Returns:
            dict: as Detectron2's; with the teacher, ``{"student": ..., "teacher": ...}``.
        """
        detector = getattr(model, "module", model)
        results = super().test(cfg, getattr(detector, "student", detector), evaluators)
        if not cfg.HKD.EVALUATION.TEACHER:
            return results
        if not isinstance(detector, HKDDetector) or detector.teacher is None:
            raise ValueError(
                "HKD.EVALUATION.TEACHER is set but the model has no teacher; use the config that "
                "names one, or set it to False."
            )
        teacher_cfg = teacher_test_config(cfg)
        # A teacher with another class list calls the pedestrian by another index.
        pedestrian = next(iter(cfg.HKD.TEACHER.CLASS_MAP), None)
        evaluators = [
            cls.build_evaluator(teacher_cfg, name, pedestrian) for name in cfg.DATASETS.TEST
        ]
        teacher = super().test(teacher_cfg, detector.teacher.model, evaluators)
        return OrderedDict(student=results, teacher=teacher)


@contextlib.contextmanager
def _without_tracebacks(name: str) -> Iterator[None]:
    """Keep a logger from printing the traceback of what the user can change.

    The command line says it in one sentence, and shows the traceback where HKD_TRACEBACK is set.
    """

    def admits(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], (ValueError, OSError)))

    train_loop = logging.getLogger(name)
    train_loop.addFilter(admits)
    try:
        yield
    finally:
        train_loop.removeFilter(admits)


def scale_iterations(node: CfgNode, scale: float) -> None:
    """Divide in place what ``node`` counts in iterations; 0 is a word and stays."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            scale_iterations(value, scale)
        elif key.endswith(("_ITER", "_ITERS")) and value > 0:
            node[key] = max(1, round(value / scale))


def teacher_test_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own config, on the student's test sets, writing beside the student's files."""
    teacher_cfg = load_teacher_config(cfg.HKD.TEACHER.CONFIG_FILE)
    teacher_cfg.DATASETS.TEST = cfg.DATASETS.TEST
    teacher_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.HKD.EVALUATION.PROTOCOL = cfg.HKD.EVALUATION.PROTOCOL
    teacher_cfg.HKD.EVALUATION.MISSING_POINT = cfg.HKD.EVALUATION.MISSING_POINT
    teacher_cfg.HKD.EVALUATION.HEIGHT_SCALE = cfg.HKD.EVALUATION.HEIGHT_SCALE
    teacher_cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/teacher"
    return teacher_cfg
