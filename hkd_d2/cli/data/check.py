"""Check a download of a data set, prepare what its loader needs, write COCO JSON.

    hkd data check citypersons [DIR [train val]] [--write-coco]

For every split it says what is there, beside the published counts where they are known, and which
images are missing. A format that needs it is prepared first: Caltech's frames are extracted from
its videos. The exit code is 1 where a split cannot be used. docs/data.md says for each format where
to get it and which folders are expected.
"""

import argparse
import json
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", metavar="FORMAT", help="citypersons, caltech, ...: docs/data.md")
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="its folder [$DETECTRON2_DATASETS/FORMAT, or datasets/FORMAT]",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="splits [all of the format]")
    parser.add_argument(
        "--write-coco", action="store_true", help="write annotations/{split}_gt.json where missing"
    )
    # As tools/prepare_data.py has them.
    parser.add_argument("--root", dest="source_option", help=argparse.SUPPRESS)
    parser.add_argument("--splits", nargs="+", dest="parts_option", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from hkd_d2.data.datasets.register import FOLDERS

    if args.format not in FOLDERS:
        raise ValueError(f"The format is '{args.format}'; choose from {', '.join(FOLDERS)}.")
    known, load = FOLDERS[args.format]
    splits = args.parts or args.parts_option or known
    for split in splits:
        if split not in known:
            raise ValueError(f"{args.format} has no split '{split}', but {', '.join(known)}.")
    standard = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), args.format)
    root = args.source or args.source_option or standard
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; give the data set's after its format.")
    prepare = getattr(sys.modules[load.__module__], "prepare", None)
    usable = True
    for split in splits:
        if prepare:
            try:
                prepare(root, split)
            except (ValueError, OSError) as error:
                print(f"{split}: could not be prepared: {error}")
                usable = False
        records = check_split(args.format, root, split)
        usable = records is not None and check_images(records, split) and usable
        if args.write_coco and records is not None:
            write_coco(args.format, root, split, records)
    return 0 if usable else 1


def check_split(form: str, root: str, split: str) -> list[dict] | None:
    """Report on one split; returns its records where it can be used but for missing images."""
    from hkd_d2.data.datasets.register import FOLDERS

    load = FOLDERS[form][1]
    module = sys.modules[load.__module__]
    # Of several forms of the annotations each is looked at; the loader takes the first.
    for variant in getattr(module, "FORMS", ()):
        try:
            records = load(root, split, form=variant, check_images=False)
        except FileNotFoundError as error:
            print(f"{split}: {variant}: missing: {error}")
        except ValueError as error:
            print(f"{split}: {variant}: UNUSABLE: {error}")
        else:
            print(f"{split}: {variant}:")
            print_counts(records, module, split)
    try:
        records = load(root, split, check_images=False)
    except (ValueError, FileNotFoundError) as error:
        print(f"{split}: UNUSABLE: {error}")
        return None
    if not hasattr(module, "FORMS"):
        print(f"{split}:")
        print_counts(records, module, split)
    return records


def print_counts(records: list[dict], module, split: str) -> None:
    """Print what training sees beside ``PUBLISHED[split]`` of the format's module."""
    from hkd_d2.data.mapper import training_counts

    published = getattr(module, "PUBLISHED", {}).get(split, {})
    for key, count in training_counts(records).items():
        differs = key in published and count != published[key]
        note = f"  DIFFERS from the published {published[key]}" if differs else ""
        print(f"    {key:<16}{count:>7}{note}")


def check_images(records: list[dict], split: str) -> bool:
    """Report on the image files of one split; returns whether all are there."""
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    print(f"{split}: images found: {len(records) - len(missing)} of {len(records)}")
    if missing:
        print(f"{split}: UNUSABLE: images are missing, the first is {missing[0]}")
    return not missing


def write_coco(form: str, root: str, split: str, records: list[dict]) -> None:
    """Write annotations/{split}_gt.json where it is missing."""
    path = os.path.join(root, "annotations", f"{split}_gt.json")
    if os.path.exists(path):
        print(f"{split}: {path} is there already and was left alone")
        return
    from hkd_d2.data.datasets.coco import to_coco
    from hkd_d2.data.datasets.register import FOLDERS

    own = getattr(sys.modules[FOLDERS[form][1].__module__], "to_coco", None)
    content = own(records) if own else to_coco(records, root)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, separators=(",", ":"))
    print(f"{split}: wrote {path}")
