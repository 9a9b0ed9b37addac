"""Time and memory of a distilled training step, stage by stage, beside a plain Detectron2 step.

    python tools/profile_step.py --weights output/student_citypersons/model_final.pth
    python tools/profile_step.py --teacher-precision bf16 --plot step.png HKD.CHANNELS_LAST True
    python tools/profile_step.py --proposals-by output/quickstart/hkd_seed0

Three providers step in turn on the same batch: stock (Detectron2's plain student), reference (the
distilled student by PyTorch's own operators, NCHW) and fused (as the config trains it). The batch
is of drawn streets. Without --weights the student's weights are random; its RPN runs, and then the
proposals are those of another, trained detector (--proposals-by) or boxes around the objects and of
pedestrians' shapes elsewhere.
Without a file at HKD.TEACHER.WEIGHTS the teacher's weights are random. The learning rate is 0.

On a CPU, glibc hands large buffers back to the system and asks for them anew; take that out with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 in the environment, as in long runs with an
allocator that keeps them.
"""

import hkd_d2._requirements  # noqa: F401  isort: skip
import hkd_d2._quiet  # noqa: F401  isort: skip

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from benchmarks.training_step.ledger import (
    PROVIDERS,
    keep_ledger,
    medians,
    overhead,
    street_batch,
    table,
    trained_proposals,
    training_steps,
)
from benchmarks.training_step.plot import plot_ledger
from hkd_d2.cli.errors import guard
from hkd_d2.config import load_config
from hkd_d2.devices import check_device
from hkd_d2.modeling.teacher import PRECISIONS

CONFIG = Path(__file__).parents[2] / "configs" / "hkd_citypersons.yaml"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(CONFIG), help="of a distilled run")
    parser.add_argument("--weights", default="", help="checkpoint of a trained student")
    parser.add_argument(
        "--proposals-by",
        metavar="FOLDER",
        help="of a trained two-stage detector (config.yaml, model_final.pth), which proposes boxes",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--teacher-precision", choices=PRECISIONS)
    parser.add_argument("--height", type=int, default=512, help="of the images, pixels")
    parser.add_argument("--width", type=int, default=1024, help="of the images, pixels")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--iterations", type=int, default=10, help="counted steps of each provider")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--plot", metavar="FILE", help="draw the stages as stacked bars here")
    parser.add_argument("--trace", metavar="FILE", default="", help="write a Chrome trace here")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", args.device])
    check_device(args.device, "--device")
    if args.teacher_precision:
        cfg.HKD.TEACHER.PRECISION = args.teacher_precision

    torch.manual_seed(0)
    batch = street_batch(cfg, args.height, args.width, args.batch)
    proposals = None
    if args.proposals_by:
        files = [str(Path(args.proposals_by, name)) for name in ("config.yaml", "model_final.pth")]
        for file in files:
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"--proposals-by: there is no {file}; name a finished run's folder."
                )
        proposals = trained_proposals(cfg, batch, *files)
    steps = training_steps(cfg, batch, args.weights, proposals, args.providers)
    ledger = keep_ledger(steps, batch, args.iterations, args.trace)

    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    settings = {
        "config": Path(args.config_file).name,
        "opts": args.opts,
        "proposals_by": args.weights or args.proposals_by or "drawn",
        "teacher_precision": cfg.HKD.TEACHER.PRECISION,
        "channels_last": cfg.HKD.CHANNELS_LAST,
        "images": [args.batch, args.height, args.width],
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(
        f"{settings['config']}, {args.batch} x {args.height}x{args.width}, teacher "
        f"{settings['teacher_precision']}, channels_last {settings['channels_last']}, {device}, "
        f"{settings['threads']} threads, median of {args.iterations} steps\n\n{table(ledger)}"
    )
    figures = {}
    if "stock" in ledger:
        for name in ledger:
            if name != "stock":
                figures[name] = overhead(ledger, name)
                print(
                    f"\n{name}: overhead (step - stock step - teacher) / stock step "
                    f"{figures[name]['overhead']:+.3f}; step / stock step "
                    f"{figures[name]['whole_step']:.3f}"
                )
    if args.json:
        entries = {name: dataclasses.asdict(entry) for name, entry in ledger.items()}
        content = {"settings": settings, "ledger": entries, "figures": figures}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        plot_ledger(medians(ledger), args.plot, f"{settings['config']}, {device}")


def command() -> int:
    """The ledger of the process's command line; returns the exit code."""
    return guard(main, "profile_step.py") or 0


if __name__ == "__main__":
    sys.exit(command())
