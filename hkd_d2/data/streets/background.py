"""The background of a scene: sky, ground, what closes the street, houses and parks beside it."""

import itertools
import math

import numpy as np

from hkd_d2.data.streets.canvas import bgr, cloth
from hkd_d2.data.streets.scene import NEAR, Scene
from hkd_d2.data.streets.things import draw_tree


class Background(Scene):
    """A scene with its background.

    Attributes:
        middle, half_road, left, right: of the road and the pavements beside it, metres.
        stalls: (x, z) of mannequins in shop windows.
    """

    def draw_background(self):
        rng, canvas = self.rng, self.canvas
        sky = {
            "overcast": bgr(0.6, 0.05, rng.uniform(0.65, 0.9)),
            "sun": bgr(0.58, rng.uniform(0.2, 0.5), 0.95),
            "dusk": bgr(rng.choice([0.62, 0.05]), 0.35, rng.uniform(0.25, 0.5)),
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
        ground = bgr(rng.uniform(0.05, 0.12), rng.uniform(0.02, 0.2), rng.uniform(0.38, 0.62))
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
            asphalt = bgr(0.6, 0.04, rng.uniform(0.2, 0.45))
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
                leaf = bgr(rng.uniform(0.15, 0.35), 0.4, rng.uniform(0.2, 0.45))
                angle = np.linspace(0, np.pi, 9)
                tops = [
                    (x + wide / 2 + wide / 2 * math.cos(a), 0.4 * high * math.sin(a), z)
                    for a in angle
                ]
                self.surface([*tops, (x, 0, z), (x + wide, 0, z)], leaf, texture=0.3)
            else:
                wall = bgr(rng.uniform(0, 0.15), rng.uniform(0, 0.4), rng.uniform(0.3, 0.75))
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

    def draw_facades(self, sign: int) -> None:
        """Houses along one side, from far to near."""
        rng = self.rng
        x = self.left if sign < 0 else self.right
        edges = [rng.uniform(1.5, 2.5)]
        while edges[-1] < 55:
            edges.append(edges[-1] + rng.uniform(4, 11))
        for z0, z1 in reversed(list(itertools.pairwise(edges))):
            high = rng.uniform(6, 15)
            wall = bgr(rng.uniform(0, 0.15), rng.uniform(0.02, 0.5), rng.uniform(0.3, 0.85))
            wall = wall * (1.12 if sign * self.canvas.light < 0 else 0.85)
            self.panel(x, z0, z1, 0, high, wall, texture=0.1)
            self.panel(x, z0, z1, 0, rng.uniform(0.3, 0.8), wall * 0.75)
            self.panel(x, z0, z1, high - 0.4, high, wall * 0.8)
            glass = np.array([90.0, 75, 65]) * rng.uniform(0.5, 1.6)
            self.draw_windows(x, z0, z1, high, wall, glass)
            if rng.random() < 0.55:
                self.draw_shop(x, z0, z1, sign, glass)
            else:
                self.draw_doors(x, z0, z1, glass)

    def panel(self, x, z0, z1, y0, y1, colour, **style) -> None:
        """A rectangle of a wall along the street, in metres."""
        self.surface([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], colour, **style)

    def draw_windows(self, x, z0, z1, high, wall, glass) -> None:
        rng = self.rng
        step = rng.uniform(1.7, 2.6)
        for y in np.arange(3.6, high - 1.6, 3.0):
            for z in np.arange(z0 + 0.6, z1 - 1.2, step):
                pane = glass * rng.uniform(0.7, 1.3)
                if self.weather == "dusk" and rng.random() < 0.25:
                    pane = np.array([120.0, 190, 235])
                self.panel(x, z - 0.1, z + 1.2, y - 0.12, y + 1.62, wall * 1.15)
                self.panel(x, z, z + 1.1, y, y + 1.5, pane)

    def draw_shop(self, x, z0, z1, sign, glass) -> None:
        rng = self.rng
        self.panel(x, z0 + 0.4, z1 - 0.4, 0.5, 2.7, glass * 0.8, texture=0.35)
        self.panel(x, z0 + 0.3, z1 - 0.3, 2.7, 3.3, cloth(rng), texture=0.05)
        if rng.random() < 0.5:
            self.stalls += [(x, rng.uniform(z0 + 0.6, z1 - 0.6)) for _ in range(2)]
        if rng.random() < 0.5:  # an awning
            out, near, far = x - sign * 1.2, z0 + 0.3, z1 - 0.3
            self.surface(
                [(x, 3.1, near), (x, 3.1, far), (out, 2.5, far), (out, 2.5, near)], cloth(rng)
            )

    def draw_doors(self, x, z0, z1, glass) -> None:
        """Doors, as tall as people."""
        rng = self.rng
        for z in np.arange(z0 + 0.8, z1 - 1.2, 3.0):
            door = cloth(rng) if rng.random() < 0.5 else glass
            top = 2.1 if rng.random() < 0.5 else 2.4
            self.panel(x, z, z + 1.0, 0.0 if rng.random() < 0.6 else 0.9, top, door, texture=0.15)

    def draw_park(self, sign):
        rng = self.rng
        x = self.left if sign < 0 else self.right
        grass = bgr(rng.uniform(0.2, 0.33), rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.5))
        self.strip(*sorted((x, x + sign * 80)), grass, texture=0.25)
        for z in np.sort(rng.uniform(5, 45, rng.integers(5, 12)))[::-1]:
            draw_tree(self.stand(x + sign * rng.uniform(1, 12), z), tall=rng.random() < 0.7)
        if rng.random() < 0.4:
            for z in np.arange(30, 3, -1.2):
                self.stand(x, z).rectangle(-0.05, 0, 0.05, 1.0, (60, 65, 70))
