"""Synthetic streets: drawn street scenes with pedestrians, stored in the CityPersons form.

A data set for trying the whole path (training, distillation, evaluation) within minutes and without
a download. :func:`generate_streets` writes the folders, file names and annotation files of the
Cityscapes distribution of CityPersons, so that everything that reads the real set reads this one.

A scene is a street seen by a pinhole camera above a flat ground. Everything that stands on the
ground is painted from far to near on a supersampled canvas; a second canvas of the same size
remembers which object painted each pixel last. The full box of a person is the tight box of the
pixels painted for that person, inside the image or not, before anything nearer is painted; the
visible box is the tight box of the pixels still that person's own, inside the image, when the scene
is finished. As CityPersons was annotated, both boxes of a pedestrian are then stretched sideways so
that the full one is 0.41 times as wide as high.

Labels, as in CityPersons: ``pedestrian``; ``rider``, ``sitting person`` and ``person (other)`` (a
bending person) for other postures; ``person group`` for a crowd that is annotated as one region;
and ``ignore`` for posters, mannequins and people of whom less than ``MIN_VISIBLE`` is seen. Whoever
is not seen at all is left out. Poles, bollards, post boxes, closed parasols, tailor's dummies and
the like have no annotation: they are there to be told from people.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np

VERSION = 2  # raised whenever the same parameters would draw other pictures
PROVENANCE = "streets.json"
ASPECT = 0.41  # width over height of a pedestrian's box, as CityPersons was annotated
MIN_VISIBLE = 0.10  # share of a person's pixels; who shows less becomes an ignore region
CITIES = {"train": ("ash", "birch", "hazel", "maple"), "val": ("rowan", "willow")}

NEAR, FAR = 1.6, 400.0  # metres: the ground that is painted
SUPERSAMPLING = 3  # odd, so that pixels have a centre
MARGIN = 72  # pixels around a picture 192 high, for the parts of people outside the image


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """What makes the task easy or hard, in one place.

    Lengths in pixels refer to a picture 192 pixels high and scale with the height.
    """

    people: float = 4.5  # mean number of single pedestrians in a picture that has any
    empty: float = 0.08  # share of the pictures without any person
    min_height: float = 13.0  # heights of people are log-uniform between these two
    max_height: float = 150.0
    tall: float = 0.35  # share of people drawn again from 50 pixels up
    companion: float = 0.3  # chance of a second person walking beside one
    occluded: float = 0.25  # chance of something put in front of a person on purpose
    low_contrast: float = 0.1  # share of clothes in the colour of what is behind them
    clutter: float = 4.0  # mean number of things that could be taken for a person
    cars: float = 1.5  # mean number of cars
    noise: float = 5.0  # largest standard deviation of the sensor noise, grey levels
    blur: float = 0.7  # largest standard deviation of the blur, pixels
    dim: float = 0.2  # share of dusk, fog and other pictures of little contrast


def generate_streets(
    root,
    *,
    num_train=500,
    num_val=200,
    height=192,
    width=320,
    seed=0,
    workers=2,
    difficulty=Difficulty(),
):
    """Write a data set of synthetic streets in the on-disk form of CityPersons.

    Picture ``index`` of a split depends on ``(seed, split, index)``, the picture size and the
    difficulty alone, whatever the number of workers. An interrupted run is taken up where it ended,
    and a finished one is left as it is.

    Args:
        root (str | Path): folder to write; ``leftImg8bit``, ``gtBboxCityPersons`` and the file
            ``streets.json`` with the parameters go there.
        num_train (int): pictures of the split ``train``.
        num_val (int): pictures of the split ``val``.
        height (int): pixels of a picture.
        width (int): pixels of a picture.
        seed (int): of the random numbers, not negative.
        workers (int): processes that draw.
        difficulty (Difficulty): density, contrast and clutter.

    Returns:
        Path: ``root``.

    Raises:
        ValueError: a parameter out of range, or a folder that holds something else: streets of
            other parameters, or files that are not streets.
    """
    for name, value, least in (
        ("num_train", num_train, 0),
        ("num_val", num_val, 0),
        ("height", height, 64),
        ("width", width, 64),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise ValueError(f"{name} of synthetic streets must be at least {least}, got {value}.")
    root = Path(root)
    _claim(
        root,
        {
            "generator": "hkd_d2 synthetic streets",
            "version": VERSION,
            "num_train": num_train,
            "num_val": num_val,
            "height": height,
            "width": width,
            "seed": seed,
            "difficulty": dataclasses.asdict(difficulty),
        },
    )
    wanted = [("train", i) for i in range(num_train)] + [("val", i) for i in range(num_val)]
    jobs = [job for job in wanted if not all(path.exists() for path in street_paths(root, *job))]
    if not jobs:
        print(f"streets: {len(wanted)} pictures are in {root} already")
        return root
    write = functools.partial(
        _write_street, root, seed=seed, height=height, width=width, difficulty=difficulty
    )
    if workers == 1:
        _report(map(write, jobs), len(jobs), root)
    else:
        # "spawn": a forked child would inherit the thread pools of OpenCV and PyTorch half-made.
        context = multiprocessing.get_context("spawn")
        workers = min(workers, len(jobs))
        with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            _report(pool.imap_unordered(write, jobs, chunksize=8), len(jobs), root)
    return root


def street_paths(root, split, index):
    """Image file and annotation file of one picture.

    Args:
        root (str | Path): folder given to :func:`generate_streets`.
        split (str): ``train`` or ``val``.
        index (int): from 0.

    Returns:
        tuple[Path, Path]: PNG and JSON.
    """
    city = CITIES[split][index % len(CITIES[split])]
    stem = f"{city}_{index:06d}_000000"
    return (
        Path(root, "leftImg8bit", split, city, f"{stem}_leftImg8bit.png"),
        Path(root, "gtBboxCityPersons", split, city, f"{stem}_gtBboxCityPersons.json"),
    )


def draw_street(*, split="train", index=0, seed=0, height=192, width=320, difficulty=Difficulty()):
    """Draw one picture.

    Args:
        split (str): ``train`` or ``val``.
        index (int): from 0.
        seed (int): as in :func:`generate_streets`, like the other arguments.

    Returns:
        tuple: the picture, uint8 (height, width, 3) BGR; its objects, a list of dicts with
        ``label``, ``instanceId``, ``bbox`` and ``bboxVis`` ([x, y, w, h], int pixels); and the
        owner of each pixel, int32 (height, width): ``1 + i`` where object ``i`` is seen, else 0.
    """
    rng = np.random.default_rng([seed, sorted(CITIES).index(split), index])
    return _Street(rng, height, width, difficulty).draw()


def contact_sheet(root, *, columns=4, rows=5, splits=("train", "val")):
    """Pictures of a data set of streets with their boxes drawn, side by side.

    Full boxes are green (pedestrian), orange (other persons) or grey (ignored regions); visible
    boxes are yellow where they differ.

    Args:
        root (str | Path): folder written by :func:`generate_streets`.
        columns (int): pictures in a row.
        rows (int): rows; half of them of each split.
        splits (tuple[str]): splits to take from.

    Returns:
        ndarray: uint8 (H, W, 3) BGR, pictures at twice their size.
    """
    colours = {"pedestrian": (60, 220, 60), "ignore": (160, 160, 160)}
    colours["person group"] = colours["ignore"]
    files = []
    for split in splits:
        for index in range(columns * rows // len(splits)):
            files.append(street_paths(root, split, index))
    tiles = []
    for image_file, annotation_file in files:
        if not image_file.exists():
            continue
        tile = cv2.imread(str(image_file))
        tile = cv2.resize(tile, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        for row in json.loads(annotation_file.read_text())["objects"]:
            boxes = [(row["bboxVis"], (60, 230, 250))] if row["bbox"] != row["bboxVis"] else []
            boxes.append((row["bbox"], colours.get(row["label"], (40, 140, 250))))
            for (x, y, w, h), colour in boxes:
                cv2.rectangle(tile, (2 * x, 2 * y), (2 * (x + w), 2 * (y + h)), colour, 1)
        tiles.append(tile)
    if not tiles:
        raise ValueError(f"{root} holds no synthetic streets to show; generate them first.")
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def _claim(root, provenance):
    """Write the provenance file, or check the one that is there."""
    path = root / PROVENANCE
    if path.exists():
        found = json.loads(path.read_text())
        other = sorted(k for k in provenance if found.get(k) != provenance[k])
        if other:
            raise ValueError(
                f"{root} holds streets of other parameters ({', '.join(other)} differ from those "
                f"in {PROVENANCE}): choose another folder or delete this one."
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"{root} is not an empty folder and has no {PROVENANCE}: choose another folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance, indent=2) + "\n")


def _write_street(root, job, *, seed, height, width, difficulty):
    split, index = job
    image, objects, _ = draw_street(
        split=split, index=index, seed=seed, height=height, width=width, difficulty=difficulty
    )
    annotation = {"imgHeight": height, "imgWidth": width, "objects": objects}
    _, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    contents = (png.tobytes(), json.dumps(annotation, indent=1).encode())
    for path, content in zip(street_paths(root, split, index), contents, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        os.replace(part, path)  # whole or not at all, so that a run can be taken up again


def _report(results, total, root):
    step = max(1, total // 10)
    for done, _ in enumerate(results, 1):
        if done % step == 0 or done == total:
            print(f"streets: {done}/{total} pictures in {root}", flush=True)


# ------------------------------------------------------------------------------------ the canvas


def _bgr(hue, saturation, value):
    """Colour from hue, saturation and value in 0..1, as float BGR in 0..255."""
    k = (np.array([1.0, 3.0, 5.0]) + hue * 6) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


class _Canvas:
    """A supersampled picture and its owner map, with a movable frame to draw in.

    ``at`` sets the frame: an origin on the picture, a scale (pixels a unit), the owner number that
    drawing leaves behind and a share of haze. Frame coordinates are (x to the right, y upwards).
    """

    def __init__(self, rng, height, width):
        self.rng = rng
        self.height, self.width = height, width
        self.margin = MARGIN * height // 192
        shape = tuple(SUPERSAMPLING * (n + 2 * self.margin) for n in (height, width))
        self.pixels = np.zeros((*shape, 3), np.uint8)
        self.owner = np.zeros(shape, np.int32)
        # Smooth noise that every textured surface is cut from.
        noise = np.zeros((320, 320 * shape[1] // shape[0]), np.float32)
        for cells, weight in ((10, 0.3), (40, 0.4), (160, 0.45)):
            grid = rng.standard_normal((cells, cells * shape[1] // shape[0]), dtype=np.float32)
            noise += weight * cv2.resize(grid, noise.shape[::-1], interpolation=cv2.INTER_LINEAR)
        self.noise = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_LINEAR)
        self.haze_colour = np.array([200.0, 200.0, 200.0])
        self.light = 0.0
        self.at(0, 0, 1)

    def at(self, x, y, scale, owner=0, haze=0.0):
        self.x, self.y, self.scale, self.id, self.haze = x, y, scale, owner, haze
        return self

    @property
    def inside(self):
        """Slices of the supersampled arrays that make the picture."""
        m, s = self.margin, SUPERSAMPLING
        return slice(m * s, (m + self.height) * s), slice(m * s, (m + self.width) * s)

    def mean_colour(self, x0, y0, x1, y1):
        """Mean colour of a frame rectangle as painted so far."""
        (left, bottom), (right, top) = self._pixel([(x0, y0), (x1, y1)]).astype(int)
        rows, columns = self.inside
        region = self.pixels[
            max(top, rows.start) : min(bottom, rows.stop),
            max(left, columns.start) : min(right, columns.stop),
        ]
        return region[::3, ::3].reshape(-1, 3).mean(0) if region.size else None

    def _pixel(self, points):
        origin = np.array([self.x + self.margin, self.y + self.margin])
        return (origin + np.asarray(points) * (self.scale, -self.scale)) * SUPERSAMPLING

    def polygon(self, points, colour, *, shade=0.0, texture=0.0, stripes=None, alpha=1.0):
        """Fill a polygon.

        Args:
            points: (K, 2) in the frame.
            colour: float BGR, or a factor (float) that what is there is multiplied by.
            shade: difference in brightness between the lit and the unlit side, as a share.
            texture: strength of the smooth noise, as a share.
            stripes: (period in frame units, strength, True for horizontal).
            alpha: opacity. Below 1 the owner of the pixels stays.
        """
        corners = self._pixel(points)
        low = np.maximum(np.floor(corners.min(0)), 0).astype(int)
        high = np.minimum(np.ceil(corners.max(0)) + 1, self.owner.shape[::-1]).astype(int)
        if (high <= low).any():
            return
        area = (slice(low[1], high[1]), slice(low[0], high[0]))
        region, owner = self.pixels[area], self.owner[area]
        fixed = [np.round((np.clip(corners, -2e4, 2e4) - low) * 16).astype(np.int32)]
        if np.isscalar(colour):
            values = cv2.convertScaleAbs(region, alpha=colour)
        else:
            colour = np.asarray(colour, float)
            colour = np.clip(colour + self.haze * (self.haze_colour - colour), 0, 255)
            if not (shade or texture or stripes) and alpha == 1.0:
                cv2.fillPoly(region, fixed, colour.tolist(), cv2.LINE_8, 4)
                cv2.fillPoly(owner, fixed, self.id, cv2.LINE_8, 4)
                return
            light = 1 + np.float32(texture) * self.noise[area]
            if shade:
                ramp = np.linspace(-0.5, 0.5, light.shape[1], dtype=np.float32)
                light += np.float32(shade * self.light) * ramp
            if stripes:
                period, strength, horizontal = stripes
                period = max(period * self.scale * SUPERSAMPLING, 3.0)
                line = np.arange(light.shape[0 if horizontal else 1]) % period < period / 2
                light -= np.float32(strength) * (line[:, None] if horizontal else line[None, :])
            light = np.maximum(light, 0)
            values = cv2.merge([cv2.convertScaleAbs(light, alpha=c) for c in colour])
        mask = np.zeros(owner.shape, np.uint8)
        cv2.fillPoly(mask, fixed, 1, cv2.LINE_8, 4)
        if alpha < 1.0:
            values = cv2.addWeighted(values, alpha, region, 1 - alpha, 0)
        else:
            cv2.fillPoly(owner, fixed, self.id, cv2.LINE_8, 4)
        cv2.copyTo(values, mask, region)

    def rectangle(self, x0, y0, x1, y1, colour, **style):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, **style)

    def ellipse(self, x, y, rx, ry, colour, *, start=0.0, end=360.0, **style):
        angle = np.radians(np.linspace(start, end, 24))
        points = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)
        self.polygon(points, colour, **style)

    def limb(self, a, b, ra, rb, colour, **style):
        """The hull of two circles: a limb, a trunk, a pole with round ends."""
        a, b = np.asarray(a, float), np.asarray(b, float)
        heading = math.atan2(b[1] - a[1], b[0] - a[0])
        turn = heading + np.pi / 2 + np.linspace(0, np.pi, 6)
        circle = np.stack([np.cos(turn), np.sin(turn)], 1)
        self.polygon(np.concatenate([a + ra * circle, b - rb * circle]), colour, **style)

    def owners(self):
        """The owner map at the picture's resolution, margins included: pixel centres."""
        half = SUPERSAMPLING // 2
        return self.owner[half::SUPERSAMPLING, half::SUPERSAMPLING]

    def finish(self):
        """The picture at its own resolution, float32 (height, width, 3)."""
        picture = self.pixels[self.inside]
        size = (self.width, self.height)
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32)


