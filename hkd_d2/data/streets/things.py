"""Things of a street. Each is drawn in metres on the origin of the canvas's frame."""

import math

import numpy as np

from hkd_d2.data.streets.canvas import Canvas, bgr, cloth


def draw_car(canvas: Canvas, view: str | None = None) -> None:
    rng = canvas.rng
    colour = bgr(rng.random(), rng.choice([0.05, 0.6], p=[0.65, 0.35]), rng.uniform(0.1, 0.9))
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


def draw_tree(canvas: Canvas, tall: bool = True) -> None:
    rng = canvas.rng
    bark = np.array((45, 62, 80)) * rng.uniform(0.6, 1.2)
    leaf = bgr(rng.uniform(0.13, 0.36), rng.uniform(0.3, 0.65), rng.uniform(0.2, 0.5))
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


def draw_pole(canvas: Canvas) -> None:
    """A lamp post, a road sign, a traffic light or a parking meter."""
    rng = canvas.rng
    grey = bgr(rng.random(), 0.1, rng.uniform(0.12, 0.6))
    kind = rng.integers(4)
    if kind == 0:
        canvas.limb((0, 0), (0, 5.5), 0.1, 0.06, grey, shade=0.5)
        canvas.limb((0, 5.5), (rng.choice([-1, 1]) * 1.3, 5.7), 0.05, 0.05, grey)
    elif kind == 1:
        canvas.limb((0, 0), (0, 2.4), 0.04, 0.04, grey)
        shape, size = rng.integers(3), rng.uniform(0.25, 0.4)
        fill = bgr(rng.choice([0.0, 0.6, 0.15]), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9))
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


def draw_bollard(canvas: Canvas) -> None:
    rng = canvas.rng
    colour = bgr(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.1, 0.7))
    high, width = rng.uniform(0.7, 1.2), rng.uniform(0.07, 0.15)
    canvas.limb((0, 0), (0, high), width, width, colour, shade=0.5, texture=0.1)
    canvas.rectangle(
        -width, high * 0.75, width, high * 0.85, (60, 60, 200) if rng.random() < 0.5 else (230,) * 3
    )


def draw_post_box(canvas: Canvas) -> None:
    """A post box, a hydrant's or a switch box: a body with a head."""
    rng = canvas.rng
    colour = bgr(rng.choice([0.0, 0.15, 0.6, 0.4]), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.7))
    high, half = rng.uniform(1.2, 1.75), rng.uniform(0.2, 0.32)
    canvas.rectangle(-half, 0.0, half, high - half * 0.5, colour, shade=0.5, texture=0.1)
    canvas.ellipse(0, high - half * 0.5, half * 1.1, half * 0.5, colour * 0.8, shade=0.4)
    canvas.rectangle(-half * 0.6, high * 0.7, half * 0.6, high * 0.76, colour * 0.4)
    canvas.rectangle(-half, 0.0, half, 0.15, colour * 0.5)


def draw_parasol(canvas: Canvas) -> None:
    """A closed parasol: as tall and as slim as a person in a coat."""
    rng = canvas.rng
    fabric = cloth(rng)
    canvas.limb((0, 0), (0, 2.1), 0.03, 0.03, (110, 120, 130))
    canvas.rectangle(-0.22, 0, 0.22, 0.09, (70, 70, 70))
    canvas.polygon(
        [(-0.05, 2.05), (-0.14, 1.7), (-0.24, 0.75), (0.24, 0.75), (0.14, 1.7), (0.05, 2.05)],
        fabric,
        shade=0.6,
        texture=0.15,
        stripes=(0.16, 0.15, False),
    )
    if rng.random() < 0.5:
        canvas.rectangle(-0.16, 1.4, 0.16, 1.47, fabric * 0.5)


