"""One HTML page about the errors of detectors, with everything inside."""

import base64
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from hkd_d2.data.images import read_data_image
from hkd_d2.evaluation import CITYPERSONS, MissRateResult, Protocol, describe_ranges
from hkd_d2.evaluation.analysis import ErrorAnalysis, MissRange
from hkd_d2.evaluation.coco_rows import detection_category, ground_truth_category
from hkd_d2.evaluation.miss_rate import describe_missing_points
from hkd_d2.files import write_text
from hkd_d2.visualization.curves import plot_miss_rate
from hkd_d2.visualization.detections import STYLES
from hkd_d2.visualization.errors import (
    TILE,
    crop_tile,
    plot_calibration,
    plot_miss_ranges,
    range_label,
)

# No script, nothing from outside: a content security policy says so. Figures are drawn on white.
_STYLE = """
:root { color-scheme: light dark; --line: #c9ccd1; --soft: #f3f4f6; --ink: #1b1f24; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #474d57; --soft: #23272e; --ink: #e4e7eb; --page: #16191d; }
}
body { color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
.wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem; text-align: right; }
td { white-space: nowrap; }
th:first-child { text-align: left; }
caption { text-align: left; padding-bottom: .4rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure { margin: 1rem 0; }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; list-style: none; }
.sheet figure { margin: 0; width: 15rem; }
.sheet figcaption { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.best { font-weight: 700; position: relative; }
.best::after { content: "*"; position: absolute; right: .2rem; }
.key { white-space: nowrap; margin-right: 1em; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em; background: #666;
  border: 3px solid; outline: 1px solid #444; vertical-align: -.1em; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_error_page(
    path: str | os.PathLike,
    errors: Mapping[str, ErrorAnalysis],
    results: Mapping[str, Mapping[str, MissRateResult]],
    ground_truth: Mapping[str, Any],
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    setup: str,
    curves: str,
    protocol: Protocol = CITYPERSONS,
    images: str | os.PathLike | None = None,
    source: str = "the ground truth",
) -> None:
    """Write a page that needs no other file and no script: table, figures, contact sheets.

    Args:
        path: HTML to write.
        errors: of the same setup, by the detector's name.
        results: results of every setup, by the detector's name.
        ground_truth: what both were counted on.
        detections: COCO results by the detector's name, all that were analysed.
        setup: the name of the errors' setup.
        curves: the setup, a key of each of ``results``, whose curves are drawn.
        protocol: the rules by which both were computed.
        images: the folder of the images for the contact sheets; None leaves them out.
        source: names the ground truth in messages.

    Raises:
        FileNotFoundError: the folder, or an image that is to be shown, is missing.
        ValueError: an image is damaged or has no name in the ground truth.
    """
    sheets = (
        "<p>No contact sheets: the folder of the images was not given.</p>"
        if images is None
        else _sheets(errors, ground_truth, detections, ImageFolder(images, ground_truth, source))
    )
    names = ", ".join(errors)
    point = next(iter(errors.values())).operating_point
    parts = [
        f"<p>{len(ground_truth['images'])} images. Lower miss rates are better.</p>",
        "<h2>Miss rate</h2>",
        _score_table(results),
        *_missing_points(results, len(ground_truth["images"]), protocol),
        "<p>A setup counts the pedestrians in its ranges. The rules:</p>",
        "<ul>" + "".join(f"<li>{escape(rule)}</li>" for rule in protocol.describe()) + "</ul>",
        _figure(
            lambda file: plot_miss_rate(
                {name: by_setup[curves] for name, by_setup in results.items()}, file, curves
            ),
            f"Curves of miss rate over false positives per image on {curves}: "
            + _list({n: f"{r[curves].miss_rate:.2f} % MR^-2" for n, r in results.items()}),
        ),
        "<h2>At the operating point</h2>",
        f"<p>From here on, pedestrians and detections count as {escape(setup)} says. The operating "
        "point of a detector is the last one on its curve with at most "
        f"{point.limit:g} false positives per image.</p>",
        _point_table(errors),
    ]
    for kind, what in (("by_height", "height in pixels"), ("by_visibility", "visible share")):
        ranges = {name: getattr(found, kind) for name, found in errors.items()}
        if not all(ranges.values()):
            parts.append(f"<p>The ground truth has no {what}.</p>")
            continue
        parts += [
            f"<h3>By {what}</h3>",
            _figure(
                lambda file, ranges=ranges, what=what: plot_miss_ranges(
                    ranges, file, what, f"{setup}, at {point.limit:g} false positives per image"
                ),
                f"Bars of the miss rate by {what} of {names}; the numbers are in the table below.",
            ),
            _range_table(ranges, what),
        ]
    parts += ["<h2>Calibration of the scores</h2>", *_calibration(errors, setup)]
    parts += ["<h2>The worst errors</h2>", sheets]
    title = "Detection errors: " + names
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_text(path, page)


class ImageFolder:
    """The images of a ground truth, opened by id.

    An image is named by ``file_name`` or ``im_name``. Where the folder lacks that name, its folder
    of the city is tried, the name up to the first underscore, as CityPersons has it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        ground_truth: Mapping[str, Any],
        source: str = "the ground truth",
    ):
        """
        Raises:
            FileNotFoundError: there is no such folder.
        """
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder} is no folder; give that of the images.")
        self._folder, self._source = folder, source
        self._names = {
            image["id"]: image.get("file_name", image.get("im_name"))
            for image in ground_truth["images"]
        }

    def name(self, image_id: int) -> str:
        """The image's name in the ground truth; its id where it has none."""
        name = self._names[image_id]
        return name if isinstance(name, str) else f"image {image_id}"

    def open(self, image_id: int) -> Image.Image:
        """The image in RGB.

        Raises:
            FileNotFoundError: it is not in the folder.
            ValueError: it cannot be read, or the ground truth does not name it.
        """
        name = self._names[image_id]
        if not isinstance(name, str):
            raise ValueError(
                f"Image {image_id} of {self._source} has neither file_name nor im_name; add one "
                "or leave the images out."
            )
        base = os.path.basename(name)
        places = [
            os.path.join(self._folder, name),
            os.path.join(self._folder, base.split("_")[0], base),
        ]
        for place in places:
            if os.path.isfile(place):
                return Image.fromarray(read_data_image(place))
        raise FileNotFoundError(
            f"{places[0]} does not exist; give the folder in which the ground truth's names lie."
        )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(draw: Callable[[io.BytesIO], None], alt: str) -> str:
    file = io.BytesIO()
    draw(file)
    source = _data_uri(file.getvalue(), "png")
    return f'<figure><img src="{source}" alt="{escape(alt)}"></figure>'


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(
            f'<td class="best">{escape(cell)}</td>'
            if isinstance(cell, _Best)
            else f"<td>{escape(cell)}</td>"
            for cell in rest
        )
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>\n<thead><tr>{cells}</tr>'
        f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