# ------------------------------------------------------------------------------------- the people

SKIN = [
    (140, 175, 225),
    (120, 155, 205),
    (95, 130, 180),
    (70, 100, 150),
    (45, 65, 105),
    (35, 45, 75),
]
HAIR = [(20, 20, 25), (30, 40, 60), (45, 70, 105), (110, 160, 195), (160, 160, 165), (35, 55, 120)]


def _cloth(rng):
    """A colour of clothes: mostly dark or grey, some of them bright."""
    kind = rng.random()
    if kind < 0.45:
        return _bgr(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.06, 0.35))
    if kind < 0.8:
        return _bgr(rng.random(), rng.uniform(0.1, 0.55), rng.uniform(0.3, 0.7))
    return _bgr(rng.random(), rng.uniform(0, 0.9), rng.uniform(0.6, 0.95))


def _draw_person(
    canvas, posture="walking", *, heading=None, low_contrast=0.0, child=False, skin=None
):
    """Draw a person of height 1 on the origin of the canvas's frame.

    Joints are set in body space (lateral, forward, up) and turned by the heading about the vertical
    axis; what is farther from the camera is drawn first. A heading of 0 faces the camera, pi / 2
    the right border of the picture.
    """
    rng = canvas.rng
    if heading is None:
        heading = rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.3:  # more people are seen from the side than not
            heading = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.25)
    side, front = math.sin(heading), math.cos(heading)
    build = rng.uniform(0.85, 1.3)

    behind = canvas.mean_colour(-0.2, 0.0, 0.2, 1.0)

    def garment():
        if behind is not None and rng.random() < low_contrast:
            return np.clip(behind * rng.uniform(0.8, 1.15) + rng.normal(0, 7, 3), 5, 250)
        return _cloth(rng)

    top, bottom, shoes = garment(), garment(), _bgr(rng.random(), 0.3, rng.uniform(0.05, 0.5))
    mannequin = skin is not None
    skin = np.array(skin if mannequin else SKIN[rng.integers(len(SKIN))], float)
    skin = np.clip(skin * rng.uniform(0.8, 1.15), 0, 255)
    hair = np.array(HAIR[rng.integers(len(HAIR))], float) * rng.uniform(0.7, 1.2)
    lower = rng.choice(["trousers", "shorts", "skirt", "coat"], p=[0.6, 0.1, 0.15, 0.15])
    legs = skin if lower in ("shorts", "skirt") else bottom
    sleeves = skin if rng.random() < 0.2 else top
    pattern = None
    if rng.random() < 0.25:
        pattern = (rng.uniform(0.03, 0.09), rng.uniform(0.2, 0.6), bool(rng.random() < 0.6))

    # ---- joints (lateral, forward, up)
    head_size = rng.uniform(0.082, 0.092) if child else rng.uniform(0.062, 0.07)
    hip_y, shoulder_y = (0.44, 0.76) if child else (0.50, 0.815)
    bend = {"bending": rng.uniform(0.8, 1.3), "riding": rng.uniform(0.2, 0.7)}.get(posture, 0.0)
    bend += rng.normal(0.03, 0.03)
    thigh = shin = (hip_y - 0.03) / 2
    swing = 0.0 if rng.random() < 0.25 else rng.uniform(0.25, 0.55)
    phase = rng.uniform(0, 2 * np.pi)
    shoulder, hip = 0.105 * build, 0.055 * build

    def upper(lateral, forward, up):
        """Turn a point of the upper body by the bend of the back, about the hips."""
        forward, up = forward + 0.0, up - hip_y
        return (
            lateral,
            forward * math.cos(bend) + up * math.sin(bend),
            hip_y + up * math.cos(bend) - forward * math.sin(bend),
        )

    def leg(sign):
        angle = swing * math.sin(phase + (np.pi if sign > 0 else 0))
        knee_bend = max(0.0, swing * 1.2 * math.cos(phase + (np.pi if sign > 0 else 0))) + 0.05
        if posture == "sitting":
            angle, knee_bend = 1.45 + rng.normal(0, 0.1), 1.5 + rng.normal(0, 0.2)
        elif posture == "riding":
            angle, knee_bend = (1.2, 1.3) if sign * math.sin(phase) > 0 else (0.45, 0.6)
        spread = hip + (0.0 if posture != "walking" else rng.uniform(0, 0.02))
        start = (sign * hip, 0.0, hip_y)
        knee = (sign * spread, thigh * math.sin(angle), hip_y - thigh * math.cos(angle))
        low = angle - knee_bend
        ankle = (
            sign * spread,
            knee[1] + shin * math.sin(low),
            knee[2] - shin * math.cos(low),
        )
        toe = (ankle[0], ankle[1] + 0.075, ankle[2] - 0.012)
        return start, knee, ankle, toe

    def arm(sign):
        angle = -1.1 * swing * math.sin(phase + (np.pi if sign > 0 else 0))
        elbow_bend, spread = rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.55)
        if posture == "riding":
            angle, elbow_bend = bend + 0.6, 0.4
        elif rng.random() < 0.2:  # a telephone, a pocket, crossed arms
            elbow_bend = rng.uniform(1.2, 2.3)
        start = (sign * shoulder, 0.0, shoulder_y - 0.02)
        reach = 0.165 * math.cos(spread)
        elbow = (
            sign * (shoulder + 0.165 * math.sin(spread)),
            reach * math.sin(angle),
            start[2] - reach * math.cos(angle),
        )
        fore = angle + elbow_bend
        hand = (elbow[0], elbow[1] + 0.15 * math.sin(fore), elbow[2] - 0.15 * math.cos(fore))
        return upper(*start), upper(*elbow), upper(*hand)

    all_legs = {sign: leg(sign) for sign in (-1, 1)}
    all_arms = {sign: arm(sign) for sign in (-1, 1)}
    drop = min(joints[2][2] for joints in all_legs.values()) - 0.03
    if posture in ("riding", "sitting"):
        drop = 0.0

    def screen(joint):
        return joint[0] * front + joint[1] * side, joint[2] - drop

    style = {"shade": 0.5, "texture": 0.12}

    def draw_leg(sign):
        start, knee, ankle, toe = map(screen, all_legs[sign])
        dark = 0.8 if sign == far else 1.0
        thick = 0.047 * build
        canvas.limb(ankle, toe, 0.022, 0.016, shoes)
        canvas.limb(knee, ankle, thick * 0.75, thick * 0.5, legs * dark, **style)
        upper_leg = bottom if lower != "skirt" else legs
        canvas.limb(start, knee, thick * 1.1, thick * 0.8, upper_leg * dark, **style)

    def draw_arm(sign):
        start, elbow, hand = map(screen, all_arms[sign])
        dark = 0.85 if sign == far else 1.0
        thick = 0.034 * build
        canvas.limb(elbow, hand, thick * 0.8, thick * 0.55, sleeves * dark, **style)
        canvas.limb(start, elbow, thick, thick * 0.85, top * dark, **style)
        canvas.ellipse(*hand, 0.018, 0.02, skin * dark)

    # The limb on the far side: lateral axis points away from the camera by -side.
    far = -1 if side < 0 else 1
    wide = lambda half, deep: half * abs(front) + deep * build * abs(side)  # noqa: E731

    def outline(levels):
        """Polygon of the trunk from (height, half width) pairs, downwards."""
        left, right = [], []
        for up, half in levels:
            x, y = screen(upper(0, 0, up) if up > hip_y else (0, 0, up))
            left.append((x - half, y))
            right.append((x + half, y))
        return left + right[::-1]

    draw_arm(far)
    draw_leg(far)
    draw_leg(-far)
    trunk = [
        (shoulder_y + 0.035, wide(0.04, 0.04)),
        (shoulder_y, wide(shoulder * 1.05, 0.06)),
        (shoulder_y - 0.1, wide(shoulder * 0.98, 0.075)),
        ((shoulder_y + hip_y) / 2 - 0.02, wide(shoulder * 0.82, 0.065)),
        (hip_y - 0.02, wide(hip * 1.75, 0.075)),
    ]
    if lower == "skirt" and posture != "riding":
        hem = rng.uniform(0.2, 0.36)
        flare = rng.uniform(1.0, 1.5)
        levels = [
            (hip_y + 0.08, wide(hip * 1.5, 0.06)),
            (hip_y, wide(hip * 1.9, 0.08)),
            (hem + drop, wide(hip * 2.0, 0.085) * flare),
        ]
        canvas.polygon(outline(levels), bottom, **style)
    if lower == "coat" and posture != "riding":
        trunk[-1:] = [
            (hip_y, wide(hip * 1.95, 0.08)),
            (rng.uniform(0.24, 0.4) + drop, wide(hip * 2.1, 0.1)),
        ]
    canvas.polygon(outline(trunk), top, stripes=pattern, **style)

    # ---- what is carried (part of the person, as in the segmentation of real data)
    carried = rng.random()
    if posture == "walking" and not mannequin:
        if carried < 0.15:  # backpack: behind the shoulders
            x, y = screen(upper(0, -0.09, shoulder_y - 0.12))
            if abs(side) > 0.5 or front < 0:
                canvas.ellipse(x, y, 0.05 + 0.035 * abs(front), 0.11, _cloth(rng), **style)
        elif carried < 0.3:  # bag in a hand
            x, y = screen(all_arms[-far][2])
            size = rng.uniform(0.04, 0.08)
            canvas.rectangle(x - size, y - 2.2 * size, x + size, y, _cloth(rng), **style)

    # ---- head
    neck = screen(upper(0, 0.01, shoulder_y + 0.01))
    centre = screen(upper(0, 0.02, 1 - head_size))
    canvas.limb(neck, centre, 0.03 * build, 0.03 * build, skin * 0.85)
    round_ = head_size * 0.8
    long_hair = rng.random() < 0.3
    cover = rng.choice(["hair", "hat", "hood", "bald"], p=[0.68, 0.16, 0.1, 0.06])
    crown = {"hat": _cloth(rng), "hood": top, "bald": skin}.get(cover, hair)
    if mannequin:
        crown = skin
    canvas.ellipse(*centre, round_, head_size, crown, **style)
    x, y = centre
    if long_hair and cover == "hair" and front < 0.3:
        canvas.rectangle(x - round_, y - 1.7 * head_size, x + round_ * 0.9, y, crown, **style)
    if front > -0.45:  # the face turns with the heading and goes when it looks away
        shift = side * round_ * 0.35
        canvas.ellipse(
            x + shift,
            y - head_size * 0.2,
            round_ * (0.82 - 0.3 * abs(side)),
            head_size * 0.78,
            skin,
            **style,
        )
        if canvas.scale > 60 and front > 0.1 and not mannequin:
            for eye in (-1, 1):
                canvas.ellipse(
                    x + shift + eye * round_ * 0.35 * front, y, 0.008, 0.007, skin * 0.35
                )
    if cover == "hat":
        canvas.ellipse(x, y + head_size * 0.1, round_ * 1.1, head_size * 0.9, crown, end=180)
        brim = rng.uniform(1.1, 1.5)
        canvas.ellipse(
            x + side * 0.02, y + head_size * 0.15, round_ * brim, head_size * 0.18, crown
        )
    draw_arm(-far)


