"""LW-KD: a lightweight teacher of a made-up task gives the class logits soft targets."""

import contextlib
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from hkd_d2.distillation.class_order import order_in_class
from hkd_d2.distillation.glyphs import draw_glyphs, train_classifier
from hkd_d2.distillation.spec import DetectorSpec
from hkd_d2.distillation.term import TERM_REGISTRY, Term
from hkd_d2.ops import kl_distillation_loss

PICTURES = 256  # pictures of each class
HIDDEN = 64  # of the discriminator

logger = logging.getLogger(__name__)


@TERM_REGISTRY.register()
class LWKD(Term):
    """Soft targets of a tiny classifier of glyphs, and a discriminator (after arXiv 2005.09163).

    A classifier of a synthetic task with as many classes as the detector (and one for the
    background) is trained when the term is built, in seconds; see
    :mod:`hkd_d2.distillation.glyphs`. A sampled region of class c is paired with a picture of class
    c, whose class probabilities q at temperature T are its target. A discriminator D tells the
    student's p from q, given c, and the student tries to be taken for the classifier:

    .. math:: L = T^2 \\operatorname{mean}_r \\mathrm{KL}(q_r \\| p_r)
              - b \\operatorname{mean}_r \\ln D(p_r, c_r), \\qquad
              L_D = - \\operatorname{mean}_r \\left[\\ln D(q_r, c_r) + \\ln(1 - D(p_r, c_r))\\right]

    The first reaches the student alone, the second the discriminator alone, in one backward: what
    the term returns has the value of L and the gradients of L + L_D, both under the term's weight.
    The discriminator is a parameter group of its own, with ``DISCRIMINATOR_LR`` and no decay.

    The synthetic task with an adjustable number of classes, the soft targets and the adversarial
    loss are the paper's abstract; architectures and every constant are ours. The student's own
    cross-entropy keeps its weight. With one class the term is label smoothing with a smoothing of
    each instance's own.

    Attributes:
        soft_targets: (K + 1, 256, K + 1) float32 logits of the classifier, the class of
            the picture first.
        drawn: (K + 1,) int64, pictures of each class given out so far.

    Raises:
        ValueError: an option out of range, or a one-stage student.
    """

    needs = frozenset()

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term.
        node.WEIGHT = 1.0
        # Temperature of both sides' class probabilities.
        node.TEMPERATURE = 4.0
        # Weight of the student's adversarial loss relative to the divergence.
        node.ADVERSARIAL_WEIGHT = 0.1
        # Learning rate of the discriminator, at the height of SOLVER's schedule.
        node.DISCRIMINATOR_LR = 0.001

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec | None):
        super().__init__(cfg)
        node = cfg.HKD.LWKD
        if student.one_stage:
            raise ValueError(
                "The term 'lwkd' gives targets to the regions of a box head, and the student is "
                "one-stage; drop 'lwkd' from HKD.TERMS."
            )
        for name in ("TEMPERATURE", "DISCRIMINATOR_LR"):
            if not node[name] > 0:
                raise ValueError(f"HKD.LWKD.{name} is {node[name]}; give a number above 0.")
        if not node.ADVERSARIAL_WEIGHT >= 0:
            raise ValueError(
                f"HKD.LWKD.ADVERSARIAL_WEIGHT is {node.ADVERSARIAL_WEIGHT}; give 0 or more."
            )
        self.temperature = node.TEMPERATURE
        self.adversarial_weight = node.ADVERSARIAL_WEIGHT
        self.discriminator_lr = node.DISCRIMINATOR_LR
        classes = student.num_classes + 1
        self.num_classes = classes
        self.register_buffer("soft_targets", glyph_logits(student.num_classes))
        self.register_buffer("drawn", torch.zeros(classes, dtype=torch.int64))
        self.discriminator = nn.Sequential(
            nn.Linear(2 * classes, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1)
        )

    def parameter_groups(self):
        parameters = list(self.discriminator.parameters())
        return [{"params": parameters, "lr": self.discriminator_lr, "weight_decay": 0.0}]

    def forward(self, student, teacher, targets):
        logits = student.regions.class_logits.float()
        if len(logits) == 0:
            return self.zero(logits)
        classes = torch.cat([x.gt_classes for x in student.sampled])
        soft = self.draw(classes)
        distance = kl_distillation_loss(logits, soft, temperature=self.temperature)

        ours = (logits / self.temperature).softmax(1)
        theirs = (soft / self.temperature).softmax(1)
        labels = F.one_hot(classes, self.num_classes).to(ours)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        taken = torch.func.functional_call(self.discriminator, frozen, torch.cat([ours, labels], 1))
        told = self.discriminator(torch.cat([theirs, labels], 1))
        told_apart = self.discriminator(torch.cat([ours.detach(), labels], 1))
        loss = distance + self.adversarial_weight * F.softplus(-taken.float()).mean()
        of_discriminator = (F.softplus(-told.float()) + F.softplus(told_apart.float())).mean()
        return loss + (of_discriminator - of_discriminator.detach())

    @torch.no_grad()
    def draw(self, classes: torch.Tensor) -> torch.Tensor:
        """The next picture's logits for each of (R,) classes, (R, K + 1)."""
        one_hot = F.one_hot(classes, self.num_classes)
        picture = (self.drawn[classes] + order_in_class(one_hot)) % PICTURES
        self.drawn += one_hot.sum(0)
        return self.soft_targets[classes, picture]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def glyph_logits(num_glyphs: int) -> torch.Tensor:
    """Train the classifier and let it judge :data:`PICTURES` fresh pictures of each class.

    The result depends on nothing but ``num_glyphs``: the random state of the caller is neither used
    nor moved, and one thread computes, since sums over more are rounded differently.

    Returns:
        Tensor: (num_glyphs + 1, PICTURES, num_glyphs + 1) float32.
    """
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(num_glyphs + 1).repeat_interleave(PICTURES)
    # The layers are initialised from the global state first, then from the generator.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), one_thread():
        classifier = train_classifier(num_glyphs, generator)
        logits = classifier(draw_glyphs(classes, num_glyphs, generator)).detach()
    right = (logits.argmax(1) == classes).float().mean()
    logger.info(
        "LW-KD: a classifier of %d glyphs and the background is right about %.1f %% of fresh ones",
        num_glyphs,
        100 * right,
    )
    return logits.view(num_glyphs + 1, PICTURES, num_glyphs + 1)
