"""CrowdHuman's AP, MR^-2 and JI in plain Python, with none of the package's code."""

import math
from itertools import pairwise


def plain_crowdhuman(ground_truth, detections, matching="weight"):
    """AP, MR^-2 and JI, 0 to 1, or None where nobody is countable; small sets alone."""
    images = {image["id"]: (image, [], [], []) for image in ground_truth["images"]}
    for row in ground_truth["annotations"]:
        image, people, ignored, _ = images[row["image_id"]]
        (ignored if row.get("ignore") or row.get("iscrowd") else people).append(
            cut(row["bbox"], image)
        )
    for row in detections:
        image, _, _, found = images[row["image_id"]]
        found.append((row["score"], cut(row["bbox"], image)))
    total = sum(len(people) for _, people, _, _ in images.values())
    if not total:
        return None
    events = []
    for _, people, ignored, found in images.values():
        found.sort(key=lambda entry: -entry[0])
        taken = set()
        for score, box in found:
            best, highest = None, 0.5
            for number, person in enumerate(people):
                if number not in taken and over_union(box, person) > highest:
                    best, highest = number, over_union(box, person)
            if best is not None:
                taken.add(best)
                events.append((score, True))
            elif not any(over_own(box, region) > 0.5 for region in ignored):
                events.append((score, False))
    events.sort(key=lambda event: -event[0])
    points, hits = [], 0  # (recall, precision, FPPI)
    for count, (_, hit) in enumerate(events, 1):
        hits += hit
        points.append((hits / total, hits / count, (count - hits) / len(images)))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    logs = []
    for reference in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        reached = [point for point in points if point[2] >= reference] or points[-1:]
        miss = 1 - reached[0][0] if reached else 1
        logs.append(math.log(miss) if miss else -math.inf)
    indices = []
    for step in range(10):
        values = [index(entry, 0.1 * step, matching) for entry in images.values()]
        values = [value for value in values if value is not None]
        indices.append(sum(values) / len(values) if values else 0)
    return area, math.exp(sum(logs) / 9), max(indices)


def index(entry, threshold, matching):
    """The Jaccard index of an image; None where nothing counts."""
    _, people, ignored, found = entry
    boxes = [box for score, box in found if score > threshold]
    pairs = best_pairs(boxes, people, matching)
    rows, columns = {row for row, _ in pairs}, {column for _, column in pairs}
    free_boxes = [box for number, box in enumerate(boxes) if number not in rows]
    free_people = [person for number, person in enumerate(people) if number not in columns]
    n = len(boxes) - sum(any(over_own(b, g) > 0.5 for g in ignored) for b in free_boxes)
    m = len(people) - sum(any(over_own(b, g) > 0.5 for g in ignored) for b in free_people)
    return len(pairs) / (m + n - len(pairs) + 1e-6) if m or n else None


def best_pairs(boxes, people, matching, row=0, taken=frozenset()):
    """All one-to-one matchings are tried, the best is returned."""
    if row == len(boxes):
        return []
    choices = [best_pairs(boxes, people, matching, row + 1, taken)]
    for column, person in enumerate(people):
        if column not in taken and over_union(boxes[row], person) > 0.5:
            rest = best_pairs(boxes, people, matching, row + 1, taken | {column})
            choices.append([(row, column), *rest])

    def worth(pairs):
        return sum(over_union(boxes[r], people[c]) if matching == "weight" else 1 for r, c in pairs)

    return max(choices, key=worth)


def cut(box, image):
    x, y, w, h = box
    width, height = image["width"], image["height"]
    return (
        min(max(x, 0), width - 1),
        min(max(y, 0), height - 1),
        max(min(x + w, width), 0),
        max(min(y + h, height), 0),
    )


def common(a, b):
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return max(across, 0) * max(down, 0)


def area_of(a):
    return (a[2] - a[0]) * (a[3] - a[1])


def over_union(a, b):
    return common(a, b) / (area_of(a) + area_of(b) - common(a, b) + 1e-6)


def over_own(a, b):
    return common(a, b) / (area_of(a) + 1e-6)