def _draw_umbrella(canvas):
    rng = canvas.rng
    colour = _cloth(rng)
    x, y, radius = rng.normal(0, 0.04), rng.uniform(1.03, 1.1), rng.uniform(0.25, 0.36)
    canvas.limb((x, y), (x + 0.06, 0.6), 0.006, 0.006, (60, 60, 60))
    canvas.ellipse(
        x, y, radius, radius * 0.55, colour, end=180, shade=0.5, stripes=(0.12, 0.15, False)
    )


def _draw_bicycle(canvas, heading_side):
    """A bicycle of a rider of height 1, seen from the side."""
    colour = _cloth(canvas.rng)
    for x in (-0.3, 0.3):
        for angle in np.linspace(0, 2 * np.pi, 17)[:-1]:
            a, b = angle, angle + np.pi / 8
            canvas.limb(
                (x + 0.19 * math.cos(a), 0.19 + 0.19 * math.sin(a)),
                (x + 0.19 * math.cos(b), 0.19 + 0.19 * math.sin(b)),
                0.012,
                0.012,
                (35, 35, 35),
            )
    d = heading_side
    frame = [(-0.3 * d, 0.19), (-0.08 * d, 0.45), (0.22 * d, 0.45), (0.3 * d, 0.19)]
    for a, b in [*itertools.pairwise(frame), ((0.0, 0.19), frame[1]), ((0.0, 0.19), frame[2])]:
        canvas.limb(a, b, 0.014, 0.014, colour)
    canvas.limb(frame[2], (0.2 * d, 0.56), 0.013, 0.013, (50, 50, 50))


