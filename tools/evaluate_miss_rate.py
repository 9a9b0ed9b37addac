#!/usr/bin/env python
"""Log-average miss rate of a detection file, as the CityPersons benchmark computes it.

    python tools/evaluate_miss_rate.py val_gt.json detections.json
    python tools/evaluate_miss_rate.py val_gt.json detections.json --setups Reasonable heavy --json
    python tools/evaluate_miss_rate.py test_gt.json results/ --protocol caltech_new

Two setups mean "heavily occluded": Reasonable_occ=heavy (20 to 65 % visible) is the benchmark's,
heavy (0 to 65 %) that of the bare / partial / heavy split. --protocol takes another benchmark's
setups and rules, which are printed below the table. Needs NumPy alone, and SciPy for CrowdHuman.
"""

import argparse
import json
import sys
from dataclasses import replace

from hkd_d2.evaluation import (
    MISSING_POINTS,
    PROTOCOLS,
    CrowdHumanProtocol,
    evaluate_crowdhuman,
    evaluate_miss_rate,
    format_table,
    load_ground_truth,
    select_setups,
)
from hkd_d2.evaluation.result_files import read_results


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ground_truth", metavar="GT.json", help="COCO-style, with height and vis_ratio"
    )
    parser.add_argument(
        "detections",
        metavar="DETECTIONS.json",
        help="COCO's result format; or CrowdHuman's .odgt, or a folder of Caltech's text files",
    )
    parser.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        default="citypersons",
        help="whose setups and rules (default: %(default)s)",
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
        "--json", action="store_true", help="print {setup: percent at full precision} alone"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    protocol = PROTOCOLS[args.protocol]
    try:
        if isinstance(protocol, CrowdHumanProtocol):
            if args.setups or args.missing_point:
                raise ValueError("crowdhuman has no setups and no rule for missing points.")
        else:
            if args.missing_point:
                protocol = replace(protocol, missing_point=args.missing_point)
            setups = select_setups(args.setups, protocol)
        ground_truth = load_ground_truth(args.ground_truth, protocol)
        detections = read_results(args.detections, ground_truth, protocol)
        if isinstance(protocol, CrowdHumanProtocol):
            percent = evaluate_crowdhuman(ground_truth, detections, protocol).percent()
            table = "\n".join(f"{name:<6}{value:>7.2f}" for name, value in percent.items())
        else:
            results = evaluate_miss_rate(ground_truth, detections, setups, protocol=protocol)
            percent = {name: result.miss_rate for name, result in results.items()}
            table = format_table(results)
    except (ValueError, OSError) as error:
        print(f"evaluate_miss_rate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(percent))
        return 0
    print(f"{args.detections}: {len(detections)} detections, {len(ground_truth['images'])} images")
    if not isinstance(protocol, CrowdHumanProtocol):
        print(f"missing reference points: {protocol.missing_point}")
    print("", table, "", *protocol.describe(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
