"""The service: answers, refusals in one sentence, metrics, overload and a graceful end."""

import http.client
import io
import json
import signal
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.formparsers import MultiPartParser

from helpers.red_detector import RedDetector, street
from helpers.rules import rule
from helpers.serve_process import service
from hkd_d2.inference import read_image
from hkd_d2.serve.__main__ import main
from hkd_d2.serve.app import DECODERS, Limits, create_app
from hkd_d2.serve.load_test import load

pytestmark = rule("The service refuses rather than queues, and answers what it admitted")


def encoded(image=None, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(street() if image is None else image).save(file, form, **options)
    return file.getvalue()


def many_scans():
    """A progressive JPEG whose last scan stands 600 times, which decodes, for long."""
    content = encoded(np.full((96, 128), 128, np.uint8), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * 600 + content[-2:]


@pytest.fixture(scope="module")
def client():
    limits = Limits(max_bytes=20_000, max_pixels=96 * 128)
    with TestClient(create_app(RedDetector(), limits)) as client:
        yield client


def test_an_image_as_body_and_as_form(client):
    wanted = {
        "width": 128,
        "height": 96,
        "detections": [{"box": [40.0, 20.0, 60.0, 70.0], "score": 0.9, "class": "pedestrian"}],
    }
    assert client.post("/detect", content=encoded()).json() == wanted
    for name in ("street.png", "../../etc/passwd", "/tmp/x.png"):  # names mean nothing
        answer = client.post("/detect", files={"image": (name, encoded())})
        assert (answer.status_code, answer.json()) == (200, wanted)
    assert client.post("/detect?threshold=0.95", content=encoded()).json()["detections"] == []


def test_an_image_is_turned_as_its_tag_says(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = client.post("/detect", content=encoded(form="JPEG", exif=exif, quality=95)).json()
    assert (answer["width"], answer["height"]) == (96, 128)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b""}, 400, "cannot be read: it is empty"),
        ({"files": {"image": ("a.png", b"")}}, 400, "cannot be read: it is empty"),
        ({"content": b"/etc/passwd"}, 400, "cannot be read"),
        ({"content": encoded()[:200]}, 400, "cut short"),
        ({"content": many_scans()}, 400, "more than 64 scans"),
        ({"files": {"image": ("a.jpg", many_scans())}}, 400, "more than 64 scans"),
        ({"content": encoded(np.zeros((9, 9), np.float32), "TIFF")}, 400, "no rule"),
        ({"content": encoded(form="GIF")}, 400, "give a JPEG, PNG, BMP, WebP or TIFF"),
        ({"content": encoded() + bytes(9), "params": {"threshold": "-1"}}, 400, "from 0 to 1"),
        ({"content": encoded(street(size=(97, 128)))}, 413, "128x97 pixels"),
        ({"content": b"x" * 20_001}, 413, "may have 20000 bytes"),
        ({"content": iter([b"x" * 9_000] * 3)}, 413, "may have 20000 bytes"),
        ({"files": {"image": ("a.png", b"x" * 20_001)}}, 413, "may have 20000 bytes"),
        ({"files": {"image": ("a.png", b"no image")}}, 400, "cannot be read"),
        ({"files": [("a", encoded()), ("b", encoded())]}, 400, "Too many files"),
        ({"data": {"a": "b"}, "headers": {"content-type": "multipart/form-data"}}, 400, "form"),
        ({"content": encoded(), "params": {"threshold": "2"}}, 400, "no number from 0 to 1"),
        ({"content": encoded(), "params": {"threshold": "nan"}}, 400, "no number from 0 to 1"),
        ({"content": encoded(), "params": {"threshold": "x"}}, 400, "no number from 0 to 1"),
    ],
)
def test_bad_requests_are_one_sentence(client, request_, status, message):
    answer = client.post("/detect", **request_)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"] and message in answer.json()["error"]