# ------------------------------------------------------------------------------------- the things
# Each draws in metres on the origin of the canvas's frame.


def _draw_car(canvas, view=None):
    rng = canvas.rng
    colour = _bgr(rng.random(), rng.choice([0.05, 0.6], p=[0.65, 0.35]), rng.uniform(0.1, 0.9))
    glass, tyre, dark = (75, 65, 55), (28, 28, 28), np.array(colour) * 0.55
    van = rng.random() < 0.25
    high = rng.uniform(1.9, 2.4) if van else rng.uniform(1.38, 1.6)
    style = {"shade": 0.25, "texture": 0.06}
    if view is None:
        view = "side" if rng.random() < 0.4 else "end"
    if view == "side":
        half, belt = rng.uniform(1.9, 2.3), high * 0.58
        flip = rng.choice([-1, 1])
        bonnet = 0.5 if van else 1.1
        body = [(-half, 0.3), (-half, belt), (half - 0.1, belt * 0.93), (half, 0.55), (half, 0.28)]
        cabin = [
            (-half + 0.1, belt - 0.02),
            (-half + (0.15 if van else 0.55), high),
            (half - bonnet - 0.75, high),
            (half - bonnet + 0.1, belt - 0.05),
        ]
        canvas.polygon([(flip * x, y) for x, y in cabin], colour, **style)
        windows = np.array(cabin)
        windows = windows.mean(0) + (windows - windows.mean(0)) * (0.88, 0.72)
        canvas.polygon([(flip * x, y) for x, y in windows], glass, texture=0.3)
        canvas.rectangle(-0.06, belt, 0.02, high - 0.05, colour)
        canvas.polygon([(flip * x, y) for x, y in body], colour, **style)
        canvas.rectangle(-half, 0.28, half, 0.4, dark)
        for x in (-half + 0.75, half - 0.75):
            canvas.ellipse(x, 0.32, 0.33, 0.32, tyre)
            canvas.ellipse(x, 0.32, 0.18, 0.18, (130, 130, 130))
        canvas.rectangle(
            flip * half - 0.1, belt * 0.75, flip * half + 0.05, belt * 0.88, (210, 230, 235)
        )
    else:
        half, belt = rng.uniform(0.82, 0.95), high * 0.58
        lamp = (40, 40, 190) if rng.random() < 0.5 else (215, 235, 240)
        for x in (-half + 0.15, half - 0.15):
            canvas.rectangle(x - 0.12, 0.0, x + 0.12, 0.4, tyre)
        canvas.polygon(
            [(-half, belt - 0.05), (-half * 0.78, high), (half * 0.78, high), (half, belt - 0.05)],
            colour,
            **style,
        )
        canvas.polygon(
            [
                (-half * 0.86, belt),
                (-half * 0.7, high - 0.1),
                (half * 0.7, high - 0.1),
                (half * 0.86, belt),
            ],
            glass,
            texture=0.35,
        )
        canvas.rectangle(-half, 0.25, half, belt, colour, **style)
        canvas.rectangle(-half, 0.25, half, 0.42, dark)
        canvas.rectangle(-0.28, 0.42, 0.28, 0.54, (215, 220, 220))
        for x in (-half + 0.2, half - 0.2):
            canvas.ellipse(x, belt - 0.18, 0.16, 0.09, lamp)


def _draw_tree(canvas, tall=True):
    rng = canvas.rng
    bark = np.array((45, 62, 80)) * rng.uniform(0.6, 1.2)
    leaf = _bgr(rng.uniform(0.13, 0.36), rng.uniform(0.3, 0.65), rng.uniform(0.2, 0.5))
    trunk = rng.uniform(2.2, 3.5) if tall else 0.9
    width = rng.uniform(0.1, 0.22)
    canvas.limb(
        (0, 0), (rng.normal(0, 0.1), trunk + 1), width, width * 0.8, bark, shade=0.6, texture=0.3
    )
    if rng.random() < 0.15:  # bare
        for _ in range(9):
            y, angle = rng.uniform(1.6, trunk + 0.8), rng.normal(0, 0.8)
            tip = (2.2 * math.sin(angle), y + 2.2 * math.cos(angle))
            canvas.limb((0, y), tip, 0.06, 0.02, bark)
        return
    for _ in range(14 if tall else 7):
        x, y = rng.normal(0, 0.9), trunk + 1.2 + rng.normal(0, 0.7)
        size = rng.uniform(0.5, 1.1)
        canvas.ellipse(
            x, y, size, size * 0.8, leaf * rng.uniform(0.7, 1.25), texture=0.35, shade=0.4
        )


