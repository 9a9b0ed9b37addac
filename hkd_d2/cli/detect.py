"""Find pedestrians in pictures, folders, videos or before a camera: drawn, and as COCO JSON.

    hkd detect --model output/quickstart/hkd_seed0/model_final.pth street.jpg video.mp4
    hkd detect --model student.onnx --out found FOLDER
    hkd detect --model teacher=teacher/model_final.pth --model student=student.onnx FOLDER
    hkd detect --model student.onnx webcam

Weights are run by Detectron2 with the config.yaml beside them, .onnx files by onnxruntime, which
needs neither PyTorch nor Detectron2. A .pt2 or .ts is a program: name only what you wrote. Several
models are drawn side by side. An unreadable file is reported in one sentence and skipped;
the exit code then is 1.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from hkd_d2.cli.arguments import add_device, add_models, named_backend, named_configs, named_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, video, folder, webcam or webcam:1"
    )
    add_models(parser)
    parser.add_argument("--out", metavar="DIR", default="output/demo", help="[%(default)s]")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="S", help="least score that is drawn [0.5]"
    )
    parser.add_argument("--backend", choices=("torch", "onnx"), help="[by the file's suffix]")
    add_device(parser)
    parser.add_argument("--max-frames", type=int, metavar="N", help="of each video or camera [all]")


def run(args: argparse.Namespace) -> int:
    # OpenCV and FFmpeg comment on files that they cannot read; one sentence of ours is enough.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from tqdm import tqdm

    from hkd_d2.inference.annotate import annotate
    from hkd_d2.inference.sources import find_sources

    say = partial(tqdm.write, file=sys.stderr)
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


def load_detectors(args: argparse.Namespace) -> dict:
    from hkd_d2.inference import load_detector

    files = named_files(args.model)
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