class _Best(str):
    """A cell that the table marks as the best of its row."""


_COMPARED = "; * is the lowest of its row"


def _compare(
    values: Sequence[float | None], digits: int, texts: Sequence[str] | None = None
) -> list[str]:
    """Cells of one number a detector, lower is better, and of the differences to the first.

    Args:
        values: of each detector; None where it has none.
        digits: behind the point.
        texts: the cells in the place of the bare numbers.
    """
    if texts is None:
        texts = ["-" if value is None else f"{value:.{digits}f}" for value in values]
    known = {round(value, digits) for value in values if value is not None}
    best = min(known) if len(known) > 1 else None
    cells = [
        _Best(text) if value is not None and round(value, digits) == best else text
        for value, text in zip(values, texts, strict=True)
    ]
    differences = [
        "-" if None in (value, values[0]) else f"{value - values[0]:+.{digits}f}"
        for value in values[1:]
    ]
    return cells + differences


def _heads(names: Iterable[str]) -> list[str]:
    """The columns of :func:`_compare`."""
    first, *others = names
    return [first, *others, *(f"{name} - {first}" for name in others)]


def _missing_points(
    results: Mapping[str, Mapping[str, MissRateResult]], num_images: int, protocol: Protocol
) -> list[str]:
    """A paragraph for each detector whose miss rates hang on the rule for missing points."""
    said = {
        name: describe_missing_points(by_setup, num_images, protocol)
        for name, by_setup in results.items()
    }
    return [
        f"<p><strong>{escape(name)}:</strong> {escape(text)}</p>"
        for name, text in said.items()
        if text
    ]


