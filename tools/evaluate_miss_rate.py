#!/usr/bin/env python
"""Log-average miss rate of a detection file, as the CityPersons benchmark computes it.

    python tools/evaluate_miss_rate.py val_gt.json detections.json
    python tools/evaluate_miss_rate.py val_gt.json detections.json --setups Reasonable heavy --json

Two setups mean "heavily occluded": Reasonable_occ=heavy (20 to 65 % visible) is the benchmark's,
heavy (0 to 65 %) that of the bare / partial / heavy split. Needs NumPy alone.
"""

import argparse
import json
import sys

from hkd_d2.evaluation.miss_rate import (
    MISSING_POINTS,
    SETUPS,
    evaluate_miss_rate,
    format_table,
    load_detections,
    load_ground_truth,
    select_setups,
)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ground_truth", metavar="GT.json", help="COCO-style, with height and vis_ratio"
    )
    parser.add_argument("detections", metavar="DETECTIONS.json", help="COCO's result format")
    parser.add_argument(
        "--missing-point",
        choices=list(MISSING_POINTS),
        default="official",
        help="recall where the curve starts above a reference value; "
        + "; ".join(f"{name}: {rule}" for name, rule in MISSING_POINTS.items()),
    )
    parser.add_argument(
        "--setups",
        nargs="+",
        default=list(SETUPS),
        metavar="SETUP",
        help=f"after the two files; out of {', '.join(SETUPS)} (default: all)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print {setup: percent at full precision} alone"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        setups = select_setups(args.setups)
        ground_truth = load_ground_truth(args.ground_truth)
        detections = load_detections(args.detections, ground_truth)
        results = evaluate_miss_rate(ground_truth, detections, setups, args.missing_point)
    except (ValueError, OSError) as error:
        print(f"evaluate_miss_rate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({name: result.miss_rate for name, result in results.items()}))
        return 0
    print(
        f"{args.detections}: {len(detections)} detections, {len(ground_truth['images'])} images\n"
        f"missing reference points: {args.missing_point}\n"
    )
    print(format_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