def _draw_pole(canvas):
    """A lamp post, a road sign, a traffic light or a parking meter."""
    rng = canvas.rng
    grey = _bgr(rng.random(), 0.1, rng.uniform(0.12, 0.6))
    kind = rng.integers(4)
    if kind == 0:
        canvas.limb((0, 0), (0, 5.5), 0.1, 0.06, grey, shade=0.5)
        canvas.limb((0, 5.5), (rng.choice([-1, 1]) * 1.3, 5.7), 0.05, 0.05, grey)
    elif kind == 1:
        canvas.limb((0, 0), (0, 2.4), 0.04, 0.04, grey)
        shape, size = rng.integers(3), rng.uniform(0.25, 0.4)
        fill = _bgr(rng.choice([0.0, 0.6, 0.15]), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9))
        if shape == 0:
            canvas.ellipse(0, 2.3, size, size, fill)
            canvas.ellipse(0, 2.3, size * 0.7, size * 0.7, (225, 225, 225))
        elif shape == 1:
            canvas.polygon([(-size, 2.0), (size, 2.0), (0, 2.0 + 1.8 * size)], fill)
        else:
            canvas.rectangle(-size, 2.0, size, 2.0 + 2 * size, fill, texture=0.1)
        if rng.random() < 0.5:  # the pictogram of a walker
            canvas.ellipse(0, 2.36, 0.04, 0.05, (240, 240, 240))
            canvas.limb((0, 2.3), (0, 2.18), 0.04, 0.03, (240, 240, 240))
            canvas.limb((0, 2.18), (0.08, 2.05), 0.025, 0.02, (240, 240, 240))
            canvas.limb((0, 2.18), (-0.08, 2.05), 0.025, 0.02, (240, 240, 240))
    elif kind == 2:
        canvas.limb((0, 0), (0, 2.3), 0.07, 0.06, grey, shade=0.5)
        canvas.rectangle(-0.16, 1.9, 0.16, 2.8, (35, 35, 35))
        lit = rng.integers(3)
        for i, colour in enumerate([(60, 200, 60), (40, 180, 230), (40, 40, 230)]):
            bright = 1.0 if i == lit else 0.25
            canvas.ellipse(0, 2.07 + 0.28 * i, 0.1, 0.1, np.array(colour) * bright)
    else:
        canvas.limb((0, 0), (0, 1.0), 0.05, 0.05, grey)
        canvas.rectangle(-0.13, 1.0, 0.13, 1.35, grey * 0.8, shade=0.4)
        canvas.ellipse(0, 1.35, 0.13, 0.13, grey * 0.8)


def _draw_bollard(canvas):
    rng = canvas.rng
    colour = _bgr(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.1, 0.7))
    high, width = rng.uniform(0.7, 1.2), rng.uniform(0.07, 0.15)
    canvas.limb((0, 0), (0, high), width, width, colour, shade=0.5, texture=0.1)
    canvas.rectangle(
        -width, high * 0.75, width, high * 0.85, (60, 60, 200) if rng.random() < 0.5 else (230,) * 3
    )


def _draw_post_box(canvas):
    """A post box, a hydrant's or a switch box: a body with a head."""
    rng = canvas.rng
    colour = _bgr(rng.choice([0.0, 0.15, 0.6, 0.4]), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.7))
    high, half = rng.uniform(1.2, 1.75), rng.uniform(0.2, 0.32)
    canvas.rectangle(-half, 0.0, half, high - half * 0.5, colour, shade=0.5, texture=0.1)
    canvas.ellipse(0, high - half * 0.5, half * 1.1, half * 0.5, colour * 0.8, shade=0.4)
    canvas.rectangle(-half * 0.6, high * 0.7, half * 0.6, high * 0.76, colour * 0.4)
    canvas.rectangle(-half, 0.0, half, 0.15, colour * 0.5)


def _draw_parasol(canvas):
    """A closed parasol: as tall and as slim as a person in a coat."""
    rng = canvas.rng
    cloth = _cloth(rng)
    canvas.limb((0, 0), (0, 2.1), 0.03, 0.03, (110, 120, 130))
    canvas.rectangle(-0.22, 0, 0.22, 0.09, (70, 70, 70))
    canvas.polygon(
        [(-0.05, 2.05), (-0.14, 1.7), (-0.24, 0.75), (0.24, 0.75), (0.14, 1.7), (0.05, 2.05)],
        cloth,
        shade=0.6,
        texture=0.15,
        stripes=(0.16, 0.15, False),
    )
    if rng.random() < 0.5:
        canvas.rectangle(-0.16, 1.4, 0.16, 1.47, cloth * 0.5)


def _draw_dummy(canvas):
    """A tailor's dummy or a coat on a stand: a trunk without head and legs."""
    rng = canvas.rng
    cloth = _cloth(rng)
    canvas.limb((0, 0), (0, 1.65), 0.025, 0.025, (60, 70, 80))
    canvas.limb((-0.2, 0.02), (0.2, 0.02), 0.03, 0.03, (60, 70, 80))
    wide, low = rng.uniform(0.2, 0.26), rng.uniform(0.5, 0.85)
    trunk = [(0.05, 1.5), (wide, 1.42), (wide * 0.85, 1.1), (wide * 1.05, low)]
    canvas.polygon(trunk + [(-x, y) for x, y in trunk[::-1]], cloth, shade=0.5, texture=0.12)
    if rng.random() < 0.5:
        for s in (-1, 1):
            canvas.limb(
                (s * wide, 1.4), (s * wide * 1.3, 0.85), 0.06, 0.045, cloth * 0.9, shade=0.4
            )


def _draw_topiary(canvas):
    """A clipped shrub or a young tree: a ball on a trunk, sometimes above a second one."""
    rng = canvas.rng
    leaf = _bgr(rng.uniform(0.15, 0.38), rng.uniform(0.3, 0.6), rng.uniform(0.15, 0.45))
    style = {"shade": 0.5, "texture": 0.4}
    canvas.limb((0, 0), (0, 1.4), 0.04, 0.04, (50, 65, 85))
    if rng.random() < 0.4:  # a column
        canvas.ellipse(0, 0.95, rng.uniform(0.22, 0.34), 0.9, leaf, **style)
    else:
        canvas.ellipse(0, 0.75, 0.3, rng.uniform(0.3, 0.5), leaf, **style)
        canvas.ellipse(0, 1.45, 0.2, 0.2, leaf * 1.1, **style)
    canvas.polygon([(-0.2, 0), (0.2, 0), (0.25, 0.35), (-0.25, 0.35)], (70, 90, 130), shade=0.4)


def _draw_board(canvas):
    """A board on the pavement."""
    rng = canvas.rng
    half, high = rng.uniform(0.25, 0.4), rng.uniform(0.9, 1.5)
    canvas.polygon(
        [(-half, 0), (half, 0), (half * 0.85, high), (-half * 0.85, high)], (60, 75, 95), shade=0.3
    )
    inner = [
        (-half * 0.8, 0.15),
        (half * 0.8, 0.15),
        (half * 0.7, high - 0.1),
        (-half * 0.7, high - 0.1),
    ]
    canvas.polygon(inner, _cloth(rng), stripes=(0.12, 0.3, True))


def _draw_bin(canvas):
    rng = canvas.rng
    colour = _bgr(rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.6), rng.uniform(0.12, 0.45))
    half, high = rng.uniform(0.25, 0.4), rng.uniform(0.9, 1.2)
    canvas.polygon(
        [(-half * 0.85, 0.05), (half * 0.85, 0.05), (half, high), (-half, high)],
        colour,
        shade=0.4,
        texture=0.08,
    )
    canvas.rectangle(-half * 1.1, high, half * 1.1, high + 0.09, colour * 0.7)


def _draw_hedge(canvas):
    rng = canvas.rng
    leaf = _bgr(rng.uniform(0.15, 0.36), rng.uniform(0.3, 0.6), rng.uniform(0.18, 0.42))
    half, high = rng.uniform(0.5, 1.4), rng.uniform(0.5, 1.05)
    for _ in range(12):
        x = rng.uniform(-half, half)
        size = rng.uniform(0.25, 0.4)
        canvas.ellipse(
            x, rng.uniform(0.2, high - 0.2), size, size, leaf * rng.uniform(0.7, 1.2), texture=0.4
        )
    canvas.rectangle(-half, 0, half, high * 0.5, leaf * 0.75, texture=0.4)


