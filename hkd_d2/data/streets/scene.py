"""The frame of a scene: camera, weather, light, and painting in metres."""

import itertools
import math

import numpy as np

from hkd_d2.data.streets.canvas import Canvas

NEAR, FAR = 1.6, 400.0  # metres: the ground that is painted


class Scene:
    """Camera, weather and light of one street, and its canvas."""

    def __init__(self, rng, height, width, difficulty):
        self.rng, self.height, self.width, self.difficulty = rng, height, width, difficulty
        self.unit = height / 192  # the lengths of Difficulty refer to 192 pixels
        self.canvas = Canvas(rng, height, width)
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
