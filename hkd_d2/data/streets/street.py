"""A street: what stands in a scene, the finished picture and its annotations."""

import contextlib
import functools
import math

import cv2
import numpy as np

from hkd_d2.data.streets.background import Background
from hkd_d2.data.streets.boxes import aligned, tight_box
from hkd_d2.data.streets.canvas import bgr, cloth
from hkd_d2.data.streets.people import draw_bicycle, draw_person, draw_umbrella
from hkd_d2.data.streets.things import CLUTTER, OCCLUDERS, draw_car, draw_tree

MIN_VISIBLE = 0.10  # share of a person's pixels; who shows less becomes an ignore region


class Street(Background):
    """One street with its people and things, and the finished picture."""

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
            draw = functools.partial(draw_car, view="end" if rng.random() < 0.8 else "side")
            things.append((z, functools.partial(self.draw_thing, draw, self.middle + side, z)))
        for _ in range(rng.poisson(1.2)):
            z = rng.uniform(7, 40)
            x = self.left + 0.8 if rng.random() < 0.5 else self.right - 0.8
            things.append((z, functools.partial(self.draw_thing, draw_tree, x, z)))
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
            draw_bicycle(canvas, side)
            canvas.y -= 0.12 * canvas.scale
        elif posture == "sitting":
            wood = cloth(rng)
            canvas.rectangle(-0.45, 0.2, 0.45, 0.27, wood)
            canvas.rectangle(-0.45, 0.3, 0.45, 0.5, wood * 0.85)
            for leg in (-0.4, 0.36):
                canvas.rectangle(leg, 0, leg + 0.04, 0.22, wood * 0.6)
            canvas.y += 0.22 * canvas.scale
            heading = rng.normal(0, 0.6)
        with self.painting(label):
            draw_person(
                canvas,
                posture,
                heading=heading,
                low_contrast=self.difficulty.low_contrast,
                child=child,
            )
        if posture == "walking" and rng.random() < 0.06:
            canvas.id = 0
            draw_umbrella(canvas)

    def draw_group(self, x, z):
        """A crowd far away that is annotated as one region."""
        rng = self.rng
        with self.painting("person group") as owner:
            for _ in range(rng.integers(6, 14)):
                across, depth = x + rng.normal(0, 0.9), z + abs(rng.normal(0, 0.4))
                self.stand(across, depth, unit=rng.uniform(1.5, 1.85), owner=owner)
                draw_person(self.canvas, low_contrast=self.difficulty.low_contrast)

    def draw_mannequin(self, x, z):
        """A mannequin in a shop window."""
        canvas = self.stand(x - 0.3 * np.sign(x - self.middle), z, unit=1.75)
        canvas.y -= 0.3 * canvas.scale
        with self.painting("ignore"):
            draw_person(
                canvas, skin=bgr(0.08, self.rng.uniform(0, 0.2), self.rng.uniform(0.5, 0.9))
            )

    def draw_poster(self, x, z):
        """A pillar with the picture of a person."""
        rng = self.rng
        canvas = self.stand(x, z)
        wide, high = rng.uniform(0.6, 0.9), rng.uniform(2.2, 2.7)
        canvas.rectangle(-wide, 0, wide, high, (85, 85, 85), shade=0.3)
        canvas.rectangle(
            -wide * 0.9, 0.4, wide * 0.9, high - 0.1, cloth(rng) * 0.6 + 80, texture=0.1
        )
        canvas.y -= 0.5 * canvas.scale
        canvas.scale *= rng.uniform(1.3, 1.7)
        with self.painting("ignore"):
            draw_person(canvas)

    @contextlib.contextmanager
    def painting(self, label):
        """What is painted within belongs to one new owner, whose full box and pixels are noted."""
        canvas = self.canvas
        owner = canvas.id = len(self.people) + 1
        yield owner
        mask = canvas.owners() == owner
        x, y, w, h = tight_box(mask)
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
            visible = tight_box(seen)
            if seen.sum() < MIN_VISIBLE * painted:
                label = "ignore"
            if label in ("ignore", "person group"):  # a region seen, without a hidden part
                full = visible
            elif label == "pedestrian":
                full, visible = aligned(full, visible, self.width)
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