def _list(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in named.items())


def _score_table(results: Mapping[str, Mapping[str, MissRateResult]]) -> str:
    first = next(iter(results.values()))
    ranges = describe_ranges({name: result.setup for name, result in first.items()})
    rows = [
        [name, *cells, _counts(by_setup[name].num_ground_truth for by_setup in results.values())]
        + _compare(
            [
                by_setup[name].miss_rate if by_setup[name].num_ground_truth else None
                for by_setup in results.values()
            ],
            2,
        )
        for name, *cells in zip(first, *ranges.values(), strict=True)
    ]
    caption = "MR^-2 in percent" + (_COMPARED if len(results) > 1 else "")
    return _table(caption, ["setup", *ranges, "pedestrians", *_heads(results)], rows)


def _counts(of_each: Iterable[int]) -> str:
    """The number of pedestrians that count, one a detector where a rule makes them differ."""
    counts = list(of_each)
    return " / ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _point_table(errors: Mapping[str, ErrorAnalysis]) -> str:
    points = [found.operating_point for found in errors.values()]
    blank = [""] * (len(points) - 1)
    rows = [
        ["score there", *("none" if p.score is None else f"{p.score:.3f}" for p in points), *blank],
        ["false positives per image", *(f"{p.fppi:.3f}" for p in points), *blank],
        ["found", *(f"{p.found} of {p.pedestrians}" for p in points), *blank],
        ["miss rate in percent"] + _compare([100 * p.miss_rate for p in points], 1),
    ]
    explained = {
        "duplicate": "duplicates (IoU from 0.5 with one already found)",
        "misplaced": "misplaced (IoU from 0.1)",
        "background": "on the background",
    }
    for kind, text in explained.items():
        counts = [p.false_positives[kind] for p in points]
        rows.append([f"false positives: {text}", *_compare(counts, 0)])
    caption = "The detectors at their operating points" + (_COMPARED if len(points) > 1 else "")
    return _table(caption, ["", *_heads(errors)], rows)


def _range_table(ranges: Mapping[str, Sequence[MissRange]], what: str) -> str:
    rows = [
        [range_label(parts[0].low, parts[0].high), _counts(part.pedestrians for part in parts)]
        + _compare(
            [100 * p.miss_rate if p.pedestrians else None for p in parts],
            1,
            [f"{p.missed} ({p.miss_rate:.1%})" if p.pedestrians else "-" for p in parts],
        )
        for parts in zip(*ranges.values(), strict=True)
        if any(part.pedestrians for part in parts)
    ]
    caption = "Missed pedestrians; a range holds its lower edge and not its upper one"
    caption += _COMPARED if len(ranges) > 1 else ""
    return _table(caption, [what, "pedestrians", *_heads(ranges)], rows)


def _calibration(errors: Mapping[str, ErrorAnalysis], setup: str) -> list[str]:
    known = {
        name: found.calibration
        for name, found in errors.items()
        if found.calibration is not None and not math.isnan(found.calibration.error)
    }
    parts = [
        f"<p>{escape(name)} has no calibration: scores outside 0 to 1, or nothing counted.</p>"
        for name in errors
        if name not in known
    ]
    if not known:
        return parts
    rows = [
        [f"{part.low:g} to {part.high:g}"]
        + [
            f"{own.precision:.2f} of {own.detections}" if own.detections else "-"
            for own in (calibration.ranges[number] for calibration in known.values())
        ]
        for number, part in enumerate(next(iter(known.values())).ranges)
    ]
    start = next(iter(known.values())).min_score
    rows.append(
        [
            f"expected calibration error from {start:g} on",
            *_compare([c.error for c in known.values()], 3)[: len(known)],
        ]
    )
    alt = "Precision over score, and the number of detections; expected calibration error: "
    return [
        *parts,
        f"<p>Of all detections that count in setup {escape(setup)}, on either side of the "
        "operating point. The expected calibration error is the mean distance of precision and "
        "mean score, weighted by the number of detections, over scores from "
        f"{start:g} on: the many boxes below are shown and not weighed, since nobody uses them."
        "</p>",
        _figure(
            lambda file: plot_calibration(known, file),
            alt + _list({name: f"{c.error:.3f}" for name, c in known.items()}),
        ),
        _table("Precision, and detections of the range", ["score", *known], rows),
    ]


