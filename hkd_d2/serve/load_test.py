"""Load on a service: requests a second, latency, refusals and errors.

    python -m hkd_d2.serve.load_test http://127.0.0.1:8000 --image street.png --connections 8
    python -m hkd_d2.serve.load_test http://127.0.0.1:8000 --image street.png --rate 200

Without --rate every connection sends its next request when the last is answered. With --rate
requests are due at even times regardless of the service, and latency counts from when one was due,
so that a queue shows. Latency is that of answered images; 503 is a refusal, all else an error.
"""

import argparse
import http.client
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


def load(
    url: str, body: bytes, *, seconds: float, connections: int, rate: float | None = None
) -> dict:
    """Send one image again and again.

    Args:
        url: of the service, http alone.
        body: the encoded image.
        seconds: in which requests begin; those under way are awaited.
        connections: threads with a connection each, and so most requests at once.
        rate: requests a second; None for as many as are answered.

    Returns:
        dict: ``sent``, ``answered``, ``refused``, ``errors``, ``answered_per_s``, and of answered
        images ``p50_ms``, ``p90_ms``, ``p99_ms``, ``max_ms`` (None without any).
    """
    parts = urlsplit(url)
    numbers, lock = itertools.count(), threading.Lock()
    latencies, statuses = [], []
    start = time.monotonic()

    def work():
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        while True:
            due = time.monotonic() if rate is None else start + next(numbers) / rate
            if due > start + seconds:
                break
            time.sleep(max(0, due - time.monotonic()))
            try:
                connection.request("POST", "/detect", body)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = None
            with lock:
                statuses.append(status)
                if status == 200:
                    latencies.append(time.monotonic() - due)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - start
    refused = statuses.count(503)
    result = {
        "sent": len(statuses),
        "answered": len(latencies),
        "refused": refused,
        "errors": len(statuses) - len(latencies) - refused,
        "answered_per_s": len(latencies) / elapsed,
    }
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
        value = 1e3 * float(np.percentile(latencies, share)) if latencies else None
        result[f"{name}_ms"] = value
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hkd_d2.serve.load_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="as http://127.0.0.1:8000")
    parser.add_argument("--image", required=True, help="file that is sent")
    parser.add_argument("--seconds", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--connections", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rate", type=float, help="requests a second; default: as answered")
    args = parser.parse_args(argv)
    try:
        body = Path(args.image).read_bytes()
    except OSError as error:
        print(f"load_test: {error}", file=sys.stderr)
        return 2
    result = load(
        args.url, body, seconds=args.seconds, connections=args.connections, rate=args.rate
    )
    print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in result.items()}))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
