"""Time the miss rate of all ten setups: compiled, in NumPy, and its steps in plain Python.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --detections 10000 --repeats 1

Draws sets like CityPersons' (500 images, 12 annotated boxes an image, 100 detections an image; more
detections are more images) and times from the parsed JSON to the ten results, best of the repeats.
Plain Python, which takes seconds, runs once and on the first set alone. All results are compared
first: the compiled ones with NumPy's to the last bit, curves included, and NumPy's nine misses with
plain Python's.

"memory" is what the process takes at its peak beyond the parsed JSON, results included (Linux).
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.plain_miss_rate import plain_miss_rate  # noqa: E402
from hkd_d2.evaluation.miss_rate import SETUPS, evaluate_miss_rate  # noqa: E402

PER_IMAGE = {"boxes": 12, "detections": 100}
ASPECT = 0.41  # width over height of CityPersons' boxes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--detections",
        nargs="+",
        type=int,
        default=[50_000, 200_000, 1_000_000],
        metavar="N",
        help="sizes of the sets (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def draw_set(num_detections: int, seed: int):
    """Ground truth and detections as json.load gives them."""
    random = np.random.default_rng(seed)
    num_images = -(-num_detections // PER_IMAGE["detections"])
    num_boxes = num_images * PER_IMAGE["boxes"]
    image = np.sort(random.integers(1, num_images + 1, num_boxes))
    # Heights like those of CityPersons' val: median 91, 5 and 95 percent at 30 and 300.
    height = np.exp(random.normal(np.log(91), 0.7, num_boxes)).round()
    corner = random.uniform((0, 300), (2000, 700), (num_boxes, 2)).round()
    box = np.column_stack([corner, (ASPECT * height).round(), height])
    visible = random.uniform(0, 1, num_boxes) ** 0.3
    ignore = random.random(num_boxes) < 0.45
    ground_truth = {
        "images": [{"id": number} for number in range(1, num_images + 1)],
        "categories": [{"id": 1, "name": "pedestrian"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "bbox": bbox,
                "height": bbox[3],
                "vis_ratio": vis_ratio,
                "ignore": ignored,
            }
            for number, (image_id, bbox, vis_ratio, ignored) in enumerate(
                zip(
                    image.tolist(),
                    box.tolist(),
                    visible.tolist(),
                    ignore.astype(int).tolist(),
                    strict=True,
                ),
                1,
            )
        ],
    }
    # A third lies about a box, the more so the higher its score; the rest lies anywhere.
    about = random.integers(0, num_boxes, num_detections)
    near = random.random(num_detections) < 1 / 3
    score = np.where(near, random.beta(2, 1, num_detections), random.beta(1, 4, num_detections))
    jitter = random.normal(0, 0.15, (num_detections, 4)) * (1.1 - score[:, None])
    found = box[about] + jitter * box[about][:, [2, 3, 2, 3]]
    found[:, 2:] = found[:, 2:].clip(1)
    elsewhere = random.uniform((0, 300), (2000, 700), (num_detections, 2))
    found[:, :2] = np.where(near[:, None], found[:, :2], elsewhere)
    image_ids = np.where(near, image[about], random.integers(1, num_images + 1, num_detections))
    order = np.argsort(image_ids)  # a detector writes image after image
    image_ids, found, score = image_ids[order], found[order], score[order]
    detections = [
        {"image_id": image_id, "category_id": 1, "bbox": bbox, "score": confidence}
        for image_id, bbox, confidence in zip(
            image_ids.tolist(), found.tolist(), score.tolist(), strict=True
        )
    ]
    return ground_truth, detections


def plain_steps(ground_truth, detections):
    return {
        name: plain_miss_rate(ground_truth, detections, setup) for name, setup in SETUPS.items()
    }


def check_equal(compiled, reference, plain):
    for name, expected in reference.items():
        for field in ("scores", "fppi", "miss", "reference_miss"):
            ours, theirs = getattr(compiled[name], field), getattr(expected, field)
            if ours.tobytes() != theirs.tobytes():
                sys.exit(f"{field} of setup {name} differs between compiled and reference.")
        if compiled[name].miss_rate != expected.miss_rate:
            sys.exit(f"The miss rate of setup {name} differs between compiled and reference.")
        if plain and plain[name] != expected.reference_miss.tolist():
            sys.exit(f"The misses of setup {name} differ between reference and plain Python.")


def memory(key: str) -> float:
    """VmRSS or VmHWM, the peak, of this process in MiB; NaN where there is no /proc."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def peak_memory(run) -> float:
    """MiB that a call takes at its peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return float("nan")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def timed(run) -> tuple[float, dict]:
    start = time.perf_counter()
    results = run()
    return time.perf_counter() - start, results


def main(argv=None):
    args = parse_args(argv)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}; "
        f"best of {args.repeats}, plain Python once\n"
    )
    print(
        f"{'detections':>11} {'images':>7}  {'compiled ms':>10} {'reference ms':>13} "
        f"{'plain ms':>9} {'reference/compiled':>17} {'plain/compiled':>13} {'memory MiB':>11}"
    )
    for number, size in enumerate(args.detections):
        rows = draw_set(size, args.seed)

        def compiled(rows=rows):
            return evaluate_miss_rate(*rows, impl="compiled")

        def reference(rows=rows):
            return evaluate_miss_rate(*rows, impl="reference")

        peak = peak_memory(compiled)
        seconds = plain = None
        if number == 0:
            seconds, plain = timed(lambda rows=rows: plain_steps(*rows))
        check_equal(compiled(), reference(), plain)
        ours = min(timed(compiled)[0] for _ in range(args.repeats))
        numpy = min(timed(reference)[0] for _ in range(args.repeats))
        columns = ("-", "-")
        if seconds is not None:
            columns = (f"{1e3 * seconds:.0f}", f"{seconds / ours:.0f}")
        print(
            f"{size:>11,} {len(rows[0]['images']):>7,}  {1e3 * ours:>10.1f} {1e3 * numpy:>13.0f} "
            f"{columns[0]:>9} {numpy / ours:>17.1f} {columns[1]:>13} {peak:>11.0f}"
        )


if __name__ == "__main__":
    main()
