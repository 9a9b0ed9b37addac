"""A service in a process of its own: python serve_process.py SECONDS LIMITS_AS_JSON.

Its detector finds what is red and takes SECONDS for a batch; the port is printed.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def service(seconds=0.0, **limits):
    """Yields the process and its URL."""
    folder = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"}
    command = [sys.executable, __file__, str(seconds), json.dumps(limits)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(20)


def main():
    import socket

    import uvicorn
    from red_detector import RedDetector

    from hkd_d2.serve.app import Limits, create_app

    class Slow(RedDetector):
        def detect(self, images):
            time.sleep(float(sys.argv[1]))
            return super().detect(images)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(Slow(), Limits(**json.loads(sys.argv[2]))),
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