def _draw_fence(canvas):
    rng = canvas.rng
    colour = _bgr(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.1, 0.8))
    half, high = rng.uniform(0.9, 1.6), rng.uniform(0.8, 1.15)
    solid = rng.random() < 0.35
    if solid:
        canvas.rectangle(-half, 0, half, high, colour, shade=0.2, texture=0.15)
        return
    for y in (0.15, high):
        canvas.rectangle(-half, y - 0.03, half, y + 0.03, colour)
    for x in np.arange(-half, half, 0.16):
        canvas.rectangle(x, 0.1, x + 0.05, high, colour)


CLUTTER = (
    _draw_pole,
    _draw_bollard,
    _draw_post_box,
    _draw_parasol,
    _draw_dummy,
    _draw_topiary,
    _draw_board,
    _draw_bin,
)
# What hides people: with the half width in metres within which its middle may lie.
OCCLUDERS = (
    (_draw_car, 1.1),
    (_draw_car, 1.1),
    (_draw_hedge, 0.8),
    (_draw_fence, 0.8),
    (_draw_bin, 0.35),
    (_draw_board, 0.35),
    (_draw_post_box, 0.35),
    (_draw_topiary, 0.35),
    (_draw_pole, 0.1),
)


# ------------------------------------------------------------------------------------- the street


