#!/usr/bin/env python
"""Write a trained detector as files that run without this package, each verified against PyTorch.

    python tools/export.py --weights output/quickstart/hkd_seed0/model_final.pth
    python tools/export.py --weights student.pth --config-file student.yaml \\
        --format onnx torch_export torchscript safetensors --size 1024x2048 --batch 1 --out ship

A folder with model.onnx, model.pt2, model.ts, model.safetensors as asked for, config.yaml and
model_card.md. A file is there only if it found what the weights find under Detectron2.
"""

import hkd_d2._quiet  # noqa: F401  isort: skip
import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import os
import sys
from pathlib import Path

from hkd_d2.export.ship import FORMS, ship


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="the student's checkpoint")
    parser.add_argument("--config-file", help="its config [config.yaml beside the weights]")
    parser.add_argument(
        "--format", nargs="+", choices=FORMS, default=["onnx", "safetensors"], metavar="FORMAT",
        help=f"any of {', '.join(FORMS)} [onnx safetensors]",
    )  # fmt: skip
    parser.add_argument("--out", help="folder [export beside the weights]")
    parser.add_argument(
        "--size", type=_size, metavar="HxW",
        help="after resizing; other proportions are filled up [any size, by the config's rule]",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="images of a call [any number]")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="[the config's]")
    parser.add_argument("--nms-threshold", type=float, metavar="IOU", help="[the config's]")
    parser.add_argument("--classes", metavar="A,B", help="names of the classes, where not known")
    parser.add_argument(
        "--images", metavar="FOLDER",
        help="images to verify on [frames of MOT17 in ../shared/data/mot17mini if they are there, "
        "generated streets otherwise]",
    )  # fmt: skip
    parser.add_argument("--licence", help="of the weights, for the card")
    parser.add_argument("--notes", help="a paragraph for the card")
    args = parser.parse_args(argv)
    try:
        files = ship(
            args.weights,
            args.config_file,
            Path(args.out) if args.out else Path(args.weights).parent / "export",
            args.format,
            size=args.size,
            batch=args.batch,
            score_threshold=args.score_threshold,
            nms_threshold=args.nms_threshold,
            class_names=args.classes.split(",") if args.classes else None,
            images=args.images,
            licence=args.licence,
            notes=args.notes,
        )
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HKD_TRACEBACK"):
            raise
        sys.exit(f"export.py: {error}")
    for file in files:
        v = file["verified"]
        print(
            f"{file['path']}: {file['bytes'] / 1e6:.2f} MB, {v['detections']} detections on "
            f"{v['images']} images ({file['frames']}), boxes within {v['box']:.4f} px, scores "
            f"within {v['score']:.1e}"
        )


def _size(text):
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no HEIGHTxWIDTH") from None
    return height, width


if __name__ == "__main__":
    main()
