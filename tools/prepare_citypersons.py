#!/usr/bin/env python
"""Check a download of CityPersons, and write its annotations as COCO JSON.

    python tools/prepare_citypersons.py [--root DIR] [--splits train val] [--write-coco]

For every split and every form of the annotations (see hkd_d2/data/datasets/citypersons.py) it says
what is there, beside the published counts. The exit code is 1 where a split cannot be used: no
readable annotations, or images missing.

Images: leftImg8bit_trainvaltest.zip, annotations: gtBbox_cityPersons_trainval.zip, both from
https://www.cityscapes-dataset.com (account needed); the .mat form is in
https://github.com/cvgroup-njust/CityPersons.
"""

import argparse
import json
import os
import sys

from hkd_d2.data.datasets.citypersons import (
    FORMS,
    SPLITS,
    annotation_path,
    load_citypersons,
    to_coco,
)
from hkd_d2.data.mapper import training_counts

# Counted in the published .mat files; positives are pedestrians of at least 50 pixels.
PUBLISHED = {
    "train": {"images": 2975, "rows": 27770, "pedestrians": 16526, "positives": 12670},
    "val": {"images": 500, "rows": 5795, "pedestrians": 3157, "positives": 2549},
}


def check_split(root: str, split: str, write_coco: bool) -> bool:
    """Report on one split; returns whether it can be used."""
    loaded = {}
    for form in FORMS:
        path = annotation_path(root, split, form)
        if not os.path.exists(path):
            print(f"{split}: {form}: missing ({path})")
            continue
        try:
            loaded[form] = load_citypersons(root, split, form=form, check_images=False)
        except (ValueError, FileNotFoundError) as error:
            print(f"{split}: {form}: UNUSABLE: {error}")
            loaded[form] = None
            continue
        print(f"{split}: {form}: {path}")
        counts = training_counts(loaded[form])
        for key, published in PUBLISHED[split].items():
            note = "" if counts[key] == published else f"  DIFFERS from the published {published}"
            print(f"    {key:<12}{counts[key]:>7}{note}")

    records = next(iter(loaded.values()), None)  # as the loader does, the first form that is there
    if records is None:
        reason = "the first form found is damaged" if loaded else "no annotations"
        print(f"{split}: UNUSABLE: {reason}")
        return False
    missing = [r["file_name"] for r in records if not os.path.isfile(r["file_name"])]
    print(f"{split}: images found: {len(records) - len(missing)} of {len(records)}")
    if missing:
        print(f"{split}: UNUSABLE: images are missing, the first is {missing[0]}")
    if write_coco:
        path = annotation_path(root, split, "coco")
        if os.path.exists(path):
            print(f"{split}: {path} is there already and was left alone")
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as f:
                json.dump(to_coco(records), f, separators=(",", ":"))
            print(f"{split}: wrote {path}")
    return not missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "citypersons")
    parser.add_argument("--root", default=default, help=f"default: {default}")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--write-coco", action="store_true", help="write annotations/{split}_gt.json where missing"
    )
    args = parser.parse_args(argv)
    if not os.path.isdir(args.root):
        print(f"{args.root}: no such folder; give the data set's with --root", file=sys.stderr)
        return 1
    usable = [check_split(args.root, split, args.write_coco) for split in args.splits]
    return 0 if all(usable) else 1


if __name__ == "__main__":
    sys.exit(main())
