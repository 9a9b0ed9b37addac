#!/usr/bin/env python
"""INT8 for a detector that tools/export.py wrote, with its miss rate before and after.

    python tools/quantize.py --model ship/student/model.onnx \\
        --calibration citypersons output/quickstart/streets train \\
        --data citypersons output/quickstart/streets val

Writes model_int8.onnx beside the model and adds to the model card there. onnxruntime's static
quantisation: ranges of activations from calibration images, weights with a scale for each channel.
Layers that predict stay in float, and so does every layer that alone would lose too much; the
output names them. Needs neither the checkpoint nor Detectron2's config.
"""

import hkd_d2._quiet  # noqa: F401  isort: skip
import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
import os
import sys
from pathlib import Path

from hkd_d2.data.datasets import check_records
from hkd_d2.data.datasets.register import FOLDERS, register_dataset
from hkd_d2.evaluation import MISSING_POINTS
from hkd_d2.export.model_card import add_section
from hkd_d2.export.quantize import MIN_SQNR, quantize
from hkd_d2.inference import load_detector
from hkd_d2.inference.benchmark import SETUPS, score_detector

NUM_IMAGES = 100
_FORMAT = f"coco FILE IMAGES, or a format out of {', '.join(FOLDERS)} with its root and split"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = {"nargs": 3, "metavar": ("FORMAT", "SOURCE", "PART")}
    parser.add_argument("--model", required=True, help="an .onnx of tools/export.py")
    parser.add_argument(
        "--calibration", required=True, **data, help=f"data set of the ranges: {_FORMAT}"
    )
    parser.add_argument(
        "--images", type=int, default=NUM_IMAGES, metavar="N",
        help="images of it, evenly spread (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--data", **data, help="data set of the miss rate, before and after")
    parser.add_argument(
        "--missing-point", choices=list(MISSING_POINTS), default="official", help="of the miss rate"
    )
    parser.add_argument(
        "--min-sqnr", type=float, default=MIN_SQNR, metavar="DB",
        help="least signal over noise of a layer in INT8 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", help="[the model's name with _int8, beside it]")
    args = parser.parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HKD_TRACEBACK"):
            raise
        sys.exit(f"quantize.py: {error}")


def run(args) -> str:
    """Quantise, score, write; what was found, as Markdown."""
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
    name = " ".join(data)
    register_dataset(name, *data)
    return check_records(name)


def _name(data):
    """A data set without the path where it lies."""
    form, source, part = data
    return f"{form} {part}" if form in FOLDERS else f"{form} {Path(source).name}"


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


if __name__ == "__main__":
    main()
