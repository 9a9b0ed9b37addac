"""Label images with a teacher's detections: pseudo-labels for HKD.DATA.PSEUDO.

    hkd label --model output/teacher_retinanet_citypersons/model_final.pth \\
        --data citypersons_train --out output/files/citypersons_retinanet.json
    hkd label --model ... --images FOLDER --out LABELS.json

An image of FOLDER that cannot be used is named and left out, and the exit code is 1. A file that is
there is replaced when the new one is complete. Without a GPU add MODEL.DEVICE cpu.
"""

import argparse
import sys
from pathlib import Path

from hkd_d2.cli.arguments import (
    add_config_file,
    add_data,
    add_options,
    config_options,
    data_name,
)

# Version of what the command writes, in the file's info.
TOOL = "hkd label 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="the teacher's checkpoint")
    add_config_file(parser, "the teacher's config")
    source = parser.add_mutually_exclusive_group(required=True)
    add_data(source, "--data", "images to label")
    source.add_argument("--images", metavar="FOLDER", help="every image in a folder and below")
    parser.add_argument("--out", required=True, metavar="LABELS.json")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.4,
        metavar="S",
        help="keep detections above this score [0.4, of older configs of the released code]",
    )
    parser.add_argument(
        "--classes", metavar="A,B", help="the teacher's class names in order, where not known"
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    from hkd_d2.data.datasets import check_records, register_datasets
    from hkd_d2.data.image_files import (
        check_image_files,
        find_images,
        resize_sizes,
        usable_records,
    )
    from hkd_d2.data.pseudo_labels import check_pseudo_label_target, write_pseudo_labels
    from hkd_d2.devices import check_device
    from hkd_d2.engine.pseudo_labels import label_images
    from hkd_d2.inference.torch_backend import load_config

    options = config_options(args)
    check_pseudo_label_target(args.out)
    cfg = load_config(args.model, args.config_file, options)
    check_device(cfg.MODEL.DEVICE)
    register_datasets(cfg)
    sizes = resize_sizes(cfg, is_train=False)
    refusals = []

    def refuse(sentence):
        print(f"hkd label: {sentence}", file=sys.stderr)
        refusals.append(sentence)

    if args.data:
        name = data_name(args.data)
        records = check_records(name)
        check_image_files(records, name, sizes)
    else:
        records = usable_records(find_images(args.images, refuse), sizes, refuse)
        if not records:
            raise ValueError(f"No image of '{args.images}' can be labelled; name another folder.")
    pseudo = label_images(
        cfg,
        args.model,
        records,
        score_threshold=args.score_threshold,
        classes=args.classes.split(",") if args.classes else None,
        info={
            "tool": TOOL,
            "teacher_config": args.config_file or str(Path(args.model).parent / "config.yaml"),
            "teacher_options": options,
        },
    )
    found = len(pseudo["annotations"])
    if not found:
        raise ValueError(
            f"{args.model} finds nothing above {args.score_threshold} in {len(records)} images; "
            "lower --score-threshold or name other images. Nothing was written."
        )
    write_pseudo_labels(args.out, pseudo)
    print(
        f"{args.out}: {len(pseudo['images'])} images, {found} detections above "
        f"{args.score_threshold}"
    )
    return 1 if refusals else 0
