"""People, and what they carry and ride. Each is drawn on the origin of the canvas's frame."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from hkd_d2.data.streets.canvas import Canvas, bgr, cloth

SKIN = [
    (140, 175, 225),
    (120, 155, 205),
    (95, 130, 180),
    (70, 100, 150),
    (45, 65, 105),
    (35, 45, 75),
]
HAIR = [(20, 20, 25), (30, 40, 60), (45, 70, 105), (110, 160, 195), (160, 160, 165), (35, 55, 120)]

STYLE = {"shade": 0.5, "texture": 0.12}

Joint = tuple[float, float, float]  # lateral, forward, up, in heights of the person


def draw_person(
    canvas: Canvas,
    posture: str = "walking",
    *,
    heading: float | None = None,
    low_contrast: float = 0.0,
    child: bool = False,
    skin: np.ndarray | None = None,
) -> None:
    """Draw a person of height 1.

    Joints are set in body space (lateral, forward, up) and turned by the heading about the vertical
    axis; what is farther from the camera is drawn first.

    Args:
        canvas: its frame stands where the person does.
        posture: "walking", "bending", "riding" or "sitting".
        heading: radians; 0 faces the camera, pi / 2 the right border of the picture; None
            draws one.
        low_contrast: share of the clothes in the colour of what is behind.
        child: proportions of a child.
        skin: BGR of a mannequin; None for a person.
    """
    rng = canvas.rng
    if heading is None:
        heading = rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.3:  # more people are seen from the side than not
            heading = rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.25)
    # The random numbers are drawn in this order: build, clothes, body, then what is painted.
    build = rng.uniform(0.85, 1.3)
    clothes = _dress(canvas, low_contrast, skin)
    _Painter(canvas, clothes, _Body(rng, posture, heading, build, child)).paint()


@dataclass(frozen=True)
class _Clothes:
    """Colours (float BGR) and kinds of what a person wears."""

    top: np.ndarray
    bottom: np.ndarray
    shoes: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    lower: str  # trousers, shorts, skirt or coat
    sleeves: np.ndarray
    pattern: tuple[float, float, bool] | None  # stripes of the top
    mannequin: bool

    @property
    def legs(self) -> np.ndarray:
        return self.skin if self.lower in ("shorts", "skirt") else self.bottom


def _dress(canvas: Canvas, low_contrast: float, skin: np.ndarray | None) -> _Clothes:
    rng = canvas.rng
    behind = canvas.mean_colour(-0.2, 0.0, 0.2, 1.0)

    def garment():
        if behind is not None and rng.random() < low_contrast:
            return np.clip(behind * rng.uniform(0.8, 1.15) + rng.normal(0, 7, 3), 5, 250)
        return cloth(rng)

    top, bottom, shoes = garment(), garment(), bgr(rng.random(), 0.3, rng.uniform(0.05, 0.5))
    mannequin = skin is not None
    skin = np.array(skin if mannequin else SKIN[rng.integers(len(SKIN))], float)
    skin = np.clip(skin * rng.uniform(0.8, 1.15), 0, 255)
    hair = np.array(HAIR[rng.integers(len(HAIR))], float) * rng.uniform(0.7, 1.2)
    lower = rng.choice(["trousers", "shorts", "skirt", "coat"], p=[0.6, 0.1, 0.15, 0.15])
    sleeves = skin if rng.random() < 0.2 else top
    pattern = None
    if rng.random() < 0.25:
        pattern = (rng.uniform(0.03, 0.09), rng.uniform(0.2, 0.6), bool(rng.random() < 0.6))
    return _Clothes(top, bottom, shoes, skin, hair, lower, sleeves, pattern, mannequin)


class _Body:
    """Joints of a person in a posture, and where they are in the canvas's frame."""

    def __init__(
        self,
        rng: np.random.Generator,
        posture: str,
        heading: float,
        build: float,
        child: bool,
    ):
        self.posture, self.build = posture, build
        self.side, self.front = math.sin(heading), math.cos(heading)
        self.head_size = rng.uniform(0.082, 0.092) if child else rng.uniform(0.062, 0.07)
        self.hip_y, self.shoulder_y = (0.44, 0.76) if child else (0.50, 0.815)
        bend = {"bending": rng.uniform(0.8, 1.3), "riding": rng.uniform(0.2, 0.7)}
        self.bend = bend.get(posture, 0.0) + rng.normal(0.03, 0.03)
        self.swing = 0.0 if rng.random() < 0.25 else rng.uniform(0.25, 0.55)
        self.phase = rng.uniform(0, 2 * np.pi)
        self.shoulder, self.hip = 0.105 * build, 0.055 * build
        self.legs = {sign: self._leg(rng, sign) for sign in (-1, 1)}
        self.arms = {sign: self._arm(rng, sign) for sign in (-1, 1)}
        self.drop = min(joints[2][2] for joints in self.legs.values()) - 0.03
        if posture in ("riding", "sitting"):
            self.drop = 0.0
        # The limb on the far side: the lateral axis points away from the camera by -side.
        self.far = -1 if self.side < 0 else 1

    def screen(self, joint: Joint) -> tuple[float, float]:
        """A joint in the canvas's frame."""
        return joint[0] * self.front + joint[1] * self.side, joint[2] - self.drop

    def wide(self, half: float, deep: float) -> float:
        """Half the width that a trunk shows, from that of its front and of its side."""
        return half * abs(self.front) + deep * self.build * abs(self.side)

    def upper(self, lateral: float, forward: float, up: float) -> Joint:
        """A point of the upper body, turned by the bend of the back about the hips."""
        forward, up = forward + 0.0, up - self.hip_y
        return (
            lateral,
            forward * math.cos(self.bend) + up * math.sin(self.bend),
            self.hip_y + up * math.cos(self.bend) - forward * math.sin(self.bend),
        )

    def _leg(self, rng: np.random.Generator, sign: int) -> tuple[Joint, ...]:
        """Hip, knee, ankle and toe."""
        thigh = shin = (self.hip_y - 0.03) / 2
        turn = self.phase + (np.pi if sign > 0 else 0)
        angle = self.swing * math.sin(turn)
        knee_bend = max(0.0, self.swing * 1.2 * math.cos(turn)) + 0.05
        if self.posture == "sitting":
            angle, knee_bend = 1.45 + rng.normal(0, 0.1), 1.5 + rng.normal(0, 0.2)
        elif self.posture == "riding":
            angle, knee_bend = (1.2, 1.3) if sign * math.sin(self.phase) > 0 else (0.45, 0.6)
        spread = self.hip + (0.0 if self.posture != "walking" else rng.uniform(0, 0.02))
        start = (sign * self.hip, 0.0, self.hip_y)
        knee = (sign * spread, thigh * math.sin(angle), self.hip_y - thigh * math.cos(angle))
        low = angle - knee_bend
        ankle = (sign * spread, knee[1] + shin * math.sin(low), knee[2] - shin * math.cos(low))
        toe = (ankle[0], ankle[1] + 0.075, ankle[2] - 0.012)
        return start, knee, ankle, toe

    def _arm(self, rng: np.random.Generator, sign: int) -> tuple[Joint, ...]:
        """Shoulder, elbow and hand."""
        angle = -1.1 * self.swing * math.sin(self.phase + (np.pi if sign > 0 else 0))
        elbow_bend, spread = rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.55)
        if self.posture == "riding":
            angle, elbow_bend = self.bend + 0.6, 0.4
        elif rng.random() < 0.2:  # a telephone, a pocket, crossed arms
            elbow_bend = rng.uniform(1.2, 2.3)
        start = (sign * self.shoulder, 0.0, self.shoulder_y - 0.02)
        reach = 0.165 * math.cos(spread)
        elbow = (
            sign * (self.shoulder + 0.165 * math.sin(spread)),
            reach * math.sin(angle),
            start[2] - reach * math.cos(angle),
        )
        fore = angle + elbow_bend
        hand = (elbow[0], elbow[1] + 0.15 * math.sin(fore), elbow[2] - 0.15 * math.cos(fore))
        return self.upper(*start), self.upper(*elbow), self.upper(*hand)


