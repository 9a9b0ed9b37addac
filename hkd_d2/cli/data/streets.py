"""Draw a data set of synthetic streets, in the on-disk form of CityPersons.

    hkd data streets --out datasets/streets --preview sheet.png
    hkd train --config-file quickstart/student.yaml HKD.DATA.REGISTER \\
        "[[streets_train, citypersons, datasets/streets, train]]"
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    for option, default, text in (
        ("--num-train", 500, "pictures to train on"),
        ("--num-val", 200, "pictures to evaluate on"),
        ("--height", 192, "pixels"),
        ("--width", 320, "pixels"),
        ("--seed", 0, "of the drawing"),
        ("--workers", 2, "processes that draw"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} [{default}]"
        )
    parser.add_argument("--preview", metavar="FILE", help="a contact sheet with the boxes")


def run(args: argparse.Namespace) -> int:
    import cv2

    from hkd_d2.data.streets import contact_sheet, generate_streets

    generate_streets(
        args.out,
        num_train=args.num_train,
        num_val=args.num_val,
        height=args.height,
        width=args.width,
        seed=args.seed,
        workers=args.workers,
    )
    if args.preview:
        try:
            written = cv2.imwrite(args.preview, contact_sheet(args.out))
        except cv2.error as error:
            raise ValueError(f"The preview cannot be written: {error}") from error
        if not written:
            raise ValueError(
                f"cannot write the preview to {args.preview}; its folder may be missing."
            )
    return 0
