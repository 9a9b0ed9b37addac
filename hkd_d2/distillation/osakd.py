"""Online self-acquired knowledge: soft labels of the student's own past region embeddings."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from hkd_d2.distillation.checks import one_of
from hkd_d2.distillation.class_order import order_in_class
from hkd_d2.distillation.spec import DetectorSpec
from hkd_d2.distillation.term import TERM_REGISTRY, Term
from hkd_d2.ops import kl_distillation_loss

LOSSES = ("kl", "mse")


@TERM_REGISTRY.register()
class OSAKD(Term):
    """Class probabilities from nearest neighbours, without a teacher (after arXiv 2108.11798).

    The density of class m about a region's embedding y, estimated from the k nearest of the B_m
    embeddings of that class and B of all, is k_m / (B_m V); with the priors B_m / B Bayes' rule
    leaves the share of the neighbours, and every region is told

    .. math:: s_m = \\frac{k_m + \\epsilon}{k + (K + 1) \\epsilon}, \\qquad
              L = \\operatorname{mean}_r \\mathrm{KL}(s_r \\| p_r) \\quad\\text{or}\\quad
              \\operatorname{mean}_{r, m} (s_{rm} - p_{rm})^2

    with p the student's softmax over its K classes and the background. That posteriors come online
    from a nearest-neighbour density estimate is the paper's abstract, the rule above follows from
    it; every constant and what follows here is ours. The neighbours are looked up, by Euclidean
    distance, in a bank of detached embeddings of earlier steps, so a region never votes for itself.
    Each class has an equal share of the bank, first in, first out, since the background is most of
    what an RPN samples. Until the bank holds ``READY_AT`` embeddings the loss is 0.

    Every process has a bank of its own, which is saved with the training state.

    Attributes:
        embeddings: (BANK_SIZE + 1, D) float32; the last row is written to, never read.
        classes: (BANK_SIZE,) int64, -1 where the row is still empty.
        written: (K + 1,) int64, rows written of each class.

    Raises:
        ValueError: an option out of range, or a one-stage student.
    """

    needs = frozenset()

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Weight of the term, the paper's lambda.
        node.WEIGHT = 1.0
        # Nearest neighbours that vote for the classes of a region.
        node.K = 10
        # Embeddings of earlier regions that are kept, the same number of every class.
        node.BANK_SIZE = 4096
        # Embeddings in the bank from which on the term acts.
        node.READY_AT = 1024
        # Votes that every class has beforehand.
        node.SMOOTHING = 0.1
        # Distance of the student's class probabilities from the neighbours': kl | mse.
        node.LOSS = "kl"

    def __init__(self, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec | None):
        super().__init__(cfg)
        node = cfg.HKD.OSAKD
        if student.one_stage:
            raise ValueError(
                "The term 'osakd' compares the regions of a box head, and the student is "
                "one-stage; drop 'osakd' from HKD.TERMS."
            )
        self.loss = one_of("HKD.OSAKD.LOSS", node.LOSS, LOSSES)
        self.num_classes = student.num_classes + 1
        self.rows_a_class = node.BANK_SIZE // self.num_classes
        if not 0 < node.K <= node.READY_AT <= self.rows_a_class * self.num_classes:
            raise ValueError(
                f"HKD.OSAKD has K {node.K}, READY_AT {node.READY_AT} and BANK_SIZE "
                f"{node.BANK_SIZE}; the bank is filled to equal shares of {self.num_classes} "
                "classes (with the background), so give 0 < K <= READY_AT <= "
                f"{self.rows_a_class * self.num_classes}, or a larger BANK_SIZE."
            )
        if not node.SMOOTHING > 0:
            raise ValueError(f"HKD.OSAKD.SMOOTHING is {node.SMOOTHING}; give a number above 0.")
        self.k, self.ready_at, self.smoothing = node.K, node.READY_AT, node.SMOOTHING
        rows = self.rows_a_class * self.num_classes
        self.register_buffer("embeddings", torch.zeros(rows + 1, student.hidden_channels))
        self.register_buffer("classes", torch.full((rows,), -1))
        self.register_buffer("written", torch.zeros(self.num_classes, dtype=torch.int64))

    def forward(self, student, teacher, targets):
        regions = student.regions
        if len(regions.hidden) == 0:
            return self.zero(regions.class_logits)
        embeddings = regions.hidden.detach().to(self.embeddings.dtype)
        ready = (self.classes >= 0).sum() >= self.ready_at
        posterior = self.posterior(embeddings)
        self.remember(embeddings, torch.cat([x.gt_classes for x in student.sampled]))
        logits = regions.class_logits.float()
        if self.loss == "kl":
            loss = kl_distillation_loss(logits, posterior.log())
        else:
            loss = F.mse_loss(logits.softmax(1), posterior)
        # No branch: on a GPU a look at the bank would wait for the device.
        return loss * ready

    @torch.no_grad()
    def posterior(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Class probabilities of (R, D) float32 embeddings by the bank's, (R, K + 1)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            bank = self.embeddings[:-1]
            # |x - b|^2 without |x|^2, which is the same for all of a row's neighbours.
            distances = torch.addmm(bank.square().sum(1), embeddings, bank.T, alpha=-2)
        distances = distances.masked_fill(self.classes < 0, torch.inf)
        nearest = distances.topk(self.k, largest=False, sorted=False).indices
        # An empty row can only be among the nearest before the bank is ready.
        votes = F.one_hot(self.classes[nearest].clamp(min=0), self.num_classes).sum(1)
        return (votes + self.smoothing) / (self.k + self.num_classes * self.smoothing)

    @torch.no_grad()
    def remember(self, embeddings: torch.Tensor, classes: torch.Tensor) -> None:
        """Write (R, D) embeddings over the oldest of their class; class -1 is left out."""
        known = (classes >= 0) & (classes < self.num_classes)
        one_hot = F.one_hot(classes.where(known, 0), self.num_classes) * known[:, None]
        total = one_hot.sum(0)
        order = order_in_class(one_hot)
        # Of more than a class has room for, the last are kept.
        kept = known & (order >= (total - self.rows_a_class)[classes.where(known, 0)])
        start = self.written[classes.where(known, 0)]
        rows = classes * self.rows_a_class + (start + order) % self.rows_a_class
        self.embeddings[rows.where(kept, len(self.classes))] = embeddings
        self.written += total
        filled = torch.arange(self.rows_a_class, device=classes.device) < self.written[:, None]
        labels = torch.arange(self.num_classes, device=classes.device)[:, None]
        self.classes.copy_(labels.where(filled, -1).flatten())
