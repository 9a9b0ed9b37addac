#!/usr/bin/env python
"""Parameters and multiply-adds of detectors, part by part, beside those of the first config.

Example::

    python tools/count_model.py configs/teacher_citypersons.yaml configs/student_citypersons.yaml
"""

import hkd_d2._requirements  # noqa: F401  isort: skip

import argparse
from pathlib import Path

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from hkd_d2.config import add_hkd_config
from hkd_d2.modeling.summary import count_flops, count_parameters, image_size


def build(config: str, opts: list[str]):
    """Detector and config of the file ``config``; random weights, on the CPU."""
    cfg = get_cfg()
    add_hkd_config(cfg)
    cfg.merge_from_file(config)
    cfg.merge_from_list(opts)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "HKD.BACKBONE.PRETRAINED", False])
    # The distilled student is its own config's model; the teacher and the terms weigh nothing.
    if cfg.MODEL.META_ARCHITECTURE == "HKDDetector":
        cfg.MODEL.META_ARCHITECTURE = cfg.HKD.STUDENT.META_ARCHITECTURE
    return build_model(cfg), cfg


def table(configs: list[str], opts: list[str]) -> str:
    """Markdown table, one row a part of each config's detector."""
    lines = [
        "| config | part | parameters (M) | ratio | GFLOPs | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    first = None
    for config in configs:
        model, cfg = build(config, opts)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="keys to change in every config"
    )
    args = parser.parse_args()
    print(table(args.configs, args.opts))


if __name__ == "__main__":
    main()
