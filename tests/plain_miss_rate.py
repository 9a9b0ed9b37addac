"""The steps of the miss rate in plain Python, pair by pair, with none of the package's code."""


def plain_miss_rate(ground_truth, detections, setup, missing_point="official"):
    """Evaluate one setup; rows as in :func:`hkd_d2.evaluation.evaluate_miss_rate`.

    Returns the nine misses, or None where nothing is countable.
    """
    images = {image["id"]: ([], []) for image in ground_truth["images"]}
    countable = 0
    for row in ground_truth["annotations"]:
        if row["category_id"] == 1:
            inside = (
                setup.height[0] <= row["height"] <= setup.height[1]
                and setup.visibility[0] <= row["vis_ratio"] <= setup.visibility[1]
            )
            ignored = bool(row.get("ignore", 0)) or not inside
            images[row["image_id"]][0].append((row["bbox"], ignored))
            countable += not ignored
    for row in detections:
        if row["category_id"] == 1:
            images[row["image_id"]][1].append(row)
    events = []  # (score, is a true positive), images in id order
    for _, (people, found) in sorted(images.items()):
        taken = set()
        for detection in sorted(found, key=lambda d: -d["score"])[:1000]:
            x, y, w, h = detection["bbox"]
            if h < setup.height[0] / 1.25 or h >= setup.height[1] * 1.25:
                continue
            best, best_overlap, absorbed = None, 0.5, False
            for number, ((gx, gy, gw, gh), ignored) in enumerate(people):
                across = min(x + w, gx + gw) - max(x, gx)
                down = min(y + h, gy + gh) - max(y, gy)
                if across <= 0 or down <= 0:
                    continue
                common = across * down
                if ignored:
                    absorbed = absorbed or common / (w * h) >= 0.5
                elif number not in taken and common / (w * h + gw * gh - common) >= best_overlap:
                    best, best_overlap = number, common / (w * h + gw * gh - common)
            if best is not None:
                taken.add(best)
                events.append((detection["score"], True))
            elif not absorbed:
                events.append((detection["score"], False))
    if not countable:
        return None
    events.sort(key=lambda event: -event[0])
    recalls, fppis, hits = [], [], 0
    for count, (_, hit) in enumerate(events, 1):
        hits += hit
        recalls.append(hits / countable)
        fppis.append((count - hits) / len(images))
    misses = []
    for reference in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        reached = [r for r, fppi in zip(recalls, fppis, strict=True) if fppi <= reference]
        if reached:
            recall = reached[-1]
        else:
            recall = recalls[-1] if recalls and missing_point == "official" else 0
        misses.append(1 - recall)
    return misses
