"""HKDDetector: a student trained beside its teacher, in one Detectron2 meta-architecture."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.profiler import record_function

from hkd_d2.distillation import build_terms, find_terms
from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.detector_pass import DetectorPass, Targets
from hkd_d2.modeling.fake_quantization import fake_quantize
from hkd_d2.modeling.families import check_detector, check_fused_pooler, detector_spec, family_of
from hkd_d2.modeling.ignore import split_ignore
from hkd_d2.modeling.teacher import Teacher

# Unweighted losses and weights are logged once in this many iterations, as Detectron2's writers
# are; on a GPU every value logged is a wait for the device.
LOG_PERIOD = 20
POOLERS = ("fused", "torchvision")


@META_ARCH_REGISTRY.register()
class HKDDetector(nn.Module):
    """A student detector and its distillation terms, with the teacher as a guest.

    In training ``forward`` advances the student and the teacher stage by stage on the same pixels
    and the same boxes, and returns the student's own losses plus ``loss_hkd_<term>``. In inference
    it is the student. Its ``state_dict`` is the student's, under the student's names; the trainable
    state of the terms is :attr:`terms`, in ``parameters()`` and saved by
    :class:`~hkd_d2.modeling.checkpoint.StudentCheckpointer` beside it. The teacher is in neither;
    it follows ``.to()`` and a deep copy shares it.

    Args:
        student: a GeneralizedRCNN with an RPN and StandardROIHeads or CascadeROIHeads,
            a RetinaNet, an FCOS, or subclasses of them.
        teacher: None where no term reads one.
        terms: name to :class:`~hkd_d2.distillation.Term`.
        loss_weights: see ``HKD.STUDENT.LOSS_WEIGHTS``.
        gradient_share_period: see ``HKD.GRADIENT_SHARE_PERIOD``.
        pooler: fused | torchvision, see ``HKD.POOLER``.
        channels_last: see ``HKD.CHANNELS_LAST``.

    Attributes:
        stage: the context manager that a training forward enters, with a name such as
            ``student.rpn``, ``teacher.backbone`` or ``term.region``, around each of its stages; by
            default a range that profilers see and that costs nothing without one.

    Raises:
        ValueError: a student that cannot be advanced, terms without the teacher that they read,
            networks whose padding does not fit, or a pooler that the fused one does not replace;
            at the first training forward, a weight of a loss that the student does not have.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None,
        terms: nn.ModuleDict,
        loss_weights: dict[str, float] | None = None,
        gradient_share_period: int = 0,
        pooler: str = "fused",
        channels_last: bool = True,
    ):
        super().__init__()
        check_detector(student, "student")
        self.student = student
        self.terms = terms.to(student.device)
        self.teacher = teacher
        self.loss_weights = dict(loss_weights or {})
        self.gradient_share_period = gradient_share_period
        self.fused_pooler = one_of("HKD.POOLER", pooler, POOLERS) == "fused"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.stage = record_function
        if self.fused_pooler:
            check_fused_pooler(student, "student")
            if teacher is not None:
                check_fused_pooler(teacher.model, "teacher")
        if teacher is None and any(term.needs for term in terms.values()):
            raise ValueError("The distillation terms read a teacher and none is given.")
        if teacher is not None:
            ours = max(student.backbone.size_divisibility, 1)
            theirs = max(teacher.model.backbone.size_divisibility, 1)
            if ours % theirs:
                raise ValueError(
                    f"The teacher needs images padded to a multiple of {theirs} and the student "
                    f"pads to {ours}; choose a student whose size divisibility is a multiple of "
                    f"{theirs}."
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        for loss, weight in cfg.HKD.STUDENT.LOSS_WEIGHTS.items():
            if type(weight) not in (int, float):
                raise ValueError(f"HKD.STUDENT.LOSS_WEIGHTS.{loss} is {weight!r}; give a number.")
        name = cfg.HKD.STUDENT.META_ARCHITECTURE
        if name not in META_ARCH_REGISTRY or not issubclass(
            META_ARCH_REGISTRY.get(name), (GeneralizedRCNN, DenseDetector)
        ):
            raise ValueError(
                f"HKD.STUDENT.META_ARCHITECTURE is '{name}'; the student has to be a "
                "GeneralizedRCNN, a RetinaNet or an FCOS."
            )
        student = META_ARCH_REGISTRY.get(name)(cfg)
        check_detector(student, "student")
        if cfg.HKD.STUDENT.FAKE_QUANTIZATION:
            fake_quantize(student)
        # Keep the student's RNG streams independent of the teacher and the terms.
        with forked_random_state():
            reads_teacher = any(term.needs for term in find_terms(cfg).values())
            teacher = Teacher.from_config(cfg) if reads_teacher else None
            terms = build_terms(cfg, detector_spec(student), teacher.spec if teacher else None)
        return {
            "student": student,
            "teacher": teacher,
            "terms": terms,
            "loss_weights": cfg.HKD.STUDENT.LOSS_WEIGHTS,
            "gradient_share_period": cfg.HKD.GRADIENT_SHARE_PERIOD,
            "pooler": cfg.HKD.POOLER,
            "channels_last": cfg.HKD.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, batched_inputs: list[dict]):
        """
        Args:
            batched_inputs: as for Detectron2's ``GeneralizedRCNN``; ``instances`` may
                have the bool field ``gt_ignore``.

        Returns:
            dict[str, Tensor] in training, the student's detections (list[dict]) in inference.
        """
        if not self.training:
            return self.student(batched_inputs)

        student, stage, family = self.student, self.stage, family_of(self.student)
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        targets = as_targets(instances)
        iteration = get_event_storage().iter
        active = {n: t for n, t in self.terms.items() if not t.schedule.stopped(iteration)}
        needs = frozenset().union(*(t.needs for t in active.values()))

        # (a) backbones and FPNs on the same pixels
        with stage("student.backbone"):
            images = student.preprocess_image(batched_inputs)
            # Convolutions follow the images' format, whatever that of the weights.
            images.tensor = images.tensor.contiguous(memory_format=self.memory_format)
            ours = DetectorPass(
                images=images,
                features=student.backbone(images.tensor),
                strides={n: s.stride for n, s in student.backbone.output_shape().items()},
                run_backbone=self.run_backbone,
            )
        theirs = None
        if needs:
            with stage("teacher.backbone"):
                padded = tuple(images.tensor.shape[-2:])
                theirs = self.teacher.features(batched_inputs, padded, self.memory_format)

        # (b, c) the student's dense head, labels, and the boxes that both networks will look at
        losses_so_far = family.advance_student(
            student, ours, instances, needs, self.fused_pooler, stage
        )
        if theirs is not None:
            boxes = None if ours.sampled is None else [x.proposal_boxes for x in ours.sampled]
            with stage("teacher.branches"):
                self.teacher.advance(theirs, boxes, needs, self.fused_pooler)

        # (d) terms, then the student's own losses in Detectron2's order
        raw = {}
        for name, term in active.items():
            with stage(f"term.{name}"):
                raw[name] = term(ours, theirs, targets)
        with stage("student.losses"):
            losses = family.student_losses(student, ours)
            losses.update(losses_so_far)
        weigh(losses, self.loss_weights)
        # Detectron2's one-stage detectors show nothing in training.
        if ours.proposals is not None and student.vis_period > 0:
            if iteration % student.vis_period == 0:
                student.visualize_training(batched_inputs, ours.proposals)

        for name, term in self.terms.items():
            if name in raw:
                losses[f"loss_hkd_{name}"] = term.schedule(iteration) * raw[name]
            else:
                losses[f"loss_hkd_{name}"] = term.zero(images.tensor)
        self._log(iteration, raw, losses, ours.features)
        return losses

    def run_backbone(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The student's features of other normalised pixels; buffers and RNG states stay."""
        backbone = self.student.backbone
        before = [buffer.clone() for buffer in backbone.buffers()]
        with forked_random_state():
            features = backbone(pixels.contiguous(memory_format=self.memory_format))
        for buffer, value in zip(backbone.buffers(), before, strict=True):
            buffer.data.copy_(value)  # past autograd, which keeps them for a backward in eval mode
        return features

    def _log(self, iteration, raw, losses, features) -> None:
        storage = get_event_storage()
        if iteration % LOG_PERIOD == 0:
            # The mean over processes, as Detectron2 logs the weighted losses.
            means = comm.reduce_dict({name: loss.detach() for name, loss in raw.items()})
            for name, loss in means.items():
                storage.put_scalar(f"hkd/{name}_raw", loss.item(), smoothing_hint=False)
                weight = self.terms[name].schedule(iteration)
                storage.put_scalar(f"hkd/{name}_weight", weight, smoothing_hint=False)
        period = self.gradient_share_period
        if period > 0 and iteration % period == 0:
            for name, share in gradient_shares(losses, list(features.values())).items():
                storage.put_scalar(f"hkd_gradient_share/{name}", share, smoothing_hint=False)

    def state_dict(self, *args, **kwargs):
        """The student's state, under the names of a plain student."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a student's state; with ``strict`` a missing or unknown key is an error."""
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn, recurse=True):
        # .to(), .cuda() and their kin: the teacher follows without being a child.
        if self.teacher is not None:
            self.teacher.model._apply(fn)
        return super()._apply(fn, recurse)


def as_targets(instances: list) -> Targets:
    """Objects and ignore boxes of a batch of ground-truth instances."""
    split = [split_ignore(x) for x in instances]
    return Targets(
        boxes=[objects.gt_boxes.tensor for objects, _ in split],
        ignore_boxes=[ignore.tensor for _, ignore in split],
    )


def weigh(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> None:
    """Multiply in place the losses that ``weights`` names.

    Raises:
        ValueError: a name that is not among the losses.
    """
    for name, weight in weights.items():
        if name not in losses:
            raise ValueError(
                f"HKD.STUDENT.LOSS_WEIGHTS names '{name}', which is not a loss of the student; "
                f"choose from {', '.join(losses)}."
            )
        losses[name] = weight * losses[name]


def gradient_shares(
    losses: dict[str, torch.Tensor], features: list[torch.Tensor]
) -> dict[str, float]:
    """Share of each loss in the sum of gradient norms at the student's feature maps.

    The maps are where every loss meets the backbone. Norms are of the weighted losses, over all
    maps; a loss that does not reach them has share 0.
    """
    norms = {}
    for name, loss in losses.items():
        norms[name] = 0.0
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
            norms[name] = sum(float(g.float().norm()) ** 2 for g in grads if g is not None) ** 0.5
    total = sum(norms.values()) or 1.0
    return {name: norm / total for name, norm in norms.items()}


@contextmanager
def forked_random_state():
    """Restore Python's, numpy's and torch's random states on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
