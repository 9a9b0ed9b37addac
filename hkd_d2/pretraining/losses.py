"""The losses of HSAKD (arXiv 2107.13715), HSSAKD (arXiv 2109.03075) and plain KD for classifiers.

After the released code, winycg/HSAKD at 28c8dc2: temperature 3 in every divergence and 1 in every
cross-entropy, all weights 1, means over the 4 B rows; class cross-entropy of the upright images
alone. Rows are interleaved: image i gives rows 4 i to 4 i + 3.
"""

import torch
import torch.nn.functional as F

from hkd_d2.ops import kl_distillation_loss
from hkd_d2.pretraining.networks import TURNS

TEMPERATURE = 3.0


def turned(images: torch.Tensor) -> torch.Tensor:
    """Every image upright and by one, two and three quarter turns counter-clockwise.

    Args:
        images: (B, C, H, H).

    Returns:
        Tensor: (4 B, C, H, H), the turns of an image after each other.
    """
    return torch.stack([torch.rot90(images, j, (2, 3)) for j in range(TURNS)], 1).flatten(0, 1)


def joint_labels(classes: torch.Tensor) -> torch.Tensor:
    """Labels 4 c + j (4 B,) of the rows of :func:`turned`, for classes (B,)."""
    turns = torch.arange(TURNS, device=classes.device)
    return (TURNS * classes[:, None] + turns).flatten()


def class_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the upright rows of class logits (4 B, N)."""
    return F.cross_entropy(logits[::TURNS].float(), classes)


def joint_loss(joint: list[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of joint logits (4 B, 4 N), summed over branches."""
    labels = joint_labels(classes)
    return sum(F.cross_entropy(x.float(), labels) for x in joint)


def plain_loss(student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Hinton et al.'s (arXiv 1503.02531), of class logits (B, N) of upright images.

    Cross-entropy and tau^2 KL(teacher, student), both of weight 1 as in HSAKD.
    """
    soft = kl_distillation_loss(student.float(), teacher.float(), temperature=TEMPERATURE)
    return F.cross_entropy(student.float(), classes) + soft


def imitation_loss(student, teacher) -> torch.Tensor:
    """tau^2 KL(teacher, student) of the classes and of every branch; the teacher is detached.

    Args:
        student, teacher (tuple): class logits and a list of joint logits, of every row.
    """
    pairs = [(student[0], teacher[0]), *zip(student[1], teacher[1], strict=True)]
    return sum(
        kl_distillation_loss(s.float(), t.detach().float(), temperature=TEMPERATURE)
        for s, t in pairs
    )


def student_loss(student, teacher, classes: torch.Tensor) -> torch.Tensor:
    """HSAKD's: class cross-entropy and imitation; no joint label reaches the student."""
    return class_loss(student[0], classes) + imitation_loss(student, teacher)


def mutual_loss(first, second, classes: torch.Tensor) -> torch.Tensor:
    """HSSAKD's, of two peers: both learn from the labels and each from the other."""
    own = sum(class_loss(x[0], classes) + joint_loss(x[1], classes) for x in (first, second))
    return own + imitation_loss(first, second) + imitation_loss(second, first)
