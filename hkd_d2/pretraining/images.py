"""Images and classes to pre-train on: a folder with one folder a class, CIFAR-10, CIFAR-100."""

from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from hkd_d2.data.image_files import check_image_files
from hkd_d2.data.images import read_data_image
from hkd_d2.modeling.backbones.pretrained import IMAGENET_MEAN, IMAGENET_STD

DATASETS = ("folder", "cifar10", "cifar100")


def open_images(kind: str, root: str, size: int, train: bool):
    """A torchvision data set of (3, size, size) RGB images, normalised as the detectors' pixels.

    Training images are padded by an eighth of their size, cropped at random and flipped, so as for
    CIFAR by 4 of 32 pixels. A folder has ``train`` and ``val``, each with one folder a class.

    Raises:
        ValueError: an unknown kind, or an image that cannot be read.
        FileNotFoundError: no such data; nothing is downloaded.
    """
    if kind not in DATASETS:
        raise ValueError(f"HKD.PRETRAINING.DATASET is '{kind}'; choose from {', '.join(DATASETS)}.")
    steps = [v2.ToImage(), v2.Resize((size, size), antialias=True)]
    if train:
        steps += [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    mean, std = ([x / 255 for x in row] for row in (IMAGENET_MEAN, IMAGENET_STD))
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    if kind == "folder":
        folder = Path(root) / ("train" if train else "val")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"'{folder}' does not exist; HKD.PRETRAINING.ROOT has the folders train and val, "
                "with one folder a class in each."
            )
        found = datasets.ImageFolder(folder, transform, loader=_read)
        check_image_files([{"file_name": path} for path, _ in found.samples], str(folder))
        return found
    cifar = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    try:
        return cifar(root, train, transform)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"'{root}' does not hold {kind} as torchvision unpacks it; put it there or change "
            "HKD.PRETRAINING.ROOT."
        ) from error


def _read(path: str) -> Image.Image:
    return Image.fromarray(read_data_image(path))
