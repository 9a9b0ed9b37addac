"""Detections on images: found, missed and invented pedestrians, detector beside detector."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from hkd_d2.data.images import read_data_image
from hkd_d2.evaluation import Setup, coco_ground_truth
from hkd_d2.evaluation.miss_rate import HEIGHT_SLACK, MIN_OVERLAP

# What a box says: colour (Okabe and Ito) and dashes, so that colour alone never tells.
STYLES = {
    "pedestrian": ("#009E73", "-"),
    "found": ("#56B4E9", "-"),
    "missed": ("#F0E442", ":"),
    "false alarm": ("#FF6A13", "-"),
    "ignored": ("#FFFFFF", "--"),
}
DPI = 110


@dataclass(frozen=True, eq=False)
class Matches:
    """Matches of the detections of one image.

    Attributes:
        hit: bool (D,), detections that found a pedestrian.
        ignored: bool (D,), those that count neither way.
        found: bool (G,), pedestrians that were found.
    """

    hit: np.ndarray
    ignored: np.ndarray
    found: np.ndarray

    @property
    def false_alarm(self) -> np.ndarray:
        """bool (D,), the other detections."""
        return ~(self.hit | self.ignored)


@dataclass(frozen=True, eq=False)
class Scene:
    """One image, its ground truth under a setup, and what each detector says.

    Boxes are float64 (N, 4) XYXY in pixels of the image, detections by falling score.

    Attributes:
        file_name: the image.
        truth: pedestrians that count.
        ignore: boxes that do not.
        detections: boxes by the detector's name.
    """

    file_name: str
    truth: np.ndarray
    ignore: np.ndarray
    detections: dict[str, np.ndarray]

    def matches(self, name: str) -> Matches:
        """Match the detections of the detector ``name``."""
        return match_detections(self.detections[name], self.truth, self.ignore)


def make_scenes(
    records: list[dict],
    detections: Mapping[str, list[dict]],
    setup: Setup,
    min_score: float,
) -> list[Scene]:
    """Put ground truth and detections of a data set together, image by image.

    As in :func:`hkd_d2.evaluation.evaluate_miss_rate`, pedestrians outside the setup are ignored
    and detections far outside its heights are left out.

    Args:
        records: dataset records, as :func:`hkd_d2.evaluation.coco_ground_truth` takes them.
        detections: COCO results by the detector's name.
        setup: which pedestrians count.
        min_score: detections of a lower score are left out.

    Returns:
        A scene for each record, in their order.
    """
    truth = defaultdict(list)
    for row in coco_ground_truth(records)["annotations"]:
        truth[row["image_id"]].append(row)
    low, high = setup.height[0] / HEIGHT_SLACK, setup.height[1] * HEIGHT_SLACK
    shown = {name: defaultdict(list) for name in detections}
    for name, rows in detections.items():
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["score"] >= min_score and low <= row["bbox"][3] < high:
                shown[name][row["image_id"]].append(row["bbox"])
    scenes = []
    for record in records:
        rows = truth[record["image_id"]]
        counts = np.array([setup.counts(row) for row in rows], dtype=bool)
        boxes = _to_xyxy([row["bbox"] for row in rows])
        scenes.append(
            Scene(
                file_name=record["file_name"],
                truth=boxes[counts],
                ignore=boxes[~counts],
                detections={
                    name: _to_xyxy(by_image[record["image_id"]]) for name, by_image in shown.items()
                },
            )
        )
    return scenes


def match_detections(boxes: np.ndarray, truth: np.ndarray, ignore: np.ndarray) -> Matches:
    """Match the detections of one image as the miss rate does.

    In the order given, a detection takes the pedestrian, not yet taken, of largest intersection
    over union >= 0.5 (of equals, the later). Failing that it is ignored if its intersection with
    an ignored box is >= 0.5 of its own area, and a false alarm otherwise.

    Args:
        boxes: (D, 4) XYXY, by falling score.
        truth: (G, 4) XYXY, pedestrians that count.
        ignore: (I, 4) XYXY.
    """
    over_union, _ = _overlaps(boxes, truth)
    _, over_detection = _overlaps(boxes, ignore)
    hit, found = np.zeros(len(boxes), dtype=bool), np.zeros(len(truth), dtype=bool)
    for index, overlap in enumerate(over_union):
        free = np.where(found, -1.0, overlap)
        if len(free) and free.max() >= MIN_OVERLAP:
            best = len(free) - 1 - int(free[::-1].argmax())
            hit[index] = found[best] = True
    ignored = ~hit & (over_detection >= MIN_OVERLAP).any(axis=1)
    return Matches(hit=hit, ignored=ignored, found=found)


def draw_detections(
    axes: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    ignore: np.ndarray | None = None,
    scores: Sequence[float] | None = None,
) -> None:
    """Draw one image with boxes on it.

    With ``truth`` found pedestrians, false alarms and missed pedestrians look different, and
    detections that count neither way are left out; without it all boxes look alike.

    Args:
        axes: matplotlib axes to draw on.
        image: uint8 (H, W, 3) RGB.
        boxes: (D, 4) XYXY in pixels of the image, by falling score.
        truth: (G, 4) XYXY, pedestrians that count.
        ignore: (I, 4) XYXY, drawn dashed.
        scores: (D,), written above the boxes.
    """
    ignore = np.zeros((0, 4)) if ignore is None else ignore
    axes.imshow(image, interpolation="lanczos")
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])
    _draw(axes, ignore, "ignored", 0.9)
    if truth is None:
        _draw(axes, boxes, "pedestrian", 1.6)
    else:
        matches = match_detections(boxes, truth, ignore)
        _draw(axes, truth[~matches.found], "missed", 1.8)
        _draw(axes, boxes[matches.false_alarm], "false alarm", 1.6)
        _draw(axes, boxes[matches.hit], "found", 1.6)
    for (x, y, _, _), score in zip(boxes, scores if scores is not None else [], strict=False):
        axes.text(
            x,
            y - 1,
            f"{score:.2f}",
            color="white",
            fontsize=6,
            clip_on=True,
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )


def compare_detections(scenes: Mapping[str, Scene], path: str | os.PathLike, title: str) -> None:
    """Write a picture with a row for each scene: ground truth, then every detector beside it.

    Args:
        scenes: by the label of the row; the detectors of the first are the columns.
        path: PNG, PDF or SVG to write.
        title: above the picture; say there how the images were chosen.

    Raises:
        ValueError: no scenes.
    """
    if not scenes:
        raise ValueError("There is nothing to draw; give at least one scene.")
    images = [read_data_image(s.file_name) for s in scenes.values()]
    names = list(next(iter(scenes.values())).detections)
    width = 3.3
    heights = [width * image.shape[0] / image.shape[1] for image in images]
    figure = Figure(
        figsize=(width * (1 + len(names)) + 0.4, sum(heights) + 0.35 * len(heights) + 1.2),
        layout="constrained",
    )
    grid = figure.subplots(len(scenes), 1 + len(names), squeeze=False, height_ratios=heights)
    for axes_row, (label, scene), image in zip(grid, scenes.items(), images, strict=True):
        draw_detections(axes_row[0], image, scene.truth, ignore=scene.ignore)
        axes_row[0].set_ylabel(label, fontsize=9)
        axes_row[0].set_title(f"to find {len(scene.truth)}", fontsize=9)
        for axes, name in zip(axes_row[1:], names, strict=True):
            draw_detections(
                axes, image, scene.detections[name], truth=scene.truth, ignore=scene.ignore
            )
            matches = scene.matches(name)
            axes.set_title(
                f"found {matches.found.sum()}, false alarms {matches.false_alarm.sum()}",
                fontsize=9,
            )
    for axes, name in zip(grid[0], ["ground truth", *names], strict=True):
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=10)
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=what)
        for what, (colour, dash) in STYLES.items()
    ]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), facecolor="0.35"
    )
    for text in legend.get_texts():
        text.set_color("white")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def draw_box(axes: Axes, corners: Sequence[float], colour: str, dash: str, width: float) -> None:
    """Draw one box, XYXY in pixels of the image that ``axes`` shows."""
    x1, y1, x2, y2 = corners
    axes.add_patch(
        Rectangle(
            (x1 - 0.5, y1 - 0.5),  # matplotlib's pixel 0 reaches from -0.5 to 0.5
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linestyle=dash,
            linewidth=width,
            # A dark rim keeps a box visible on a bright wall.
            path_effects=[withStroke(linewidth=width + 1, foreground="black", alpha=0.55)],
        )
    )


def _draw(axes: Axes, boxes: np.ndarray, what: str, width: float) -> None:
    for corners in boxes:
        draw_box(axes, corners, *STYLES[what], width)


def _to_xyxy(boxes: list) -> np.ndarray:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union and over the area of ``boxes``, (D, 4) and (G, 4) to two (D, G)."""
    boxes, others = np.reshape(boxes, (-1, 1, 4)), np.reshape(others, (1, -1, 4))
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clip(min=0).prod(axis=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    union = area + (others[..., 2:] - others[..., :2]).prod(axis=-1) - intersection
    positive = intersection > 0
    zeros = np.zeros_like(intersection)
    return (
        np.divide(intersection, union, out=zeros.copy(), where=positive),
        np.divide(intersection, np.broadcast_to(area, union.shape), out=zeros, where=positive),
    )