def draw_dummy(canvas: Canvas) -> None:
    """A tailor's dummy or a coat on a stand: a trunk without head and legs."""
    rng = canvas.rng
    fabric = cloth(rng)
    canvas.limb((0, 0), (0, 1.65), 0.025, 0.025, (60, 70, 80))
    canvas.limb((-0.2, 0.02), (0.2, 0.02), 0.03, 0.03, (60, 70, 80))
    wide, low = rng.uniform(0.2, 0.26), rng.uniform(0.5, 0.85)
    trunk = [(0.05, 1.5), (wide, 1.42), (wide * 0.85, 1.1), (wide * 1.05, low)]
    canvas.polygon(trunk + [(-x, y) for x, y in trunk[::-1]], fabric, shade=0.5, texture=0.12)
    if rng.random() < 0.5:
        for s in (-1, 1):
            canvas.limb(
                (s * wide, 1.4), (s * wide * 1.3, 0.85), 0.06, 0.045, fabric * 0.9, shade=0.4
            )


def draw_topiary(canvas: Canvas) -> None:
    """A clipped shrub or a young tree: a ball on a trunk, sometimes above a second one."""
    rng = canvas.rng
    leaf = bgr(rng.uniform(0.15, 0.38), rng.uniform(0.3, 0.6), rng.uniform(0.15, 0.45))
    style = {"shade": 0.5, "texture": 0.4}
    canvas.limb((0, 0), (0, 1.4), 0.04, 0.04, (50, 65, 85))
    if rng.random() < 0.4:  # a column
        canvas.ellipse(0, 0.95, rng.uniform(0.22, 0.34), 0.9, leaf, **style)
    else:
        canvas.ellipse(0, 0.75, 0.3, rng.uniform(0.3, 0.5), leaf, **style)
        canvas.ellipse(0, 1.45, 0.2, 0.2, leaf * 1.1, **style)
    canvas.polygon([(-0.2, 0), (0.2, 0), (0.25, 0.35), (-0.25, 0.35)], (70, 90, 130), shade=0.4)


def draw_board(canvas: Canvas) -> None:
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
    canvas.polygon(inner, cloth(rng), stripes=(0.12, 0.3, True))


def draw_bin(canvas: Canvas) -> None:
    rng = canvas.rng
    colour = bgr(rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.6), rng.uniform(0.12, 0.45))
    half, high = rng.uniform(0.25, 0.4), rng.uniform(0.9, 1.2)
    canvas.polygon(
        [(-half * 0.85, 0.05), (half * 0.85, 0.05), (half, high), (-half, high)],
        colour,
        shade=0.4,
        texture=0.08,
    )
    canvas.rectangle(-half * 1.1, high, half * 1.1, high + 0.09, colour * 0.7)


def draw_hedge(canvas: Canvas) -> None:
    rng = canvas.rng
    leaf = bgr(rng.uniform(0.15, 0.36), rng.uniform(0.3, 0.6), rng.uniform(0.18, 0.42))
    half, high = rng.uniform(0.5, 1.4), rng.uniform(0.5, 1.05)
    for _ in range(12):
        x = rng.uniform(-half, half)
        size = rng.uniform(0.25, 0.4)
        canvas.ellipse(
            x, rng.uniform(0.2, high - 0.2), size, size, leaf * rng.uniform(0.7, 1.2), texture=0.4
        )
    canvas.rectangle(-half, 0, half, high * 0.5, leaf * 0.75, texture=0.4)


def draw_fence(canvas: Canvas) -> None:
    rng = canvas.rng
    colour = bgr(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.1, 0.8))
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
    draw_pole,
    draw_bollard,
    draw_post_box,
    draw_parasol,
    draw_dummy,
    draw_topiary,
    draw_board,
    draw_bin,
)
# What hides people: with the half width in metres within which its middle may lie.
OCCLUDERS = (
    (draw_car, 1.1),
    (draw_car, 1.1),
    (draw_hedge, 0.8),
    (draw_fence, 0.8),
    (draw_bin, 0.35),
    (draw_board, 0.35),
    (draw_post_box, 0.35),
    (draw_topiary, 0.35),
    (draw_pole, 0.1),
)
