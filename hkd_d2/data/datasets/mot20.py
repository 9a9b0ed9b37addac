"""MOT20: four sequences of very dense crowds (format: :mod:`.mot`).

Dendorfer, Rezatofighi, Milan, Shi, Cremers, Reid, Roth, Schindler, Leal-Taixé: MOT20: A benchmark
for multi object tracking in crowded scenes, arXiv:2003.09003, 2020.
"""

from hkd_d2.data.datasets import mot
from hkd_d2.data.datasets.formats import folder_format

SPLITS = mot.SPLITS
# As of MOT17, and vehicles without a motor.
DISTRACTORS = {2, 6, 7, 8, 12}

# Sums of the sequences' lengths.
PUBLISHED = {
    "train": {"images": 8931},
    "train_half": {"images": 4468},
    "val_half": {"images": 4463},
}


@folder_format("mot20", SPLITS)
def load_mot20(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load MOT20; see :func:`.mot.load_mot`."""
    return mot.load_mot("MOT20", root, split, DISTRACTORS, check_images=check_images)
