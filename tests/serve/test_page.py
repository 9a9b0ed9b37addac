"""The page in a real browser: an image is dropped, boxes appear, the threshold moves."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers.red_detector import street
from helpers.rules import rule
from helpers.serve_process import service

pytestmark = rule("The service's page works in a browser and asks for nothing from outside")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """Chromium without a display, driven by its DevTools protocol over two pipes."""

    def __init__(self, folder):
        # Numbers above 4, so that one is not closed by the other's taking its place.
        there, back = ([self._high(number) for number in os.pipe()] for _ in range(2))

        def give_pipes():  # the protocol's numbers: 3 to read from, 4 to write to
            os.dup2(there[0], 3)
            os.dup2(back[1], 4)

        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}/profile",
                "--window-size=900,900",
                "about:blank",
            ],
            preexec_fn=give_pipes,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(there[0])
        os.close(back[1])
        self._write, self._read, self._rest = there[1], back[0], b""
        self._number, self._session = 0, None
        self.events = []
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _high(number):
        high = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20)
        os.close(number)
        return high

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._read, 1 << 16)
                assert part, "the browser ended"
                self._rest += part
            text, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, wanted):
        for _ in range(200):
            if self.value(expression) == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"{expression} is {self.value(expression)!r}, not {wanted!r}")

    def drop(self, path):
        """Drag a file from the desktop onto the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=400, y=120, data=data)

    def press(self, key, code, times):
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=code,
                )

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self._write)
        os.close(self._read)


STATUS = "document.getElementById('status').textContent"
# Whether a blue line lies on the left edge of the pedestrian's box, at x = 40.
BOX = """(() => {
  const pen = document.getElementById("picture").getContext("2d");
  const [r, g, b] = pen.getImageData(40, 45, 1, 1).data;
  return r < 120 && b > 180;
})()"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_an_image_is_dropped_and_the_threshold_moved(tmp_path):
    Image.fromarray(street()).save(tmp_path / "street.png")
    Path(tmp_path / "broken.png").write_bytes(b"no image")
    with service() as (_, url):
        browser = Browser(tmp_path)
        try:
            browser.call("Page.navigate", url=url)
            browser.wait("document.readyState", "complete")
            browser.wait(STATUS, "No image yet.")
            browser.drop(tmp_path / "street.png")
            browser.wait(STATUS, "1 of 1 detections")
            assert browser.value("document.getElementById('picture').hidden") is False
            assert browser.value("document.getElementById('picture').width") == 128
            assert browser.value(BOX) is True
            # The detection scores 0.9: at 0.95 it goes, at 0.85 it is there again.
            browser.value("document.getElementById('threshold').focus()")
            browser.press("ArrowRight", 39, 45)
            browser.wait("document.getElementById('value').textContent", "0.95")
            browser.wait(STATUS, "0 of 1 detections")
            assert browser.value(BOX) is False
            browser.press("ArrowLeft", 37, 10)
            browser.wait(STATUS, "1 of 1 detections")
            assert browser.value(BOX) is True
            # What is no image is told, and the picture goes.
            browser.drop(tmp_path / "broken.png")
            browser.wait("document.getElementById('status').className", "bad")
            assert "cannot be read" in browser.value(STATUS)
            assert browser.value("document.getElementById('picture').hidden") is True
            # Chosen instead of dropped.
            root = browser.call("DOM.getDocument")["root"]["nodeId"]
            node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
            files = [str(tmp_path / "street.png")]
            browser.call("DOM.setFileInputFiles", nodeId=node, files=files)
            browser.wait(STATUS, "1 of 1 detections")
            requests = [
                e["params"]["request"]["url"]
                for e in browser.events
                if e["method"] == "Network.requestWillBeSent"
            ]
            assert requests and all(r.startswith((url, "blob:", "about:")) for r in requests), (
                requests
            )
            faults = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
            assert faults == []
        finally:
            browser.close()
