"""Checks of a run's data sets beside each other, before the first step: classes, what counts."""

import logging
from collections import Counter
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from hkd_d2.data.annotation_rules import PEDESTRIAN_NAMES
from hkd_d2.data.mapper import is_ignored

logger = logging.getLogger(__name__)


def class_names(name: str) -> list[str] | None:
    """Class list of a registered data set; None where it is not known (before it is loaded)."""
    names = MetadataCatalog.get(name).get("thing_classes")
    return None if names is None else list(names)


def check_class_lists(training: Iterable[str], test: Iterable[str]) -> None:
    """Check that an index stands for one class throughout; the data sets are loaded.

    Training sets have the same list. A test set may have fewer or more classes, each at its place.
    Spelling in capitals does not matter, and a person is a pedestrian.

    Raises:
        ValueError: two lists that differ; the sentence has both.
    """
    first, expected = None, None
    for is_test, sets in ((False, training), (True, test)):
        for name in sets:
            found = class_names(name)
            if found is None:
                continue
            if expected is None:
                first, expected = name, found
            if not same_classes(expected, found, length=not is_test):
                raise ValueError(
                    f"'{first}' has the classes {', '.join(expected)} and '{name}' "
                    f"{', '.join(found)}; give both the same categories with ids in the same order."
                )


def check_class_map(training: Iterable[str], teacher: Iterable[str], class_map: list[int]) -> None:
    """Check the teacher's classes, where its training sets are known, against the student's.

    Args:
        training: the student's training sets, loaded.
        teacher: those of the teacher's config.
        class_map: HKD.TEACHER.CLASS_MAP, the index of each student class in the teacher's list; []
            where the lists are the same.

    Raises:
        ValueError: a class that stands for another; the sentence has both lists.
    """
    ours = next(((n, c) for n in training if (c := class_names(n)) is not None), None)
    theirs = next(((n, c) for n in teacher if (c := class_names(n)) is not None), None)
    if ours is None or theirs is None:
        return
    taken = theirs[1]
    if class_map:
        taken = [taken[i] for i in class_map if 0 <= i < len(taken)]
    if not same_classes(ours[1], taken, length=True):
        mapped = f" by HKD.TEACHER.CLASS_MAP {list(class_map)}" if class_map else ""
        raise ValueError(
            f"'{ours[0]}' has the classes {', '.join(ours[1])} and the teacher's '{theirs[0]}' "
            f"{', '.join(theirs[1])}{mapped and ', of which ' + ', '.join(taken) + mapped}; set "
            "HKD.TEACHER.CLASS_MAP to the index of each student class in the teacher's list."
        )


def same_classes(one: list[str], other: list[str], *, length: bool) -> bool:
    """Compare class lists by name and place; where not ``length``, as far as both go."""
    if length and len(one) != len(other):
        return False
    return all(_spelling(a) == _spelling(b) for a, b in zip(one, other, strict=False))


def why_ignored(row: dict, min_height: float, min_visibility: float) -> str | None:
    """The first rule by which training ignores a row: "flag", "height" or "visibility"."""
    if not is_ignored(row, min_height, min_visibility):
        return None
    if row.get("ignore") or row.get("iscrowd"):
        return "flag"
    height = BoxMode.convert(row["bbox"], row["bbox_mode"], BoxMode.XYWH_ABS)[3]
    return "height" if height < min_height else "visibility"


def check_anything_counts(cfg: CfgNode, datasets: dict[str, list[dict]]) -> None:
    """Check that training has a box to learn from: in all labelled sets together, in each file.

    A labelled set without one beside others that have some is a warning.

    Args:
        cfg: the run's.
        datasets: records of every training set and file of pseudo-labels, by name or path.

    Raises:
        ValueError: nothing counts; the sentence says how many boxes fell to which rule.
    """
    low, hidden = cfg.HKD.DATA.MIN_HEIGHT, cfg.HKD.DATA.MIN_VISIBILITY
    reasons = {}
    for name, records in datasets.items():
        rows = (row for record in records for row in record["annotations"])
        reasons[name] = Counter(why_ignored(row, low, hidden) for row in rows)
    labelled = [name for name in datasets if name not in cfg.HKD.DATA.PSEUDO]
    empty = [name for name in datasets if not reasons[name][None]]
    for name in empty:
        sentence = _sentence(name, len(datasets[name]), reasons[name], low, hidden)
        if name in labelled and len(set(labelled) - set(empty)) > 0:
            logger.warning("%s", sentence)
        else:
            raise ValueError(sentence)


def _sentence(name: str, images: int, reasons: Counter, low: float, hidden: float) -> str:
    total = reasons.total()
    if not total:
        return (
            f"'{name}' has no boxes in the {images} images that are used, so there is nothing to "
            "learn; name annotations that have some."
        )
    parts = [
        f"{reasons[key]} {text}"
        for key, text in (
            ("flag", "are ignored or crowds by the file"),
            ("height", f"are lower than HKD.DATA.MIN_HEIGHT {low:g}"),
            ("visibility", f"are less visible than HKD.DATA.MIN_VISIBILITY {hidden:g}"),
        )
        if reasons[key]
    ]
    return (
        f"None of the {total} boxes of '{name}' counts in training: {', '.join(parts)}; lower "
        "these bounds or name other annotations."
    )


def _spelling(name: str) -> str:
    name = name.strip().lower()
    return PEDESTRIAN_NAMES[0] if name in PEDESTRIAN_NAMES else name
