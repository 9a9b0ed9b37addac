"""Checks before the first step, so that a long run does not end, or learn nothing, by a wrong word.

Each check raises ValueError or FileNotFoundError with one sentence that says what to change.
"""

import copy
import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from hkd_d2.data.anchors import report_anchors
from hkd_d2.data.checks import check_anything_counts, check_class_lists, check_class_map
from hkd_d2.data.datasets import check_records
from hkd_d2.data.image_files import check_image_files, resize_sizes
from hkd_d2.data.loader import labelled_sets, pseudo_label_sets
from hkd_d2.data.mapper import is_ignored
from hkd_d2.evaluation import check_test_set
from hkd_d2.modeling.ignore import IgnoreAwareDense, IgnoreAwareROIHeads, IgnoreAwareRPN
from hkd_d2.modeling.meta_arch import HKDDetector, forked_random_state
from hkd_d2.modeling.teacher import load_teacher_config

logger = logging.getLogger(__name__)

# Side lengths of the image of the trial forward, pixels; every usual size divisibility divides it.
TRIAL_SIZE = (256, 256)


def check_data(cfg: CfgNode) -> dict[str, list[dict]]:
    """Check every data set of the config: registered, with boxes, of one class list, images whole.

    Files of pseudo-labels are checked likewise, and by
    :func:`hkd_d2.data.loader.pseudo_label_sets`.

    Returns:
        dict[str, list[dict]]: the records of each training set and file, as far as they are used.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one data set.")
    labelled = labelled_sets(cfg)
    training = {**labelled, **pseudo_label_sets(cfg, labelled)}
    test = {name: check_records(name) for name in cfg.DATASETS.TEST}
    check_class_lists(labelled, test)
    check_anything_counts(cfg, training)
    for name, records in test.items():
        evaluation = cfg.HKD.EVALUATION
        check_test_set(name, records, evaluation.PROTOCOL, evaluation.HEIGHT_SCALE)
    for name, records in {**training, **test}.items():
        if comm.is_main_process():  # one reader of every file is enough
            logger.info("Checking the %d images of %s", len(records), name)
            check_image_files(records, name, resize_sizes(cfg, name in training))
    return training


def check_labels(cfg: CfgNode, model: nn.Module, datasets: dict[str, list[dict]]) -> None:
    """Check that the model's heads know the classes and the ignore rows of the training sets.

    Args:
        datasets: from :func:`check_data`.
    """
    detector = getattr(model, "student", model)
    if isinstance(detector, DenseDetector):
        key, known = "MODEL.RETINANET.NUM_CLASSES", getattr(detector, "num_classes", None)
        remedy = "the student's meta-architecture to IgnoreAwareRetinaNet or IgnoreAwareFCOS"
    else:
        heads = getattr(detector, "roi_heads", None)
        key, known = "MODEL.ROI_HEADS.NUM_CLASSES", getattr(heads, "num_classes", None)
        remedy = (
            "MODEL.PROPOSAL_GENERATOR.NAME to IgnoreAwareRPN and MODEL.ROI_HEADS.NAME to "
            "IgnoreAwareROIHeads or IgnoreAwareCascadeROIHeads"
        )
    for name, records in datasets.items():
        rows = [row for record in records for row in record["annotations"]]
        counted = [
            row
            for row in rows
            if not is_ignored(row, cfg.HKD.DATA.MIN_HEIGHT, cfg.HKD.DATA.MIN_VISIBILITY)
        ]
        if len(counted) < len(rows) and not knows_ignore(detector):
            raise ValueError(
                f"'{name}' has {len(rows) - len(counted)} boxes to be ignored, which the model's "
                f"heads would take for objects; set {remedy}."
            )
        top = max((row["category_id"] for row in counted), default=-1)
        if known is not None and top >= known:
            raise ValueError(
                f"'{name}' has {top + 1} classes and {key} is {known}; set it to {top + 1} or mark "
                "the other classes ignore."
            )
    if isinstance(model, HKDDetector) and model.teacher is not None:
        teacher_sets = load_teacher_config(cfg.HKD.TEACHER.CONFIG_FILE).DATASETS.TRAIN
        check_class_map(cfg.DATASETS.TRAIN, teacher_sets, cfg.HKD.TEACHER.CLASS_MAP)
    if comm.is_main_process():
        report_anchors(cfg, detector, datasets)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that every trainable parameter, adapters included, is in the optimizer, once."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and held.count(id(parameter)) != 1:
            raise ValueError(
                f"The parameter '{name}' is trainable and stands {held.count(id(parameter))} times "
                "in the optimizer; build the optimizer from the whole model."
            )


def check_terms(model: nn.Module) -> dict[str, float]:
    """Run one training forward on a noise image and check that each term is alive.

    A term is alive if its unweighted loss is finite and depends on some parameter of the student.
    The model's buffers, its running mean of objects (one-stage), what terms save beside parameters
    and every random state are put back.

    Returns:
        dict[str, float]: the unweighted losses.
    """
    if not isinstance(model, HKDDetector) or not len(model.terms):
        return {}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    states = copy.deepcopy(model.terms.state_dict())
    running_mean = vars(model.student).get("loss_normalizer")
    student_parameters = [p for p in model.student.parameters() if p.requires_grad]
    raw = {}
    hooks = [
        term.register_forward_hook(lambda _m, _i, loss, name=name: raw.__setitem__(name, loss))
        for name, term in model.terms.items()
    ]
    training = model.training
    try:
        with forked_random_state(), EventStorage(0):
            torch.manual_seed(0)
            model.train()
            model([trial_record(knows_ignore(model.student))])
            for name, loss in raw.items():
                check_alive(name, loss, student_parameters)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        # Detectron2's one-stage detectors keep it as an attribute, absent before the first step.
        vars(model.student).pop("loss_normalizer", None)
        if running_mean is not None:
            model.student.loss_normalizer = running_mean
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.terms.load_state_dict(states)
    losses = {name: loss.item() for name, loss in raw.items()}
    logger.info(
        "Distillation terms before step 1, unweighted, on a noise image: %s",
        ", ".join(f"{name} {value:.4g}" for name, value in losses.items()),
    )
    return losses


def check_alive(name: str, loss: torch.Tensor, parameters: list[nn.Parameter]) -> None:
    """Raise ValueError unless ``loss`` is finite and depends on one of ``parameters``."""
    if not torch.isfinite(loss):
        raise ValueError(
            f"The term '{name}' is {loss.item()} before the first step; check the teacher's "
            "weights and HKD.TEACHER.PRECISION."
        )
    grads = []
    if loss.requires_grad and parameters:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    reached = [g for g in grads if g is not None]
    if not reached:
        raise ValueError(
            f"The term '{name}' gives the student no gradient: nothing it compares depends on a "
            f"trainable parameter; check HKD.{name.upper()} and MODEL.BACKBONE.FREEZE_AT, or "
            "remove it from HKD.TERMS."
        )
    if not any(bool(g.any()) for g in reached):
        logger.warning(
            "The term '%s' is flat on the noise image; see in the log that hkd/%s_raw falls.",
            name,
            name,
        )


def knows_ignore(detector: nn.Module) -> bool:
    """Whether a detector's training knows ignore rows; stock Detectron2 has no label for them."""
    if isinstance(detector, DenseDetector):
        return isinstance(detector, IgnoreAwareDense)
    rpn, heads = (getattr(detector, n, None) for n in ("proposal_generator", "roi_heads"))
    return isinstance(rpn, IgnoreAwareRPN) and isinstance(heads, IgnoreAwareROIHeads)


def trial_record(ignore: bool) -> dict:
    """A noise image with one object and, if ``ignore``, one ignore region."""
    height, width = TRIAL_SIZE
    instances = Instances(TRIAL_SIZE)
    instances.gt_boxes = Boxes(torch.tensor([[64.0, 64.0, 116.0, 192.0], [160, 96, 240, 224]]))
    instances.gt_classes = torch.tensor([0, -1])
    instances.gt_ignore = torch.tensor([False, True])
    if not ignore:
        instances = instances[:1]
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": height, "width": width}
