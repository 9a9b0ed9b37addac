"""Requests run together, in bounds; one that fails spoils no other."""

import asyncio
import threading
import time

import numpy as np
import pytest

from helpers.red_detector import RedDetector, street
from helpers.rules import rule
from hkd_d2.serve.batching import Batcher, Overloaded

pytestmark = rule("The service refuses rather than queues, and answers what it admitted")


class Slow(RedDetector):
    """Waits for ``go`` in every call, and refuses images of one pixel; ``calls`` are the sizes."""

    def __init__(self):
        super().__init__()
        self.go, self.calls = threading.Event(), []

    def detect(self, images):
        self.calls.append(len(images))
        assert self.go.wait(10)
        if any(image.size == 3 for image in images):
            raise ValueError("too narrow")
        return super().detect(images)


def serve(main, **options):
    detector = Slow()
    options = {"max_batch": 4, "max_delay": 0.02, "max_queue": 6, "max_wait": 5, **options}

    async def run():
        batcher = Batcher(detector, **options)
        batcher.start()
        try:
            return await asyncio.wait_for(main(batcher, detector), 10)
        finally:
            detector.go.set()
            await batcher.close()

    return asyncio.run(run())


async def busy(batcher, detector):
    """A first image, which keeps the detector busy until ``go``."""
    first = asyncio.create_task(batcher.detect(street(x=1)))
    while not detector.calls:
        await asyncio.sleep(0.001)
    return first


def test_what_waits_runs_together_and_each_has_its_own_answer():
    async def main(batcher, detector):
        tasks = [await busy(batcher, detector)]
        tasks += [asyncio.create_task(batcher.detect(street(x=x))) for x in range(10, 16)]
        await asyncio.sleep(0.01)
        detector.go.set()
        found = await asyncio.gather(*tasks)
        assert [f.boxes[0, 0] for f in found] == [1, *range(10, 16)]
        assert detector.calls == [1, 4, 2]

    serve(main)


def test_a_lonely_image_waits_no_longer_than_the_bound():
    async def main(batcher, detector):
        detector.go.set()
        start = time.monotonic()
        await batcher.detect(street())
        return time.monotonic() - start

    assert 0.2 <= serve(main, max_delay=0.2) < 2


def test_more_than_the_queue_holds_is_refused_at_once():
    async def main(batcher, detector):
        tasks = [await busy(batcher, detector)]
        tasks += [asyncio.create_task(batcher.detect(street())) for _ in range(6)]
        await asyncio.sleep(0)
        assert batcher.waiting == 6
        with pytest.raises(Overloaded, match="6 images are waiting already"):
            await batcher.detect(street())
        detector.go.set()
        assert len(await asyncio.gather(*tasks)) == 7

    serve(main)


def test_what_waited_too_long_or_was_left_is_not_computed():
    async def main(batcher, detector):
        first = await busy(batcher, detector)
        late = asyncio.create_task(batcher.detect(street()))
        gone = asyncio.create_task(batcher.detect(street()))
        await asyncio.sleep(0.1)
        gone.cancel()
        detector.go.set()
        await first
        with pytest.raises(Overloaded, match="waited for 0.05 s"):
            await late
        assert detector.calls == [1]

    serve(main, max_wait=0.05, max_delay=0)


def test_one_image_that_fails_spoils_no_other():
    async def main(batcher, detector):
        first = await busy(batcher, detector)
        images = [street(x=10), np.zeros((1, 1, 3), dtype=np.uint8), street(x=12)]
        tasks = [asyncio.create_task(batcher.detect(image)) for image in images]
        await asyncio.sleep(0.01)
        detector.go.set()
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert (found[0].boxes[0, 0], found[2].boxes[0, 0]) == (10, 12)
        assert isinstance(found[1], ValueError)

    serve(main)


def test_closing_finishes_what_waits_and_takes_nothing_new():
    async def main(batcher, detector):
        tasks = [await busy(batcher, detector)]
        tasks += [asyncio.create_task(batcher.detect(street())) for _ in range(5)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="shutting down"):
            await batcher.detect(street())
        detector.go.set()
        await closing
        assert all(len(task.result()) == 1 for task in tasks)

    serve(main)
