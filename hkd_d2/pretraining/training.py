"""Pre-train a backbone: HSAKD or KD under a teacher, HSSAKD with a peer, or by labels alone."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader

from hkd_d2.distillation.checks import one_of
from hkd_d2.files import written_beside
from hkd_d2.pretraining.images import open_images
from hkd_d2.pretraining.losses import (
    class_loss,
    joint_loss,
    mutual_loss,
    plain_loss,
    student_loss,
    turned,
)
from hkd_d2.pretraining.networks import AugmentedClassifier, SlimResNet, build_classifier

METHODS = ("labels", "kd", "hsakd", "hssakd")
TEACHERS = ("joint", "frozen")

logger = logging.getLogger(__name__)


def pretrain(cfg: CfgNode) -> dict[str, float]:
    """Train as ``cfg.HKD.PRETRAINING`` says and write the student to ``cfg.OUTPUT_DIR``.

    ``backbone.pth`` is the student's body under the names that it has in a detector, for
    ``MODEL.WEIGHTS``; ``classifiers.pth`` has every network whole.

    Returns:
        dict[str, float]: share of the validation images that each network classifies rightly.

    Raises:
        ValueError, FileNotFoundError: an option or a data set that will not do, before a step.
    """
    node = cfg.HKD.PRETRAINING
    method = one_of("HKD.PRETRAINING.METHOD", node.METHOD, METHODS)
    one_of("HKD.PRETRAINING.TEACHER_TRAINING", node.TEACHER_TRAINING, TEACHERS)
    train, val = (open_images(node.DATASET, node.ROOT, node.IMAGE_SIZE, x) for x in (True, False))
    if train.classes != val.classes:
        raise ValueError(f"train and val of '{node.ROOT}' have other classes; make them alike.")
    loader = DataLoader(
        train,
        min(node.BATCH_SIZE, len(train)),
        shuffle=True,
        drop_last=True,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    seed = max(cfg.SEED, 0)
    torch.manual_seed(seed)
    names = {"student": node.STUDENT}  # first, so that it starts alike in every method
    if method != "labels":
        names["peer" if method == "hssakd" else "teacher"] = node.TEACHER
    networks = {
        role: build_classifier(name, len(train.classes)).to(cfg.MODEL.DEVICE)
        for role, name in names.items()
    }
    student, other = networks["student"], networks.get("peer", networks.get("teacher"))
    if method in ("kd", "hsakd"):
        fit_teacher(other, loader, node, branches=method == "hsakd")
        other.eval().requires_grad_(False)

    def labels(images, classes):
        return F.cross_entropy(student.classify(images), classes)

    def kd(images, classes):
        with torch.no_grad():
            theirs = other.classify(images)
        return plain_loss(student.classify(images), theirs, classes)

    def hsakd(images, classes):
        images = turned(images)
        with torch.no_grad():
            theirs = other(images)
        return student_loss(student(images), theirs, classes)

    def hssakd(images, classes):
        images = turned(images)
        return mutual_loss(student(images), other(images), classes)

    torch.manual_seed(seed)  # the student's images come in one order in every method
    loss = {"labels": labels, "kd": kd, "hsakd": hsakd, "hssakd": hssakd}[method]
    fit([student, other] if method == "hssakd" else [student], loader, node, loss)

    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    states = {role: network.state_dict() for role, network in networks.items()}
    for name, content in (("classifiers", states), ("backbone", backbone_weights(student))):
        with written_beside(output / f"{name}.pth") as part:
            torch.save(content, part)
    accuracies = {role: accuracy(n, val, node.BATCH_SIZE) for role, n in networks.items()}
    logger.info("Right on the validation images: %s", accuracies)
    return accuracies


def fit_teacher(teacher: AugmentedClassifier, loader, node: CfgNode, branches: bool = True) -> None:
    """Body and branches together, or the body by its classes first and then, frozen, the branches.

    The frozen body is in eval mode, so that its running statistics stay.

    Args:
        branches: whether the second of two trainings is wanted.
    """

    def joint(images, classes):
        logits, joints = teacher(turned(images))
        return class_loss(logits, classes) + joint_loss(joints, classes)

    if node.TEACHER_TRAINING == "joint":
        return fit([teacher], loader, node, joint)
    fit([teacher], loader, node, lambda x, y: F.cross_entropy(teacher.classify(x), y))
    if not branches:
        return

    def branches_alone(images, classes):
        teacher.body.eval()
        return joint_loss(teacher(turned(images), detach=True)[1], classes)

    for module in (teacher.body, teacher.classifier):
        module.requires_grad_(False)
    fit([teacher], loader, node, branches_alone)


def fit(
    networks: list[nn.Module],
    loader: DataLoader,
    node: CfgNode,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[float]:
    """Train by SGD with Nesterov's momentum, the rate a tenth after each of ``DROPS`` epochs.

    Args:
        loss: of images (B, 3, H, H) and classes (B,).

    Returns:
        list[float]: the mean loss of each epoch.
    """
    parameters = [p for n in networks for p in n.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, node.LR, momentum=0.9, nesterov=True, weight_decay=node.WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(node.DROPS))
    device, means = parameters[0].device, []
    for epoch in range(node.EPOCHS):
        for network in networks:
            network.train()
        total = 0.0
        for images, classes in loader:
            optimizer.zero_grad()
            value = loss(images.to(device), classes.to(device))
            value.backward()
            optimizer.step()
            total += value.detach()
        schedule.step()
        means.append(float(total) / len(loader))
        logger.info("epoch %d of %d: loss %.4f", epoch + 1, node.EPOCHS, means[-1])
    return means


@torch.no_grad()
def accuracy(network: AugmentedClassifier, images, batch_size: int) -> float:
    """Share of the images whose class the network names."""
    network.eval()
    device, right = next(network.parameters()).device, 0
    for x, y in DataLoader(images, batch_size):
        right += int((network.classify(x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(images)


def backbone_weights(network: AugmentedClassifier) -> dict:
    """The body as a checkpoint of a detector: a slim ResNet as its FPN's ``bottom_up``."""
    if isinstance(network.body, SlimResNet):
        state = network.body.resnet.state_dict()
        return {"model": {f"backbone.bottom_up.{k}": v for k, v in state.items()}}
    return {"model": network.body.state_dict()}
