#!/usr/bin/env python
"""Write a data set of synthetic streets in the on-disk form of CityPersons.

python tools/generate_streets.py --root datasets/streets --preview sheet.png
"""

import argparse

import cv2

from hkd_d2.data.streets import contact_sheet, generate_streets


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder to write")
    parser.add_argument("--num-train", type=int, default=500, help="pictures to train on")
    parser.add_argument("--num-val", type=int, default=200, help="pictures to evaluate on")
    parser.add_argument("--height", type=int, default=192, help="pixels")
    parser.add_argument("--width", type=int, default=320, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument(
        "--preview", metavar="FILE", help="write a contact sheet with the boxes here"
    )
    args = parser.parse_args()
    try:
        generate_streets(
            args.root,
            num_train=args.num_train,
            num_val=args.num_val,
            height=args.height,
            width=args.width,
            seed=args.seed,
            workers=args.workers,
        )
        if args.preview and not cv2.imwrite(args.preview, contact_sheet(args.root)):
            raise ValueError(
                f"cannot write the preview to {args.preview}; its folder may be missing."
            )
    except (ValueError, cv2.error) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
