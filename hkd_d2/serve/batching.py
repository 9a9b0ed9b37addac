"""Requests that arrive together run together, and only so many may wait."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hkd_d2.inference import Detections, Detector


class Overloaded(Exception):
    """The request was refused, or waited too long; it may be sent again later."""


@dataclass(eq=False)
class _Job:
    image: np.ndarray
    deadline: float
    result: asyncio.Future


class Batcher:
    """Feeds a detector with batches, from one thread of its own.

    A batch starts when it is full, or when its oldest image has waited ``max_delay``; while the
    detector is busy, the next batch grows. An image that has not begun ``max_wait`` after it came
    is refused rather than computed for a client that has given up.

    Args:
        detector: images of one size after resizing run together.
        max_batch: most images of a batch.
        max_delay: seconds that an image waits for company at most.
        max_queue: most images that wait; one more is refused at once.
        max_wait: seconds until an image has begun.
        on_batch: told the size and the seconds of every batch.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        max_wait: float,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.detector, self.on_batch = detector, on_batch
        self.max_batch, self.max_delay = max_batch, max_delay
        self.max_queue, self.max_wait = max_queue, max_wait
        self._jobs: deque[_Job] = deque()
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "detector")
        self._closing = False
        self._task: asyncio.Task | None = None

    @property
    def waiting(self) -> int:
        """Images that have not begun."""
        return len(self._jobs)

    def start(self) -> None:
        """Begin to serve, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def detect(self, image: np.ndarray) -> Detections:
        """Run the detector on a uint8 RGB (H, W, 3) image.

        Raises:
            Overloaded: the queue is full, the image waited too long, or the service ends.
            Exception: the detector's own; the other images of the batch do not meet it.
        """
        if self._closing:
            raise Overloaded("The service is shutting down; send it to another.")
        if len(self._jobs) >= self.max_queue:
            raise Overloaded(f"{len(self._jobs)} images are waiting already; send it again later.")
        loop = asyncio.get_running_loop()
        job = _Job(image, time.monotonic() + self.max_wait, loop.create_future())
        self._jobs.append(job)
        self._came.set()
        return await job.result

    async def close(self) -> None:
        """Finish the images that wait, take nothing new, and return when all is done."""
        self._closing = True
        self._came.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def _run(self):
        while True:
            if not self._jobs:
                if self._closing:
                    return
                self._came.clear()
                await self._came.wait()
                continue
            await self._gather()
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _gather(self):
        """Wait until a batch is full or its oldest image has waited long enough."""
        start = self._jobs[0].deadline - self.max_wait + self.max_delay
        while len(self._jobs) < self.max_batch and not self._closing:
            self._came.clear()
            try:
                async with asyncio.timeout(start - time.monotonic()):
                    await self._came.wait()
            except TimeoutError:
                return

    def _take(self):
        batch, now = [], time.monotonic()
        while self._jobs and len(batch) < self.max_batch:
            job = self._jobs.popleft()
            if job.result.done():  # the client went away
                continue
            if now > job.deadline:
                job.result.set_exception(
                    Overloaded(f"The image waited for {self.max_wait:g} s; send it again later.")
                )
                continue
            batch.append(job)
        return batch

    async def _compute(self, batch):
        start = time.monotonic()
        try:
            found = await self._in_thread([job.image for job in batch])
        except Exception:
            # One image may be at fault: each alone, so that the others do not meet its error.
            found = [await self._alone(job.image) for job in batch]
        self.on_batch(len(batch), time.monotonic() - start)
        for job, result in zip(batch, found, strict=True):
            if job.result.done():
                continue
            if isinstance(result, Exception):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)

    async def _in_thread(self, images):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.detector.detect, images)

    async def _alone(self, image):
        try:
            return (await self._in_thread([image]))[0]
        except Exception as error:
            return error
