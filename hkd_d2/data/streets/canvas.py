"""The supersampled canvas that streets are painted on, and its colours."""

import math

import cv2
import numpy as np

SUPERSAMPLING = 3  # odd, so that pixels have a centre
MARGIN = 72  # pixels around a picture 192 high, for the parts of people outside the image


def bgr(hue, saturation, value):
    """Colour from hue, saturation and value in 0..1, as float BGR in 0..255."""
    k = (np.array([1.0, 3.0, 5.0]) + hue * 6) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def cloth(rng):
    """A colour of clothes: mostly dark or grey, some of them bright."""
    kind = rng.random()
    if kind < 0.45:
        return bgr(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.06, 0.35))
    if kind < 0.8:
        return bgr(rng.random(), rng.uniform(0.1, 0.55), rng.uniform(0.3, 0.7))
    return bgr(rng.random(), rng.uniform(0, 0.9), rng.uniform(0.6, 0.95))


class Canvas:
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