class _Street:
    """One scene: camera, light, street, what stands on it, and the finished picture."""

    def __init__(self, rng, height, width, difficulty):
        self.rng, self.height, self.width, self.difficulty = rng, height, width, difficulty
        self.unit = height / 192  # the lengths of Difficulty refer to 192 pixels
        self.canvas = _Canvas(rng, height, width)
        self.focal = rng.uniform(0.85, 1.05) * 300 * self.unit
        self.eye = rng.uniform(1.15, 1.6)  # metres above the ground
        self.horizon = rng.uniform(0.36, 0.45) * height
        self.vanishing = rng.uniform(0.3, 0.7) * width
        self.weather = rng.choice(["overcast", "sun", "dusk", "fog"], p=self._weather_shares())
        self.canvas.light = rng.choice([-1, 1]) * (1.0 if self.weather == "sun" else 0.5)
        self.shadow = (rng.uniform(-1.4, 1.4), rng.uniform(-0.4, 0.8))  # metres a metre of height
        warm = rng.normal(0, 6)
        self.canvas.haze_colour = np.clip(
            {"overcast": 195, "sun": 215, "dusk": 120, "fog": 190}[self.weather]
            + np.array([8.0 - warm, 2.0, -4.0 + warm]),
            0,
            255,
        )
        self.clear = {"overcast": 90, "sun": 160, "dusk": 70, "fog": 22}[self.weather]  # metres
        self.people = []  # one dict an owner number: label, full box, pixels

    def _weather_shares(self):
        dim = self.difficulty.dim
        return [(1 - dim) * 0.5, (1 - dim) * 0.5, dim * 0.55, dim * 0.45]

    # ---- geometry

    def project(self, x, y, z):
        """Pixel of a point (metres: to the right, up, ahead)."""
        return (
            self.vanishing + self.focal * x / z,
            self.horizon - self.focal * (y - self.eye) / z,
        )

    def stand(self, x, z, *, unit=1.0, owner=0):
        """The canvas with its frame on the ground at (x, z); ``unit`` metres are 1."""
        haze = 1 - math.exp(-z / self.clear)
        foot = self.project(x, 0, z)
        return self.canvas.at(*foot, self.focal * unit / z, owner=owner, haze=haze)

    def surface(self, corners, colour, **style):
        """Fill a polygon of points (x, y, z) in metres."""
        z = np.mean([p[2] for p in corners])
        self.canvas.at(0, 0, 1, haze=1 - math.exp(-z / self.clear))
        points = [self.project(*p) for p in corners]
        self.canvas.polygon([(x, -y) for x, y in points], colour, **style)

    def strip(self, left, right, colour, near=NEAR, far=FAR, **style):
        """A strip of the ground, in bands so that haze grows with the distance."""
        bands = np.geomspace(near, far, 2 + int(2 * math.log2(far / near)))
        for z0, z1 in itertools.pairwise(bands):
            corners = [(left, 0, z0), (right, 0, z0), (right, 0, z1), (left, 0, z1)]
            self.surface(corners, colour, **style)

    # ---- background

    def draw_background(self):
        rng, canvas = self.rng, self.canvas
        sky = {
            "overcast": _bgr(0.6, 0.05, rng.uniform(0.65, 0.9)),
            "sun": _bgr(0.58, rng.uniform(0.2, 0.5), 0.95),
            "dusk": _bgr(rng.choice([0.62, 0.05]), 0.35, rng.uniform(0.25, 0.5)),
            "fog": canvas.haze_colour * 1.02,
        }[self.weather]
        m = canvas.margin
        canvas.at(0, 0, 1)
        canvas.rectangle(-m, -self.height - m, self.width + m, m, sky, texture=0.05)
        steps = 8
        for i in range(steps):  # paler towards the horizon
            top, bottom = (self.horizon * k / steps for k in (i, i + 1))
            blend = sky + (canvas.haze_colour - sky) * (i + 1) / steps
            canvas.at(0, 0, 1).rectangle(-m, -bottom, self.width + m, -top, blend, texture=0.04)
        ground = _bgr(rng.uniform(0.05, 0.12), rng.uniform(0.02, 0.2), rng.uniform(0.38, 0.62))
        canvas.at(0, 0, 1).rectangle(
            -m, -self.height - m, self.width + m, -self.horizon, ground, texture=0.08
        )
        self.draw_ground(ground)
        self.draw_far_end()
        self.stalls = []
        for sign in (-1, 1):
            if rng.random() < 0.75:
                self.draw_facades(sign)
            else:
                self.draw_park(sign)

    def draw_ground(self, pavement):
        rng = self.rng
        self.middle = rng.uniform(-3.5, 3.5)
        self.half_road = 0.0 if rng.random() < 0.3 else rng.uniform(2.6, 4.5)
        self.left = self.middle - self.half_road - rng.uniform(2.2, 5.5)
        self.right = self.middle + self.half_road + rng.uniform(2.2, 5.5)
        joint = pavement * rng.uniform(0.82, 0.93)
        for x in np.arange(self.left, self.right, rng.uniform(0.8, 2.0)):
            self.strip(x, x + 0.05, joint, far=50)
        z = NEAR
        while z < 30:
            z += rng.uniform(0.9, 1.4)
            self.surface(
                [
                    (self.left, 0, z),
                    (self.right, 0, z),
                    (self.right, 0, z + 0.05),
                    (self.left, 0, z + 0.05),
                ],
                joint,
            )
        if self.half_road:
            left, right = self.middle - self.half_road, self.middle + self.half_road
            asphalt = _bgr(0.6, 0.04, rng.uniform(0.2, 0.45))
            self.strip(left - 0.15, left, pavement * 1.2)
            self.strip(right, right + 0.15, pavement * 1.2)
            self.strip(left, right, asphalt, texture=0.12)
            paint = np.array([205.0, 210, 210]) * rng.uniform(0.75, 1.05)
            dash = rng.uniform(1.5, 3.0)
            for z in np.arange(NEAR, 60, 2.2 * dash):
                self.strip(self.middle - 0.07, self.middle + 0.07, paint, z, z + dash)
            if rng.random() < 0.35:  # a crossing
                z = rng.uniform(4, 14)
                for x in np.arange(left + 0.3, right - 0.4, 0.9):
                    self.strip(x, x + 0.45, paint, z, z + 2.5)
        for _ in range(rng.integers(0, 4)):  # patches, covers, puddles
            x, z = rng.uniform(self.left, self.right), rng.uniform(3, 20)
            size = rng.uniform(0.3, 1.0)
            angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
            self.surface(
                [(x + size * math.cos(a), 0, z + size * math.sin(a)) for a in angle],
                pavement * rng.uniform(0.5, 1.15),
                texture=0.1,
            )

    def draw_far_end(self):
        rng = self.rng
        z = rng.uniform(50, 110)
        x = self.left - 60
        while x < self.right + 60:
            wide, high = rng.uniform(8, 20), rng.uniform(6, 22)
            if rng.random() < 0.35:
                leaf = _bgr(rng.uniform(0.15, 0.35), 0.4, rng.uniform(0.2, 0.45))
                angle = np.linspace(0, np.pi, 9)
                tops = [
                    (x + wide / 2 + wide / 2 * math.cos(a), 0.4 * high * math.sin(a), z)
                    for a in angle
                ]
                self.surface([*tops, (x, 0, z), (x + wide, 0, z)], leaf, texture=0.3)
            else:
                wall = _bgr(rng.uniform(0, 0.15), rng.uniform(0, 0.4), rng.uniform(0.3, 0.75))
                self.surface([(x, 0, z), (x + wide, 0, z), (x + wide, high, z), (x, high, z)], wall)
                for y in np.arange(1.5, high - 1.5, 3.2):
                    for wx in np.arange(x + 1, x + wide - 1.5, 2.6):
                        self.surface(
                            [
                                (wx, y, z),
                                (wx + 1.1, y, z),
                                (wx + 1.1, y + 1.6, z),
                                (wx, y + 1.6, z),
                            ],
                            wall * 0.55,
                        )
            x += wide

    def draw_facades(self, sign):
        """House fronts along the street, with windows, shops, posters and mannequins."""
        rng = self.rng
        x = self.left if sign < 0 else self.right
        edges = [rng.uniform(1.5, 2.5)]
        while edges[-1] < 55:
            edges.append(edges[-1] + rng.uniform(4, 11))
        for z0, z1 in reversed(list(itertools.pairwise(edges))):
            high = rng.uniform(6, 15)
            wall = _bgr(rng.uniform(0, 0.15), rng.uniform(0.02, 0.5), rng.uniform(0.3, 0.85))
            wall = wall * (1.12 if sign * self.canvas.light < 0 else 0.85)
            panel = lambda a, b, y0, y1, colour, **s: self.surface(  # noqa: E731, B023
                [(x, y0, a), (x, y0, b), (x, y1, b), (x, y1, a)], colour, **s
            )
            panel(z0, z1, 0, high, wall, texture=0.1)
            panel(z0, z1, 0, rng.uniform(0.3, 0.8), wall * 0.75)
            panel(z0, z1, high - 0.4, high, wall * 0.8)
            glass = np.array([90.0, 75, 65]) * rng.uniform(0.5, 1.6)
            step = rng.uniform(1.7, 2.6)
            for y in np.arange(3.6, high - 1.6, 3.0):
                for z in np.arange(z0 + 0.6, z1 - 1.2, step):
                    pane = glass * rng.uniform(0.7, 1.3)
                    if self.weather == "dusk" and rng.random() < 0.25:
                        pane = np.array([120.0, 190, 235])
                    panel(z - 0.1, z + 1.2, y - 0.12, y + 1.62, wall * 1.15)
                    panel(z, z + 1.1, y, y + 1.5, pane)
            if rng.random() < 0.55:  # a shop
                panel(z0 + 0.4, z1 - 0.4, 0.5, 2.7, glass * 0.8, texture=0.35)
                panel(z0 + 0.3, z1 - 0.3, 2.7, 3.3, _cloth(rng), texture=0.05)
                if rng.random() < 0.5:
                    self.stalls += [(x, rng.uniform(z0 + 0.6, z1 - 0.6)) for _ in range(2)]
                if rng.random() < 0.5:  # an awning
                    out = x - sign * 1.2
                    cloth = _cloth(rng)
                    self.surface(
                        [
                            (x, 3.1, z0 + 0.3),
                            (x, 3.1, z1 - 0.3),
                            (out, 2.5, z1 - 0.3),
                            (out, 2.5, z0 + 0.3),
                        ],
                        cloth,
                    )
            else:  # doors, as tall as people
                for z in np.arange(z0 + 0.8, z1 - 1.2, 3.0):
                    door = _cloth(rng) if rng.random() < 0.5 else glass
                    top = 2.1 if rng.random() < 0.5 else 2.4
                    panel(z, z + 1.0, 0.0 if rng.random() < 0.6 else 0.9, top, door, texture=0.15)

    def draw_park(self, sign):
        rng = self.rng
        x = self.left if sign < 0 else self.right
        grass = _bgr(rng.uniform(0.2, 0.33), rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.5))
        self.strip(*sorted((x, x + sign * 80)), grass, texture=0.25)
        for z in np.sort(rng.uniform(5, 45, rng.integers(5, 12)))[::-1]:
            _draw_tree(self.stand(x + sign * rng.uniform(1, 12), z), tall=rng.random() < 0.7)
        if rng.random() < 0.4:
            for z in np.arange(30, 3, -1.2):
                self.stand(x, z).rectangle(-0.05, 0, 0.05, 1.0, (60, 65, 70))

    # ---- what stands on the street

    def draw(self):
        self.draw_background()
        # (depth, draw) pairs: painted from far to near.
        things = self.place_people() + self.place_things()
        for _, draw in sorted(things, key=lambda thing: -thing[0]):
            draw()
        return self.develop(), *self.annotate()

    def lateral(self, z, spread=0.0):
        """A place (metres) across the street at depth ``z``, in sight."""
        left = (-spread - self.vanishing) * z / self.focal
        right = (self.width + spread - self.vanishing) * z / self.focal
        low, high = max(left, self.left + 0.3), min(right, self.right - 0.3)
        return self.rng.uniform(low, high) if low < high else self.rng.uniform(left, right)

    def person_height(self):
        low, high = self.difficulty.min_height, self.difficulty.max_height
        if self.rng.random() < self.difficulty.tall:
            low = max(low, min(50.0, high))
        return self.unit * math.exp(self.rng.uniform(math.log(low), math.log(high)))

    def place_people(self):
        rng, level = self.rng, self.difficulty
        things = []
        for x, z in self.stalls:
            if z < 18 and rng.random() < 0.4:
                things.append((z + 3, functools.partial(self.draw_mannequin, x, z)))
        if rng.random() < level.empty:
            return things
        for _ in range(rng.poisson(level.people * rng.choice([0.5, 1.0, 1.5]))):
            child = rng.random() < 0.1
            tall = (
                rng.uniform(1.0, 1.45)
                if child
                else float(np.clip(rng.normal(1.72, 0.09), 1.5, 1.95))
            )
            z = self.focal * 1.72 / self.person_height()
            x = self.lateral(z, spread=6 * self.unit)
            things.append((z, self._person(x, z, tall, "pedestrian", "walking", child)))
            if rng.random() < level.companion:
                beside = x + rng.choice([-1, 1]) * rng.uniform(0.35, 0.7)
                behind = z + rng.uniform(0.05, 0.8)
                other = float(np.clip(rng.normal(1.7, 0.09), 1.45, 1.95))
                things.append(
                    (behind, self._person(beside, behind, other, "pedestrian", "walking"))
                )
            if rng.random() < level.occluded:
                draw, reach = OCCLUDERS[rng.integers(len(OCCLUDERS))]
                before = max(2.4, z - rng.uniform(0.5, 1.2))
                # Aside in pixels, not in metres: what hides is nearer than what is hidden.
                across = (x / z) * before + rng.uniform(-reach, reach)
                things.append((before, functools.partial(self.draw_thing, draw, across, before)))
        for label, posture, share in (
            ("rider", "riding", 0.25),
            ("sitting person", "sitting", 0.25),
            ("person (other)", "bending", 0.08),
        ):
            if rng.random() < share:
                tall = rng.uniform(1.6, 1.85)
                z = self.focal * tall / self.person_height()
                x = self.lateral(z)
                things.append((z, self._person(x, z, tall, label, posture)))
        if rng.random() < 0.25:
            z = self.focal * 1.7 / (self.unit * rng.uniform(14, 40))
            things.append((z, functools.partial(self.draw_group, self.lateral(z), z)))
        if rng.random() < 0.15:
            z = self.focal * 1.7 / (self.unit * rng.uniform(18, 60))
            things.append((z, functools.partial(self.draw_poster, self.lateral(z), z)))
        return things

    def place_things(self):
        rng, level = self.rng, self.difficulty
        things = []
        for _ in range(rng.poisson(level.clutter)):
            z = self.focal * 1.7 / self.person_height()
            draw = CLUTTER[rng.integers(len(CLUTTER))]
            things.append((z, functools.partial(self.draw_thing, draw, self.lateral(z, 10), z)))
        for _ in range(rng.poisson(level.cars)):
            z = rng.uniform(7, 35)
            side = rng.choice([-1, 1]) * max(self.half_road - 1.0, 1.5)
            draw = functools.partial(_draw_car, view="end" if rng.random() < 0.8 else "side")
            things.append((z, functools.partial(self.draw_thing, draw, self.middle + side, z)))
        for _ in range(rng.poisson(1.2)):
            z = rng.uniform(7, 40)
            x = self.left + 0.8 if rng.random() < 0.5 else self.right - 0.8
            things.append((z, functools.partial(self.draw_thing, _draw_tree, x, z)))
        return things

    def draw_thing(self, draw, x, z):
        self.cast_shadow(x, z, 0.35, 1.4)
        draw(self.stand(x, z))

    def cast_shadow(self, x, z, radius, high):
        """Darken the ground under and, in the sun, beside a thing."""
        angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        circle = np.stack([radius * np.cos(angle), 0 * angle, radius * np.sin(angle)], 1)
        ground = np.maximum(circle + (x, 0, z), (-1e3, 0, 1.2))
        self.surface(ground, 0.65, alpha=0.7)
        if self.weather == "sun":
            tip = np.maximum(
                0.7 * circle + (x + high * self.shadow[0], 0, z + high * self.shadow[1]),
                (-1e3, 0, 1.2),
            )
            hull = cv2.convexHull(np.concatenate([ground, tip])[:, ::2].astype(np.float32))[:, 0]
            self.surface([(a, 0, b) for a, b in hull], 0.6, alpha=0.85)

    # ---- people

    def _person(self, *arguments):
        return functools.partial(self.draw_person, *arguments)

    def draw_person(self, x, z, tall, label, posture, child=False):
        rng = self.rng
        self.cast_shadow(x, z, 0.22, tall)
        canvas = self.stand(x, z, unit=tall)
        heading = None
        if posture == "riding":
            side = rng.choice([-1, 1])
            heading = side * np.pi / 2 + rng.normal(0, 0.15)
            _draw_bicycle(canvas, side)
            canvas.y -= 0.12 * canvas.scale
        elif posture == "sitting":
            wood = _cloth(rng)
            canvas.rectangle(-0.45, 0.2, 0.45, 0.27, wood)
            canvas.rectangle(-0.45, 0.3, 0.45, 0.5, wood * 0.85)
            for leg in (-0.4, 0.36):
                canvas.rectangle(leg, 0, leg + 0.04, 0.22, wood * 0.6)
            canvas.y += 0.22 * canvas.scale
            heading = rng.normal(0, 0.6)
        with self.painting(label):
            _draw_person(
                canvas,
                posture,
                heading=heading,
                low_contrast=self.difficulty.low_contrast,
                child=child,
            )
        if posture == "walking" and rng.random() < 0.06:
            canvas.id = 0
            _draw_umbrella(canvas)

    def draw_group(self, x, z):
        """A crowd far away that is annotated as one region."""
        rng = self.rng
        with self.painting("person group") as owner:
            for _ in range(rng.integers(6, 14)):
                across, depth = x + rng.normal(0, 0.9), z + abs(rng.normal(0, 0.4))
                self.stand(across, depth, unit=rng.uniform(1.5, 1.85), owner=owner)
                _draw_person(self.canvas, low_contrast=self.difficulty.low_contrast)

    def draw_mannequin(self, x, z):
        """A mannequin in a shop window."""
        canvas = self.stand(x - 0.3 * np.sign(x - self.middle), z, unit=1.75)
        canvas.y -= 0.3 * canvas.scale
        with self.painting("ignore"):
            _draw_person(
                canvas, skin=_bgr(0.08, self.rng.uniform(0, 0.2), self.rng.uniform(0.5, 0.9))
            )

    def draw_poster(self, x, z):
        """A pillar with the picture of a person."""
        rng = self.rng
        canvas = self.stand(x, z)
        wide, high = rng.uniform(0.6, 0.9), rng.uniform(2.2, 2.7)
        canvas.rectangle(-wide, 0, wide, high, (85, 85, 85), shade=0.3)
        canvas.rectangle(
            -wide * 0.9, 0.4, wide * 0.9, high - 0.1, _cloth(rng) * 0.6 + 80, texture=0.1
        )
        canvas.y -= 0.5 * canvas.scale
        canvas.scale *= rng.uniform(1.3, 1.7)
        with self.painting("ignore"):
            _draw_person(canvas)

    @contextlib.contextmanager
    def painting(self, label):
        """What is painted within belongs to one new owner, whose full box and pixels are noted."""
        canvas = self.canvas
        owner = canvas.id = len(self.people) + 1
        yield owner
        mask = canvas.owners() == owner
        x, y, w, h = _tight_box(mask)
        full = [x - canvas.margin, y - canvas.margin, w, h]
        self.people.append((label, full, int(mask.sum())))
        canvas.id = 0

    # ---- the result

    def develop(self):
        """Light, lens and sensor."""
        rng, level = self.rng, self.difficulty
        picture = self.canvas.finish()
        gain = {"overcast": 0.95, "sun": 1.1, "dusk": 0.7, "fog": 0.95}[self.weather]
        picture *= gain * rng.uniform(0.85, 1.15) * (1 + rng.normal(0, 0.03, 3)).astype(np.float32)
        contrast = rng.uniform(0.75, 1.1) if self.weather != "fog" else rng.uniform(0.6, 0.85)
        picture = picture.mean() + contrast * (picture - picture.mean())
        y, x = np.mgrid[-1 : 1 : self.height * 1j, -1 : 1 : self.width * 1j]
        picture *= (1 - rng.uniform(0, 0.25) * (x * x + y * y) / 2)[..., None].astype(np.float32)
        sigma = rng.uniform(0.2, level.blur) * self.unit
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
        sigma = rng.uniform(1.0, level.noise) * (1.3 if self.weather == "dusk" else 1.0)
        picture += sigma * rng.standard_normal(picture.shape, dtype=np.float32)
        return np.clip(np.round(picture), 0, 255).astype(np.uint8)

    def annotate(self):
        """Rows of the annotation file and the owner map, numbered by row."""
        m = self.canvas.margin
        owner = self.canvas.owners()[m : m + self.height, m : m + self.width]
        rows, renumber = [], np.zeros(len(self.people) + 1, np.int32)
        for number, (label, full, painted) in enumerate(self.people, 1):
            seen = owner == number
            if not seen.any():
                continue
            visible = _tight_box(seen)
            if seen.sum() < MIN_VISIBLE * painted:
                label = "ignore"
            if label in ("ignore", "person group"):  # a region seen, without a hidden part
                full = visible
            elif label == "pedestrian":
                full, visible = _aligned(full, visible, self.width)
            kind = {"rider": 25000, "ignore": 0, "person group": 0}.get(label, 24000)
            rows.append(
                {
                    "instanceId": kind + number if kind else 0,
                    "bbox": full,
                    "bboxVis": visible,
                    "label": label,
                }
            )
            renumber[number] = len(rows)
        return rows, renumber[owner]


def _aligned(full, visible, image_width):
    """The boxes of a walker in CityPersons' convention: head to feet, ``ASPECT`` times as wide.

    Both boxes are stretched alike about the middle of the body, so that the visible share stays.
    """
    x, y, w, h = full
    wide = max(round(ASPECT * h), 1)
    left = math.floor(x + w / 2 - wide / 2)
    stretch = wide / w
    start = max(round(left + (visible[0] - x) * stretch), left, 0)
    end = min(round(left + (visible[0] + visible[2] - x) * stretch), left + wide, image_width)
    # A sliver may round to nothing, or be stretched out of the picture: keep one column of it.
    start = min(start, left + wide - 1, image_width - 1)
    end = max(end, start + 1)
    return [left, y, wide, h], [start, visible[1], end - start, visible[3]]


def _tight_box(mask):
    """[x, y, w, h] of the True part of a mask; zeros where there is none."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not columns.size:
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
