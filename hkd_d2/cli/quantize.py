"""Quantise a detector that hkd export wrote to INT8; its miss rate before and after.

    hkd quantize --model ship/student/model.onnx \\
        --calibration citypersons output/quickstart/streets train \\
        --data citypersons output/quickstart/streets val

Writes model_int8.onnx beside the model and adds to the model card there. onnxruntime's static
quantisation: ranges of activations from calibration images, weights with a scale for each channel.
Layers that predict stay in float, and so does every layer that alone would lose too much; the
output names them. Needs neither the checkpoint nor Detectron2's config.
"""

import argparse
import os
from pathlib import Path

from hkd_d2.cli.arguments import add_data, add_missing_point, data_name

NUM_IMAGES = 100
MIN_SQNR = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="FILE", help="an .onnx of hkd export")
    add_data(parser, "--calibration", "data of the ranges", required=True)
    parser.add_argument(
        "--images", type=int, default=NUM_IMAGES, metavar="N",
        help="images of it, evenly spread [%(default)s]",
    )  # fmt: skip
    add_data(parser, "--data", "data of the miss rate, before and after")
    add_missing_point(parser)
    parser.add_argument(
        "--min-sqnr", type=float, default=MIN_SQNR, metavar="DB",
        help="least signal over noise of a layer in INT8 [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="[the model's name with _int8, beside it]")


def run(args: argparse.Namespace) -> int:
    print(quantize_and_score(args))
    return 0


def quantize_and_score(args: argparse.Namespace) -> str:
    """Quantise, score, write; what was found, as Markdown."""
    from hkd_d2.export.model_card import add_section
    from hkd_d2.export.quantize import quantize

    if args.images < 1:
        raise ValueError(f"--images is {args.images}; give 1 or more.")
    path = Path(args.model)
    out = Path(args.out) if args.out else path.with_name(f"{path.stem}_int8.onnx")
    if out.resolve() == path.resolve():
        raise ValueError(f"--out is the model itself, '{path}'; give another file.")
    tested = _records(args.data) if args.data else []
    records = _records(args.calibration)
    images = [r["file_name"] for r in records[:: max(len(records) // args.images, 1)]]
    record = quantize(
        path, images[: args.images], out, data=_name(args.calibration), min_sqnr=args.min_sqnr
    )
    report = _report(record, out)
    if tested:
        report += "\n\n" + _table({"float32": path, "INT8": out}, tested, args)
    add_section(out.with_name("model_card.md"), "Quantisation", report)
    return report


def _records(data):
    from hkd_d2.data.datasets import check_records

    return check_records(data_name(data))


def _name(data):
    """A data set without the path where it lies."""
    if len(data) == 1:
        return data[0]
    form, source, part = data
    return f"coco {Path(source).name}" if form == "coco" else f"{form} {part}"


def _report(record, out):
    measured = list(record["int8"].values())
    lines = [
        f"`{out.name}`: {len(record['int8'])} layers in INT8, calibrated on {record['images']} "
        f"images ({record['data']}); signal over noise of each alone {min(measured):.1f} to "
        f"{max(measured):.1f} dB, at least {record['min_sqnr']:g} wanted. In float:",
        "",
    ]
    for name, value in record["float"].items():
        lines.append(f"- `{name}`, " + ("predicts" if value is None else f"{value:.1f} dB"))
    return "\n".join(lines)


def _table(files, records, args):
    """MR^-2 of float and INT8."""
    from hkd_d2.inference import load_detector
    from hkd_d2.inference.benchmark import SETUPS, score_detector

    head = ["model", "file (MB)", *(f"MR^-2 {setup}" for setup in SETUPS)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, file in files.items():
        rates = score_detector(
            load_detector(file), records, missing_point=args.missing_point, name=name
        )
        cells = ["" if rate is None else f"{rate:.2f}" for rate in rates.values()]
        size = f"{os.path.getsize(file) / 1e6:.2f}"
        lines.append("| " + " | ".join([name, size, *cells]) + " |")
    lines += [
        "",
        f"In percent, on {len(records)} images ({_name(args.data)}); missing reference points: ",
    ]
    lines[-1] += f"{args.missing_point}."
    return "\n".join(lines)