def test_an_upload_stays_in_memory(client, monkeypatch):
    """One of more bytes than the form's parser keeps in memory by itself."""
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 100)

    def rollover(file):
        raise AssertionError("the upload went onto the disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rollover)
    image = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert len(image) > 10_000
    assert client.post("/detect", files={"image": ("a.png", image)}).status_code == 200


def test_health_before_and_after_serving():
    client = TestClient(create_app(RedDetector()))
    assert (client.get("/health").status_code, client.get("/health").json()) == (
        503,
        {"status": "ending"},
    )


def test_decoding_does_not_hold_up_the_rest(monkeypatch):
    """Health, metrics and refusals are answered while every decoder is busy."""
    busy, go_on = threading.Barrier(DECODERS + 1), threading.Event()

    def slow(*args, **options):
        busy.wait(20)
        assert go_on.wait(20)
        return read_image(*args, **options)

    monkeypatch.setattr("hkd_d2.serve.app.read_image", slow)
    with TestClient(create_app(RedDetector())) as client, ThreadPoolExecutor(DECODERS) as pool:
        answers = [pool.submit(client.post, "/detect", content=encoded()) for _ in range(DECODERS)]
        busy.wait(20)
        try:
            assert client.get("/health").json() == {"status": "ok"}
            in_flight = sample(client.get("/metrics").text, "hkd_requests_in_flight")
            assert in_flight == DECODERS
        finally:
            go_on.set()
        assert [answer.result().status_code for answer in answers] == [200] * DECODERS


def test_other_paths_and_methods_do_not_exist(client):
    for path in ("/../pyproject.toml", "/static/x", "/docs", "/%2e%2e/etc/passwd"):
        assert client.get(path).status_code == 404
    assert client.get("/detect").status_code == 405


def test_health_model_metrics_and_page(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/model").json() == {"class_names": ["pedestrian"]}
    answered = 'hkd_requests_total{status="200"}'
    before = sample(client.get("/metrics").text, answered)
    client.post("/detect", content=encoded())
    text = client.get("/metrics").text
    assert sample(text, answered) == before + 1
    assert sample(text, "hkd_request_seconds_count") == before + 1
    assert sample(text, "hkd_requests_in_flight") == sample(text, "hkd_queue_length") == 0
    page = client.get("/")
    assert page.text.startswith("<!doctype html>")
    assert "default-src 'none'; script-src 'sha256-" in page.headers["content-security-policy"]


def sample(text, name):
    lines = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.mark.parametrize("name", ["max_bytes", "max_queue", "max_wait", "max_batch"])
def test_limits_that_make_no_sense(name):
    with pytest.raises(ValueError, match=f"{name} is 0; give"):
        Limits(**{name: 0})


@pytest.mark.parametrize("name", ["model.pt2", "model.ts"])
def test_no_program_is_served(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"anything")
    assert main(["--model", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is a program, which may do anything; take an .onnx" in said


def test_overload_is_refused_and_what_is_admitted_is_answered():
    """At most 4 under way, 0.1 s a batch of 2: a twentieth of 400 a second can be answered."""
    with service(0.1, max_queue=4, max_batch=2, max_wait=5) as (_, url):
        result = load(url, encoded(), seconds=2, connections=24, rate=400)
        assert result["errors"] == 0 and result["refused"] > result["answered"] > 10
        # Two batches before it and its own: nothing queues without end.
        assert urllib.request.urlopen(f"{url}/health").status == 200
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        assert sample(metrics, 'hkd_requests_total{status="503"}') == result["refused"]
        host = urlsplit(url)
        threads = [threading.Thread(target=load, args=(url, encoded()), kwargs=BUSY)]
        threads[0].start()
        time.sleep(0.3)
        connection = http.client.HTTPConnection(host.hostname, host.port, timeout=10)
        connection.request("POST", "/detect", encoded())
        answer = connection.getresponse()
        assert answer.status == 503 and answer.headers["Retry-After"] == "1"
        assert "under way" in json.loads(answer.read())["error"]
        threads[0].join()


BUSY = {"seconds": 1, "connections": 12}


def post_a_part(url, stated_length):
    """The answer to a request whose body ends before the length that it states."""
    host = urlsplit(url)
    connection = http.client.HTTPConnection(host.hostname, host.port, timeout=10)
    connection.putrequest("POST", "/detect")
    connection.putheader("Content-Length", str(stated_length))
    connection.endheaders(b"only this")
    return connection.getresponse()


def test_a_body_that_does_not_come_is_given_up():
    with service(read_seconds=0.2) as (_, url):
        answer = post_a_part(url, 1000)
        assert answer.status == 408 and "within 0.2 s" in json.loads(answer.read())["error"]


def test_a_body_that_says_it_is_too_large_is_not_waited_for():
    with service(max_bytes=1000, read_seconds=5) as (_, url):
        answer = post_a_part(url, 1001)
        assert answer.status == 413 and "may have 1000 bytes" in json.loads(answer.read())["error"]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_what_was_admitted_is_answered(sign):
    with service(0.7, max_batch=1) as (process, url):
        results = []

        def ask():
            request = urllib.request.Request(f"{url}/detect", encoded())
            results.append(json.loads(urllib.request.urlopen(request, timeout=20).read()))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        process.send_signal(sign)
        for thread in threads:
            thread.join()
        assert len(results) == 3 and all(len(r["detections"]) == 1 for r in results)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{url}/health")
