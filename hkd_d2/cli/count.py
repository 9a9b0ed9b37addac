"""Parameters and multiply-adds of detectors, part by part, beside those of the first config.

    hkd count teacher_citypersons.yaml student_citypersons.yaml
    hkd count student_citypersons.yaml MODEL.FPN.OUT_CHANNELS 64

The ratio is the first config's total over this one's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_d2.cli.arguments import config_options, split_configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="paths, or names of packaged configs (configs/); then config options, KEY VALUE",
    )


def run(args: argparse.Namespace) -> int:
    configs, args.opts = split_configs(args.configs)
    if not configs:
        raise ValueError(f"'{args.opts[0]}' is no config file; name one before the options.")
    print(table(configs, config_options(args)))
    return 0


def table(configs: Sequence[str], options: Sequence[str]) -> str:
    """Markdown table, one row a part of each config's detector."""
    from hkd_d2.modeling.summary import count_flops, count_parameters, image_size

    lines = [
        "| config | part | parameters (M) | ratio | GFLOPs | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    first = None
    for config in configs:
        model, cfg = build(config, options)
        size = image_size(cfg)
        parameters, gflops = count_parameters(model), count_flops(model, size)
        first = first or (parameters["total"], gflops["total"])
        name = f"{Path(config).stem} at {size[0]}x{size[1]}"
        for part, number in parameters.items():
            ratios = ("", "")
            if part == "total":
                ratios = (f"{first[0] / number:.2f}x", f"{first[1] / gflops[part]:.2f}x")
            lines.append(
                f"| {name} | {part} | {number / 1e6:.3f} | {ratios[0]} "
                f"| {gflops.get(part, 0):.2f} | {ratios[1]} |"
            )
            name = ""
    lines += [
        "",
        "Ratio: the first config's total over this one's. GFLOPs: 1e9 multiply-adds for one image, "
        "with as many boxes as the RPN keeps at most.",
    ]
    return "\n".join(lines)


def build(config: str, options: Sequence[str]):
    """Detector and config of the file ``config``; random weights, on the CPU."""
    from hkd_d2.config import load_config, student_config
    from hkd_d2.modeling.build import build_from_config

    options = [*options, "MODEL.DEVICE", "cpu", "HKD.BACKBONE.PRETRAINED", False]
    # The distilled student is its own config's model; the teacher and the terms weigh nothing.
    cfg = student_config(load_config(config, options))
    return build_from_config(cfg, f"'{config}'"), cfg
