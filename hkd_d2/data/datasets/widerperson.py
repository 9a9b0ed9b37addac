"""WiderPerson: pedestrians in a wide range of scenes.

Under one root folder, as in the data set's ReadMe.txt::

    {split}.txt                   names of the images without their suffix, one a line
    Images/<name>.jpg
    Annotations/<name>.jpg.txt    the number of rows, then a row a line: class x1 y1 x2 y2

Zhang, Xie, Wan, Xia, Li, Guo: WiderPerson: A Diverse Dataset for Dense Pedestrian Detection in the
Wild, IEEE Transactions on Multimedia, 2019 (arXiv:1909.12118).
"""

import os

from hkd_d2.data.cache import cached_records
from hkd_d2.data.datasets.formats import folder_format
from hkd_d2.data.datasets.records import check_split, image_sizes, make_annotation
from hkd_d2.data.text_files import read_lines, shown

# The annotations of test are not public. In train and val pedestrians alone count, in the others
# riders and partially visible persons too.
SPLITS = ("train", "val", "train_persons", "val_persons")

PEDESTRIAN, RIDER, PARTIALLY_VISIBLE, IGNORE, CROWD = range(1, 6)

# The data set's ReadMe.txt.
PUBLISHED = {split: {"images": 8000 if "train" in split else 1000} for split in SPLITS}


@folder_format("widerperson", SPLITS)
def load_widerperson(root: str, split: str, *, check_images: bool = True) -> list[dict]:
    """Load WiderPerson. Which classes count is told by the split; the file's class is ``label``.

    Rows that do not count are ``ignore``; crowds are ``iscrowd`` too. Nothing is known of the
    visible share, so ``vis_ratio`` is 1, for partially visible persons as well.

    Args:
        root: folder of the data set.
        split: one of :data:`SPLITS`.
        check_images: without effect: the sizes of the images stand in the images alone, so they
            must be there.

    Returns:
        list[dict]: records (see :mod:`hkd_d2.data.datasets.records`) in the list's order, with the
        ids 1, 2, ...

    Raises:
        FileNotFoundError: the folder, the list, annotations or images are missing.
        ValueError: an unknown split, or a damaged file; the message names file and line.
    """
    root = check_split("WiderPerson", SPLITS, root, split)
    path = os.path.join(root, f"{split.removesuffix('_persons')}.txt")
    names = [name.strip() for name in read_lines(path, "put the root where train.txt is.")]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"{path}: the list of images is empty; fetch it again.")

    images = [os.path.join(root, "Images", f"{name}.jpg") for name in names]
    annotations = [os.path.join(root, "Annotations", f"{name}.jpg.txt") for name in names]
    objects = {PEDESTRIAN}
    if split.endswith("_persons"):
        objects |= {RIDER, PARTIALLY_VISIBLE}

    def parse() -> list[dict]:
        sizes = image_sizes(images, path)
        return [
            {
                "file_name": image,
                "image_id": i,
                "height": size[0],
                "width": size[1],
                "annotations": _read_rows(rows, size, objects),
            }
            for i, (image, rows, size) in enumerate(
                zip(images, annotations, sizes, strict=True), start=1
            )
        ]

    return cached_records(f"widerperson-{split}", root, [path, *annotations], parse, images=True)


def _read_rows(path: str, size: tuple[int, int], objects: set[int]) -> list[dict]:
    lines = [line.split() for line in read_lines(path, "unpack the annotations there.")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or lines[0] != [str(len(lines) - 1)]:
        raise ValueError(
            f"{path}: the first line must be the number of rows after it, of which there are "
            f"{max(len(lines) - 1, 0)}; the file is truncated or of another format, fetch it again."
        )
    annotations = []
    for i, row in enumerate(lines[1:], start=2):
        where = f"{path}: line {i}"
        try:
            label, x1, y1, x2, y2 = (float(v) for v in row)
            if label not in range(1, 6):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{where}: 'class x1 y1 x2 y2' with a class 1 to 5 is expected, not "
                f"{shown(' '.join(row))}."
            ) from None
        annotation = make_annotation(
            [x1, y1, x2 - x1, y2 - y1],
            where=where,
            image_size=size,
            ignore=label not in objects,
            iscrowd=label == CROWD,
        )
        annotations.append({**annotation, "label": int(label)})
    return annotations
