"""``python -m hkd_d2.serve`` in a process of its own, with a detector that finds what is red.

python tests/helpers/serve_process.py SECONDS ARGUMENT...: it takes SECONDS for a batch.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def service(seconds=0.0, **limits):
    """Yields the process and its URL; the limits are options of the command line."""
    folder = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{folder.parents[1]}{os.pathsep}{folder.parent}"}
    command = [sys.executable, __file__, str(seconds), "--model", "none", "--port", "0"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if "running on " in line:
            break
    try:
        yield process, said.rpartition("running on ")[2].split()[0]
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def main():
    import hkd_d2.inference
    from helpers.red_detector import RedDetector
    from hkd_d2.serve.__main__ import main as serve

    class Slow(RedDetector):
        def detect(self, images):
            time.sleep(float(sys.argv[1]))
            return super().detect(images)

    hkd_d2.inference.load_detector = lambda *arguments, **options: Slow()
    sys.exit(serve(sys.argv[2:]))


if __name__ == "__main__":
    main()