class _Painter:
    """Paints one person, far limbs first."""

    def __init__(self, canvas: Canvas, clothes: _Clothes, body: _Body):
        self.canvas, self.clothes, self.body = canvas, clothes, body

    def paint(self) -> None:
        far = self.body.far
        self.arm(far)
        self.leg(far)
        self.leg(-far)
        self.trunk()
        self.luggage()
        self.head()
        self.arm(-far)

    def leg(self, sign: int) -> None:
        canvas, clothes, body = self.canvas, self.clothes, self.body
        start, knee, ankle, toe = map(body.screen, body.legs[sign])
        dark = 0.8 if sign == body.far else 1.0
        thick = 0.047 * body.build
        upper_leg = clothes.bottom if clothes.lower != "skirt" else clothes.legs
        canvas.limb(ankle, toe, 0.022, 0.016, clothes.shoes)
        canvas.limb(knee, ankle, thick * 0.75, thick * 0.5, clothes.legs * dark, **STYLE)
        canvas.limb(start, knee, thick * 1.1, thick * 0.8, upper_leg * dark, **STYLE)

    def arm(self, sign: int) -> None:
        canvas, clothes, body = self.canvas, self.clothes, self.body
        start, elbow, hand = map(body.screen, body.arms[sign])
        dark = 0.85 if sign == body.far else 1.0
        thick = 0.034 * body.build
        canvas.limb(elbow, hand, thick * 0.8, thick * 0.55, clothes.sleeves * dark, **STYLE)
        canvas.limb(start, elbow, thick, thick * 0.85, clothes.top * dark, **STYLE)
        canvas.ellipse(*hand, 0.018, 0.02, clothes.skin * dark)

    def trunk(self) -> None:
        rng, clothes, body = self.canvas.rng, self.clothes, self.body
        hip, hip_y, shoulder, shoulder_y = body.hip, body.hip_y, body.shoulder, body.shoulder_y
        wide = body.wide
        levels = [
            (shoulder_y + 0.035, wide(0.04, 0.04)),
            (shoulder_y, wide(shoulder * 1.05, 0.06)),
            (shoulder_y - 0.1, wide(shoulder * 0.98, 0.075)),
            ((shoulder_y + hip_y) / 2 - 0.02, wide(shoulder * 0.82, 0.065)),
            (hip_y - 0.02, wide(hip * 1.75, 0.075)),
        ]
        if clothes.lower == "skirt" and body.posture != "riding":
            hem = rng.uniform(0.2, 0.36)
            flare = rng.uniform(1.0, 1.5)
            skirt = [
                (hip_y + 0.08, wide(hip * 1.5, 0.06)),
                (hip_y, wide(hip * 1.9, 0.08)),
                (hem + body.drop, wide(hip * 2.0, 0.085) * flare),
            ]
            self.canvas.polygon(self._outline(skirt), clothes.bottom, **STYLE)
        if clothes.lower == "coat" and body.posture != "riding":
            levels[-1:] = [
                (hip_y, wide(hip * 1.95, 0.08)),
                (rng.uniform(0.24, 0.4) + body.drop, wide(hip * 2.1, 0.1)),
            ]
        outline = self._outline(levels)
        self.canvas.polygon(outline, clothes.top, stripes=clothes.pattern, **STYLE)

    def _outline(self, levels: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Polygon of the trunk from (height, half width) pairs, downwards."""
        body, left, right = self.body, [], []
        for up, half in levels:
            x, y = body.screen(body.upper(0, 0, up) if up > body.hip_y else (0, 0, up))
            left.append((x - half, y))
            right.append((x + half, y))
        return left + right[::-1]

    def luggage(self) -> None:
        """A backpack or a bag: part of the person, as in the segmentation of real data."""
        canvas, rng, body = self.canvas, self.canvas.rng, self.body
        carried = rng.random()
        if body.posture != "walking" or self.clothes.mannequin:
            return
        if carried < 0.15:  # backpack: behind the shoulders
            x, y = body.screen(body.upper(0, -0.09, body.shoulder_y - 0.12))
            if abs(body.side) > 0.5 or body.front < 0:
                canvas.ellipse(x, y, 0.05 + 0.035 * abs(body.front), 0.11, cloth(rng), **STYLE)
        elif carried < 0.3:  # bag in a hand
            x, y = body.screen(body.arms[-body.far][2])
            size = rng.uniform(0.04, 0.08)
            canvas.rectangle(x - size, y - 2.2 * size, x + size, y, cloth(rng), **STYLE)

    def head(self) -> None:
        canvas, rng, clothes, body = self.canvas, self.canvas.rng, self.clothes, self.body
        size, skin = body.head_size, clothes.skin
        neck = body.screen(body.upper(0, 0.01, body.shoulder_y + 0.01))
        centre = x, y = body.screen(body.upper(0, 0.02, 1 - size))
        canvas.limb(neck, centre, 0.03 * body.build, 0.03 * body.build, skin * 0.85)
        half = size * 0.8
        long_hair = rng.random() < 0.3
        cover = rng.choice(["hair", "hat", "hood", "bald"], p=[0.68, 0.16, 0.1, 0.06])
        crowns = {"hat": cloth(rng), "hood": clothes.top, "bald": skin}
        crown = skin if clothes.mannequin else crowns.get(cover, clothes.hair)
        canvas.ellipse(x, y, half, size, crown, **STYLE)
        if long_hair and cover == "hair" and body.front < 0.3:
            canvas.rectangle(x - half, y - 1.7 * size, x + half * 0.9, y, crown, **STYLE)
        if body.front > -0.45:
            self._face(x, y, half)
        if cover == "hat":
            canvas.ellipse(x, y + size * 0.1, half * 1.1, size * 0.9, crown, end=180)
            brim = rng.uniform(1.1, 1.5)
            canvas.ellipse(x + body.side * 0.02, y + size * 0.15, half * brim, size * 0.18, crown)

    def _face(self, x: float, y: float, half: float) -> None:
        """The face turns with the heading and goes when it looks away."""
        canvas, body, skin = self.canvas, self.body, self.clothes.skin
        shift = body.side * half * 0.35
        canvas.ellipse(
            x + shift,
            y - body.head_size * 0.2,
            half * (0.82 - 0.3 * abs(body.side)),
            body.head_size * 0.78,
            skin,
            **STYLE,
        )
        if canvas.scale > 60 and body.front > 0.1 and not self.clothes.mannequin:
            for eye in (-1, 1):
                place = x + shift + eye * half * 0.35 * body.front
                canvas.ellipse(place, y, 0.008, 0.007, skin * 0.35)


def draw_umbrella(canvas: Canvas) -> None:
    rng = canvas.rng
    colour = cloth(rng)
    x, y, radius = rng.normal(0, 0.04), rng.uniform(1.03, 1.1), rng.uniform(0.25, 0.36)
    canvas.limb((x, y), (x + 0.06, 0.6), 0.006, 0.006, (60, 60, 60))
    canvas.ellipse(
        x, y, radius, radius * 0.55, colour, end=180, shade=0.5, stripes=(0.12, 0.15, False)
    )


def draw_bicycle(canvas: Canvas, heading_side: int) -> None:
    """A bicycle of a rider of height 1, seen from the side."""
    colour = cloth(canvas.rng)
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