def _sheets(errors, ground_truth, detections, folder: ImageFolder) -> str:
    words = {
        "false alarm": "false positive",
        "missed": "missed pedestrian",
        "found": "detection over the operating point",
        "pedestrian": "pedestrian that counts",
        "ignored": "ignored",
    }
    parts = [
        "<p>"
        + " ".join(
            f'<span class="key"><i style="border-color:{STYLES[what][0]}"></i>{text}</span>'
            for what, text in words.items()
        )
        + "</p>"
    ]
    for name, found in errors.items():
        truth = {True: {}, False: {}}  # countable or not, by image
        category = ground_truth_category(ground_truth)
        for number, row in enumerate(ground_truth["annotations"]):
            if row["category_id"] == category:
                by_image = truth[number in found.pedestrians]
                by_image.setdefault(row["image_id"], []).append(row["bbox"])
        wrong = [
            (
                entry,
                "false alarm",
                f"score {entry.score:.2f}, height {entry.box[3]:.0f}, IoU {entry.overlap:.2f}, "
                f"{entry.kind}",
            )
            for entry in found.worst_false_positives
        ]
        missed = [
            (
                entry,
                "missed",
                f"height {entry.height:.0f}, "
                + ("" if entry.visibility is None else f"visible {entry.visibility:.0%}, ")
                + f"IoU {entry.overlap:.2f}, "
                + ("no match" if entry.score is None else f"score {entry.score:.2f}"),
            )
            for entry in found.worst_misses
        ]
        parts += [
            f"<h3>{escape(name)}: false positives of highest score</h3>",
            "<p>IoU is the highest with any box of the ground truth.</p>",
            _sheet(wrong, truth, {}, folder),
            f"<h3>{escape(name)}: misses of largest height times visible share</h3>",
            "<p>IoU is the highest with a detection over the operating point; the score is of the "
            "detection that matches below it.</p>",
            _sheet(
                missed,
                truth,
                _shown(detections[name], category, found.operating_point.score),
                folder,
            ),
        ]
    return "\n".join(parts)


def _shown(
    detections: Sequence[Mapping[str, Any]], truth_category: int, score: float | None
) -> dict[int, list]:
    boxes = {}
    category = detection_category(detections, truth_category)
    for row in detections:
        if score is not None and row["category_id"] == category and row["score"] >= score:
            boxes.setdefault(row["image_id"], []).append(row["bbox"])
    return boxes


def _sheet(entries, truth, detections: Mapping[int, list], folder: ImageFolder) -> str:
    if not entries:
        return "<p>There are none.</p>"
    tiles = []
    for entry, what, caption in entries:
        image = entry.image_id
        pedestrians = [box for box in truth[True].get(image, []) if list(box) != entry.box]
        tile = crop_tile(
            folder.open(image),
            entry.box,
            what,
            pedestrians,
            truth[False].get(image, []),
            detections.get(image, []),
        )
        file = io.BytesIO()
        tile.save(file, "JPEG", quality=85)
        name = escape(folder.name(image))
        alt = "False positive" if what == "false alarm" else "Missed pedestrian"
        tiles.append(
            f'<li><figure><img src="{_data_uri(file.getvalue(), "jpeg")}" width="{TILE[0]}" '
            f'height="{TILE[1]}" alt="{alt} in {name}: {escape(caption)}">'
            f"<figcaption>{name}<br>{escape(caption)}</figcaption></figure></li>"
        )
    return '<ul class="sheet">\n' + "\n".join(tiles) + "\n</ul>"
