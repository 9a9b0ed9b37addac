"""The service: images in by POST, detections out as JSON.

A request's image is decoded in memory, within bounds of size and time; no name or path in it is
looked at, and nothing of it is written.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from hkd_d2 import __version__
from hkd_d2.data.images import UPLOAD_FORMATS, ImageTooLarge
from hkd_d2.inference import Detector, read_image
from hkd_d2.serve.batching import Batcher, Overloaded
from hkd_d2.serve.limits import Limits

logger = logging.getLogger(__name__)
DECODERS = 2  # threads; each may hold one decoded image


class _Metrics:
    """Metrics for Prometheus, in a registry of their own."""

    def __init__(self, batcher):
        registry = self.registry = CollectorRegistry()
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        self.requests = Counter(
            "hkd_requests", "POST /detect by status", ["status"], registry=registry
        )
        self.latency = Histogram(
            "hkd_request_seconds", "of answered images", buckets=buckets, registry=registry
        )
        self.batch_size = Histogram(
            "hkd_batch_size", "images", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.batch_seconds = Histogram(
            "hkd_batch_seconds", "detector alone", buckets=buckets, registry=registry
        )
        self.in_flight = Gauge("hkd_requests_in_flight", "admitted", registry=registry)
        self.waiting = Gauge("hkd_queue_length", "images that wait", registry=registry)
        self.waiting.set_function(lambda: batcher.waiting)

    def on_batch(self, size, seconds):
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)


def create_app(detector: Detector, limits: Limits | None = None) -> FastAPI:
    """The service as an ASGI application.

    ``POST /detect?threshold=0.5`` takes an image as the body, or as the one file of a form
    (multipart/form-data), and answers ``{"width", "height", "detections": [{"box": [x1, y1, x2,
    y2], "score", "class"}]}`` by falling score, in pixels of the upright image. An error is
    ``{"error": sentence}`` with 400 (no image, or a wrong threshold), 408 (too slow), 413 (too
    large), 503 (overloaded; ``Retry-After``). ``GET /`` is a page to try it, ``GET /health`` and
    ``GET /metrics`` (Prometheus) are for operation, ``GET /model`` is the detector's metadata.
    """
    limits = limits or Limits()
    batcher = Batcher(
        detector,
        max_batch=limits.max_batch,
        max_delay=limits.max_delay,
        max_queue=limits.max_queue,
        max_wait=limits.max_wait,
        on_batch=lambda size, seconds: metrics.on_batch(size, seconds),
    )
    metrics = _Metrics(batcher)
    decoders = ThreadPoolExecutor(DECODERS, "decoder")
    page, policy = _page()
    state = {"in_flight": 0, "serving": False}

    @contextlib.asynccontextmanager
    async def lifespan(app):
        batcher.start()
        state["serving"] = True
        yield
        state["serving"] = False
        await batcher.close()
        decoders.shutdown()

    app = FastAPI(
        title="hkd_d2", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )

    @app.exception_handler(HTTPException)
    async def sentence(request, error):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.post("/detect")
    async def detect(request: Request):
        start = time.monotonic()
        status = 500
        try:
            answer = await admitted(request)
            status = 200
            metrics.latency.observe(time.monotonic() - start)
            return answer
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = 499  # as web servers count it; nobody reads the answer
            return Response(status_code=400)
        finally:
            metrics.requests.labels(str(status)).inc()

    async def admitted(request):
        if state["in_flight"] >= limits.max_queue:  # before a byte of the body is read
            raise _overloaded(f"{limits.max_queue} requests are under way; send it again later.")
        state["in_flight"] += 1
        metrics.in_flight.inc()
        try:
            threshold = _threshold(request.query_params.get("threshold"))
            body = await _body(request, limits)
            loop = asyncio.get_running_loop()
            decode = partial(
                read_image,
                body,
                max_bytes=limits.max_bytes,
                max_pixels=limits.max_pixels,
                formats=UPLOAD_FORMATS,
            )
            try:
                image = await loop.run_in_executor(decoders, decode)
                found = (await batcher.detect(image)).above(threshold)
            except ImageTooLarge as error:
                raise HTTPException(413, str(error)) from None
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            except Overloaded as error:
                raise _overloaded(str(error)) from None
            return _answer(image, found)
        finally:
            state["in_flight"] -= 1
            metrics.in_flight.dec()

    @app.get("/", include_in_schema=False)
    async def index():
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health():
        serving = state["serving"]
        return JSONResponse({"status": "ok" if serving else "ending"}, 200 if serving else 503)

    @app.get("/model")
    async def model():
        return detector.metadata

    @app.get("/metrics", include_in_schema=False)
    async def prometheus():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _overloaded(sentence):
    return HTTPException(503, sentence, {"Retry-After": "1"})


def _threshold(text):
    try:
        value = 0.0 if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise HTTPException(400, "The threshold is no number from 0 to 1; give one, or none.")
    return value


async def _body(request: Request, limits: Limits) -> bytes:
    """The image's bytes, in memory; never more than ``max_bytes`` are held."""
    try:
        async with asyncio.timeout(limits.read_seconds):
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind == "multipart/form-data":
                return await _file_of_form(request, limits)
            return b"".join([part async for part in _bounded(request, limits)])
    except TimeoutError:
        raise HTTPException(
            408, f"The image did not arrive within {limits.read_seconds:g} s; send it again."
        ) from None


async def _bounded(request, limits):
    sentence = f"A request may have {limits.max_bytes} bytes and this one has more; shrink it."
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limits.max_bytes:
        raise HTTPException(413, sentence)
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > limits.max_bytes:  # also of a body that did not state its length
            raise HTTPException(413, sentence)
        yield part


async def _file_of_form(request, limits):
    parser = MultiPartParser(request.headers, _bounded(request, limits), max_files=1, max_fields=8)
    parser.spool_max_size = limits.max_bytes + 1  # never onto the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary")
        raise HTTPException(400, f"The form cannot be read ({reason}); send one file.") from None
    files = [value for _, value in form.multi_items() if not isinstance(value, str)]
    try:
        if not files:
            raise HTTPException(400, "The form has no file; send the image as its one file.")
        return await files[0].read()
    finally:
        await form.close()


def _answer(image, found):
    detections = [
        {"box": [round(v, 2) for v in box], "score": round(score, 4), "class": found.class_names[c]}
        for box, score, c in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
        )
    ]
    return {"width": image.shape[1], "height": image.shape[0], "detections": detections}


def _page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and nothing else."""
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page, (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
