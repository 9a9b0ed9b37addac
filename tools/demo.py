#!/usr/bin/env python
"""What detectors find in pictures, folders, videos or before a camera, drawn and as COCO JSON.

    python tools/demo.py --model output/quickstart/hkd_seed0/model_final.pth street.jpg video.mp4
    python tools/demo.py --model student.onnx --out found FOLDER
    python tools/demo.py --model teacher=teacher/model_final.pth --model student=student.onnx FOLDER
    python tools/demo.py --model student.onnx webcam

Weights are run by Detectron2 with the config.yaml beside them, .onnx files by onnxruntime, which
needs neither PyTorch nor Detectron2. A .pt2 or .ts is a program: name only what you wrote. Several
models are drawn side by side. What cannot be read is told in one sentence, and the work goes on;
the exit code then is 1. It is 2 for wrong arguments.
"""

import os

# OpenCV and FFmpeg comment on files that they cannot read; the tool says it in one sentence.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import argparse  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import hkd_d2._quiet  # noqa: E402, F401  isort: skip
from tqdm import tqdm  # noqa: E402

from hkd_d2.inference import load_detector  # noqa: E402
from hkd_d2.inference.annotate import annotate  # noqa: E402
from hkd_d2.inference.arguments import named_backend, named_configs, named_models  # noqa: E402
from hkd_d2.inference.detector import BACKENDS  # noqa: E402
from hkd_d2.inference.sources import find_sources  # noqa: E402


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, video, folder, webcam or webcam:1"
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help=".pth, .safetensors, .onnx, .pt2 or .ts; several times for several side by side",
    )
    parser.add_argument(
        "--config-file",
        action="append",
        metavar="[NAME=]FILE",
        help="config of a model where none lies beside its weights; NAME where there are several",
    )
    parser.add_argument("--out", metavar="DIR", default="output/demo", help="default: %(default)s")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score that is drawn (default: 0.5)"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: by the file's suffix")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--max-frames", type=int, metavar="N", help="of each video or camera; default: all"
    )
    return parser.parse_args(argv)


def load_detectors(args) -> dict:
    files = named_models(args.model)
    configs = named_configs(args.config_file or [], list(files))
    return {
        name: load_detector(
            file,
            args.backend or named_backend(file),
            config_file=configs.get(name),
            device=args.device,
            batch_size=1,
        )
        for name, file in files.items()
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    say = partial(tqdm.write, file=sys.stderr)
    try:
        if not 0 <= args.threshold <= 1:
            raise ValueError(f"--threshold is {args.threshold}; give a number from 0 to 1.")
        if args.max_frames is not None and args.max_frames < 1:
            raise ValueError(f"--max-frames is {args.max_frames}; give 1 or more.")
        out = Path(args.out)
        sources, refusals = find_sources(args.inputs, out)
        detectors = load_detectors(args)
        for sentence in refusals:
            say(sentence)
        summary = annotate(
            sources,
            detectors,
            out,
            threshold=args.threshold,
            max_frames=args.max_frames,
            say=say,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    refused = len(refusals) + summary.refusals
    copies = len(summary.written) - len(detectors)
    print(
        f"{summary.frames} frames; {copies} annotated copies and {len(detectors)} COCO files in "
        f"{out}"
    )
    if refused:
        print(f"{refused} of the inputs were refused; the sentences above say why", file=sys.stderr)
    if summary.interrupted and not any(source.is_camera for source in sources):
        return 130  # as a shell counts Ctrl-C; before a camera it is the way to end
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
