"""Show what detectors get wrong, as one HTML page with its numbers as JSON beside it.

    hkd analyze val_gt.json teacher=a.json student=b.json \\
        --images leftImg8bit/val --out errors.html

Curves and MR^-2; misses by height and visible share at an operating point; calibration; and, with
the images, the worst false positives and misses. The terms are defined in
hkd_d2/evaluation/analysis.py.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hkd_d2.cli.arguments import named_files
from hkd_d2.evaluation import (
    MISSING_POINTS,
    PROTOCOLS,
    CrowdHumanProtocol,
    Setup,
    evaluate_miss_rate,
    select_setups,
)
from hkd_d2.evaluation.analysis import analyze_errors
from hkd_d2.evaluation.ground_truth_files import open_ground_truth
from hkd_d2.evaluation.result_files import read_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ground_truth", metavar="GT.json", help="as hkd score reads it")
    parser.add_argument(
        "detections",
        metavar="[NAME=]FILE",
        nargs="+",
        help="as hkd score reads it: COCO's result format, or a folder of "
        "Caltech's text files; the name is that of the file where none is given",
    )
    parser.add_argument("--images", metavar="DIR", help="for the contact sheets")
    parser.add_argument(
        "--out", metavar="PAGE.html", default="errors.html", help="default: %(default)s"
    )
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="citypersons",
        metavar="NAME",
        help=f"whose setups and rules [%(default)s]: {', '.join(PROTOCOLS)}",
    )
    parser.add_argument(
        "--curves", metavar="SETUP", help="setup of the curves (default: Reasonable)"
    )
    parser.add_argument("--setup", help="setup of everything else (default: All)")
    parser.add_argument(
        "--fppi",
        type=float,
        default=0.1,
        help="false positives per image of the operating point (default: %(default)s)",
    )
    parser.add_argument(
        "--worst", type=int, default=24, help="crops of each kind and detector (default: 24)"
    )
    parser.add_argument(
        "--height-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="of resized images, as in hkd score (default: 1)",
    )
    parser.add_argument(
        "--missing-point",
        choices=list(MISSING_POINTS),
        help="as in hkd score (default: the protocol's)",
    )


def run(args: argparse.Namespace) -> int:
    for path in analyze(args):
        print(f"wrote {path}")
    return 0


def default_setup(name: str, setups: Mapping[str, Setup]) -> str:
    """The setup of that name, which some protocols write in lower case; else the first."""
    return next((setup for setup in setups if setup.lower() == name), next(iter(setups)))


def analyze(args: argparse.Namespace) -> list[str]:
    """Write the page and its numbers; returns the two paths."""
    from hkd_d2.visualization.error_page import ImageFolder, write_error_page

    page = Path(args.out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {args.out}; let its name end in .html.")
    numbers = page.with_suffix(".json")
    files = named_files(args.detections, "detection file")
    if numbers.resolve() in {Path(file).resolve() for file in (args.ground_truth, *files.values())}:
        raise ValueError(f"{numbers} would be overwritten by the numbers; give another --out.")
    protocol = PROTOCOLS[args.protocol]
    if isinstance(protocol, CrowdHumanProtocol):
        raise ValueError(
            "crowdhuman has no setups to look into; hkd score gives its AP, MR^-2 and JI."
        )
    if args.missing_point:
        protocol = replace(protocol, missing_point=args.missing_point)
    if args.height_scale != 1:
        protocol = protocol.scaled(args.height_scale)
    select_setups(filter(None, [args.curves, args.setup]), protocol)
    ground_truth, protocol, setups = open_ground_truth(args.ground_truth, protocol)
    curves = args.curves or default_setup("reasonable", setups)
    setup = args.setup or default_setup("all", setups)
    if not {curves, setup} <= setups.keys():
        raise ValueError(f"{args.ground_truth} serves setup {', '.join(setups)} alone.")
    if args.images is not None:
        ImageFolder(args.images, ground_truth)  # before the work
    detections, results, errors = {}, {}, {}
    for name, file in files.items():
        detections[name] = read_results(file, ground_truth, protocol)
        try:
            errors[name] = analyze_errors(
                ground_truth,
                detections[name],
                setups[setup],
                args.fppi,
                args.worst,
                protocol,
            )
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        results[name] = evaluate_miss_rate(
            ground_truth, detections[name], setups, protocol=protocol
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_error_page(
        page,
        errors,
        results,
        ground_truth,
        detections,
        setup=setup,
        curves=curves,
        protocol=protocol,
        images=args.images,
        source=f"'{args.ground_truth}'",
    )
    content = {
        "setup": setup,
        "curves": curves,
        "protocol": protocol.name,
        "rules": protocol.rules(),
        "detectors": {
            name: {
                "miss_rate": {key: value.miss_rate for key, value in results[name].items()},
                "curve": _curve(results[name][curves]),
                "errors": errors[name].to_json(),
            }
            for name in files
        },
    }
    numbers.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return [str(page), str(numbers)]


def _curve(result) -> dict:
    return {
        "score": result.scores.tolist(),
        "fppi": result.fppi.tolist(),
        "miss": result.miss.tolist() if result.num_ground_truth else None,
    }
