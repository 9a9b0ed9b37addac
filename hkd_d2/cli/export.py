"""Write a trained detector as files that run without this package, each verified against PyTorch.

    hkd export --model output/quickstart/hkd_seed0/model_final.pth
    hkd export --model student.pth --config-file student.yaml --size 1024x2048 --batch 1 \\
        --format onnx torch_export torchscript safetensors --out ship

A folder with model.onnx, model.pt2, model.ts, model.safetensors as asked for, config.yaml and
model_card.md. A file is there only if it found what the weights find under Detectron2.
"""

import argparse
from pathlib import Path

from hkd_d2.cli.arguments import add_config_file

FORMATS = ("onnx", "torch_export", "torchscript", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="the student's checkpoint")
    add_config_file(parser, "its config")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=["onnx", "safetensors"], metavar="FORMAT",
        help=f"any of {', '.join(FORMATS)} [onnx safetensors]",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder [export beside the model]")
    parser.add_argument(
        "--size", type=_size, metavar="HxW",
        help="after resizing; other proportions are filled up [any size, by the config's rule]",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="images of a call [any number]")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="[the config's]")
    parser.add_argument("--nms-threshold", type=float, metavar="IOU", help="[the config's]")
    parser.add_argument("--classes", metavar="A,B", help="names of the classes, where not known")
    parser.add_argument("--images", metavar="FOLDER", help="images to verify on [drawn streets]")
    parser.add_argument("--licence", help="of the weights, for the card")
    parser.add_argument("--notes", help="a paragraph for the card")


def run(args: argparse.Namespace) -> int:
    from hkd_d2.export.ship import ship

    files = ship(
        args.model,
        args.config_file,
        Path(args.out) if args.out else Path(args.model).parent / "export",
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
    for file in files:
        v = file["verified"]
        print(
            f"{file['path']}: {file['bytes'] / 1e6:.2f} MB, {v['detections']} detections on "
            f"{v['images']} images ({file['frames']}), boxes within {v['box']:.4f} px, scores "
            f"within {v['score']:.1e}"
        )
    return 0


def _size(text):
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no HEIGHTxWIDTH") from None
    return height, width
