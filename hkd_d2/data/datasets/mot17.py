"""MOT17: seven sequences of streets and a shopping mall (format: :mod:`.mot`).

Milan, Leal-Taixé, Reid, Roth, Schindler: MOT16: A Benchmark for Multi-Object Tracking,
arXiv:1603.00831, 2016.
"""

from hkd_d2.data.datasets import mot
from hkd_d2.data.datasets.formats import folder_format

SPLITS = mot.SPLITS
# Person on a vehicle, static person, distractor, reflection.
DISTRACTORS = {2, 7, 8, 12}

# Sums of the sequences' lengths.
PUBLISHED = {
    "train": {"images": 5316},
    "train_half": {"images": 2664},
    "val_half": {"images": 2652},
}


@folder_format("mot17", SPLITS)
def load_mot17(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load MOT17; see :func:`.mot.load_mot`."""
    return mot.load_mot("MOT17", root, split, DISTRACTORS, check_images=check_images)
