"""Select images of a COCO JSON file by folder, for example sequences of a video data set.

    hkd data split all.json --by-folder seq1 seq2 --out train.json

An image is selected where the folder of its file name is one of those given or lies under one.
Images and annotations keep their ids and order, everything else in the file is copied.
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json_file", metavar="IN.json")
    parser.add_argument("--by-folder", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--out", required=True, metavar="OUT.json")


def run(args: argparse.Namespace) -> int:
    part = split_coco(args.json_file, args.by_folder)
    with open(args.out, "w", encoding="utf-8") as f:
        json.dump(part, f)
    print(f"{args.out}: {len(part['images'])} images, {len(part['annotations'])} annotations")
    return 0


def split_coco(json_file: str, folders: list[str]) -> dict:
    """The part of a COCO data set whose images lie in ``folders``.

    Args:
        json_file: a COCO JSON file; images are named by ``file_name`` or ``im_name``.
        folders: folders as the images' names have them, with "/" between their parts.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or no COCO JSON file, or a folder holds no image.
    """
    from hkd_d2.data.datasets.coco import load_coco, read_coco

    load_coco(json_file, "", check_images=False)  # checks every row
    data = read_coco(json_file)
    images = []
    unused = list(folders)
    for image in data["images"]:
        name = image.get("file_name", image.get("im_name", ""))
        matches = [f for f in folders if name.startswith(f.rstrip("/") + "/")]
        if matches:
            images.append(image)
            unused = [f for f in unused if f not in matches]
    if unused:
        raise ValueError(
            f"{json_file}: no image lies in {', '.join(unused)}; write folders as file_name does."
        )
    ids = {image["id"] for image in images}
    annotations = [row for row in data["annotations"] if row["image_id"] in ids]
    return {**data, "images": images, "annotations": annotations}
