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
            ignored = bool(row.get("ignore") or row.get("iscrowd")) or not inside
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


def plain_protocol_miss_rate(ground_truth, detections, setup, rules):
    """The same under any rules (:class:`hkd_d2.evaluation.Protocol`)."""
    images = {image["id"]: image for image in ground_truth["images"]}
    people = {image_id: [] for image_id in images}
    found = {image_id: [] for image_id in images}
    for row in detections:
        if row["category_id"] == 1:
            found[row["image_id"]].append(row)
    countable = 0
    for row in ground_truth["annotations"]:
        if row["category_id"] != 1 or (rules.labels and row["label"] not in rules.labels):
            continue
        box, height = row["bbox"], row["height"]
        if rules.clip_to_image:
            box = plain_cut(box, images[row["image_id"]])
            height = box[3]
        ignored = bool(row["ignore"] or row.get("iscrowd"))
        x, y, w, h = box
        if rules.border:
            left, top, right, bottom = rules.border
            horizontal = left <= x <= right and left <= x + w <= right
            ignored |= not (horizontal and top <= y <= bottom and top <= y + h <= bottom)
        visibility = rules.full_visibility if row["vis_ratio"] == 1 else row["vis_ratio"]
        for quantity, value, bounds in (
            ("height", height, setup.height),
            ("visibility", visibility, setup.visibility),
            ("occlusion", row["occlusion"], setup.occlusion),
            ("truncation", row["truncation"], setup.truncation),
        ):
            if bounds is not None:
                ignored |= value < bounds[0] or value > bounds[1]
                ignored |= value == bounds[1] and quantity in rules.half_open
        if rules.skip_undetected and not found[row["image_id"]]:
            continue
        if rules.aspect_ratio and not ignored:
            box = plain_resize(box, rules.aspect_ratio)
        by_area = rules.ignored_overlap == "detection" or row["iscrowd"]
        unmatched = rules.id_zero_is_unmatched and row["id"] == 0
        people[row["image_id"]].append((box, ignored, by_area, unmatched))
        countable += not ignored
    events = []
    for image_id in sorted(images):
        taken = set()
        ranked = sorted(found[image_id], key=lambda d: -d["score"])
        for detection in ranked[: rules.max_detections]:
            box = detection["bbox"]
            if rules.clip_to_image:
                box = plain_cut(box, images[image_id])
            if rules.resize_detections:
                box = plain_resize(box, rules.aspect_ratio)
            x, y, w, h = box
            if rules.height_slack:
                lowest = setup.height[0] / rules.height_slack
                if h < lowest or (h == lowest and rules.lowest_is_dropped):
                    continue
                if h >= setup.height[1] * rules.height_slack:
                    continue
            best, best_overlap, absorbed = None, 0.5, False
            for number, (person, ignored, by_area, _) in enumerate(people[image_id]):
                gx, gy, gw, gh = person
                across = min(x + w, gx + gw) - max(x, gx)
                down = min(y + h, gy + gh) - max(y, gy)
                if across <= 0 or down <= 0:
                    continue
                common = across * down
                union = w * h + gw * gh - common
                if ignored:
                    absorbed = absorbed or common / (w * h if by_area else union) >= 0.5
                elif number not in taken and common / union >= best_overlap:
                    best, best_overlap = number, common / union
            if best is not None:
                taken.add(best)
                events.append((detection["score"], not people[image_id][best][3]))
            elif not absorbed:
                events.append((detection["score"], False))
    if not countable:
        return None
    events.sort(key=lambda event: -event[0])
    curve, hits = [], 0  # (FPPI, recall)
    for count, (_, hit) in enumerate(events, 1):
        hits += hit
        curve.append(((count - hits) / len(images), hits / countable))
    misses = []
    for reference in rules.reference_fppi:
        reached = [recall for fppi, recall in curve if fppi <= reference]
        missing = curve[-1][1] if curve and rules.missing_point == "official" else 0
        misses.append(1 - (reached[-1] if reached else missing))
    return misses


def plain_cut(box, image):
    """A box cut at the edges of its image; one inside is returned as it is."""
    x, y, w, h = box
    if x < 0 or x + w > image["width"]:
        x, w = max(x, 0), max(min(x + w, image["width"]) - max(x, 0), 0)
    if y < 0 or y + h > image["height"]:
        y, h = max(y, 0), max(min(y + h, image["height"]) - max(y, 0), 0)
    return x, y, w, h


def plain_resize(box, aspect_ratio):
    """A box of that width over height about its centre."""
    x, y, w, h = box
    wider = h * aspect_ratio - w
    return x - wider / 2, y, w + wider, h
