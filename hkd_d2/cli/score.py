"""Log-average miss rate of a detection file, as the CityPersons benchmark computes it.

    hkd score val_gt.json detections.json
    hkd score val_gt.json detections.json --setups Reasonable heavy --json
    hkd score test_gt.json results/ --protocol caltech_new

Two setups mean "heavily occluded": Reasonable_occ=heavy (20 to 65 % visible) is the benchmark's,
heavy (0 to 65 %) that of the bare / partial / heavy split. --protocol takes another benchmark's
setups and rules, which are printed below the table. Needs NumPy alone, and SciPy for CrowdHuman.
"""

import argparse
import json
from dataclasses import replace

from hkd_d2.evaluation import (
    MISSING_POINTS,
    PROTOCOLS,
    CrowdHumanProtocol,
    evaluate_miss_rate,
    format_table,
)
from hkd_d2.evaluation.ground_truth_files import KAIST_PARTS, open_ground_truth, select_part
from hkd_d2.evaluation.result_files import read_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ground_truth",
        metavar="GT.json",
        help="COCO's form, as training takes it; or Caltech's gt-SETUP.mat, or its folder",
    )
    parser.add_argument(
        "detections",
        metavar="DETECTIONS.json",
        help="COCO's result format; or CrowdHuman's .odgt, KAIST's .txt, Caltech's dt-NAME.mat "
        "or its folder of text files",
    )
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="citypersons",
        metavar="NAME",
        help=f"whose setups and rules [%(default)s]: {', '.join(PROTOCOLS)}",
    )
    parser.add_argument(
        "--missing-point",
        choices=list(MISSING_POINTS),
        help="default: the protocol's; recall where the curve starts above a reference value; "
        + "; ".join(f"{name}: {rule}" for name, rule in MISSING_POINTS.items()),
    )
    parser.add_argument(
        "--setups",
        nargs="+",
        metavar="SETUP",
        help="after the two files; names out of the protocol's setups (default: all)",
    )
    parser.add_argument(
        "--height-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="of resized images: the setups' heights are multiplied by S (default: 1)",
    )
    parser.add_argument(
        "--part", choices=KAIST_PARTS, help="of KAIST's test images, those by day or by night"
    )
    parser.add_argument(
        "--json", action="store_true", help="print {setup: percent at full precision} alone"
    )


def run(args: argparse.Namespace) -> int:
    protocol = PROTOCOLS[args.protocol]
    if isinstance(protocol, CrowdHumanProtocol):
        if args.setups or args.missing_point or args.height_scale != 1:
            raise ValueError(
                "crowdhuman has no setups, no height scale and no rule for missing points."
            )
    else:
        if args.missing_point:
            protocol = replace(protocol, missing_point=args.missing_point)
        if args.height_scale != 1:
            protocol = protocol.scaled(args.height_scale)
    ground_truth, protocol, setups = open_ground_truth(args.ground_truth, protocol, args.setups)
    detections = read_results(args.detections, ground_truth, protocol)
    if args.part:
        ground_truth, detections = select_part(ground_truth, detections, args.part)
    if isinstance(protocol, CrowdHumanProtocol):
        from hkd_d2.evaluation.crowdhuman import evaluate_crowdhuman  # needs SciPy

        percent = evaluate_crowdhuman(ground_truth, detections, protocol).percent()
        table = "\n".join(f"{name:<6}{value:>7.2f}" for name, value in percent.items())
    else:
        results = evaluate_miss_rate(ground_truth, detections, setups, protocol=protocol)
        percent = {name: result.miss_rate for name, result in results.items()}
        if not any(result.num_ground_truth for result in results.values()):
            raise ValueError(
                f"{args.ground_truth}: no setup counts a pedestrian, so there is no miss rate; "
                "choose other --setups or another --protocol."
            )
        table = format_table(results)
    if args.json:
        print(json.dumps(percent))
        return 0
    print(f"{args.detections}: {len(detections)} detections, {len(ground_truth['images'])} images")
    if not isinstance(protocol, CrowdHumanProtocol):
        print(f"missing reference points: {protocol.missing_point}")
    print("", table, "", *protocol.describe(), sep="\n")
    return 0
