"""Serve a detector over HTTP.

    python -m hkd_d2.serve --model student.onnx

Needs the extra [serve], and for .onnx neither PyTorch nor Detectron2. SIGTERM and Ctrl-C end it
with exit code 0: what was admitted is answered, nothing new is taken.
"""

import argparse
import logging
import signal
import sys

try:
    import uvicorn

    from hkd_d2.serve.app import Limits, create_app
except ModuleNotFoundError as error:
    missing = {"uvicorn", "fastapi", "starlette", "prometheus_client", "python_multipart"}
    if error.name not in missing:
        raise
    sys.exit(f"hkd_d2.serve needs {error.name}; install it with: pip install 'hkd_d2[serve]'")

from hkd_d2.inference import load_detector

DRAIN_SECONDS = 30


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m hkd_d2.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    standard = Limits()
    parser.add_argument("--model", required=True, metavar="FILE", help=".onnx, .pth, .safetensors")
    parser.add_argument("--config-file", help="of weights; default: config.yaml beside them")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="of onnxruntime; default: its own choice")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free")
    for name, unit, meaning in (
        ("max_bytes", int, "most bytes of a request"),
        ("max_pixels", int, "most pixels of an image"),
        ("max_batch", int, "most images that run together"),
        ("max_delay", float, "seconds that an image waits for company"),
        ("max_queue", int, "most requests under way; more are refused with 503"),
        ("max_wait", float, "seconds until an image has begun; then it is refused with 503"),
        ("read_seconds", float, "for a request to arrive"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=unit,
            default=getattr(standard, name),
            help=f"{meaning} (default: %(default)s)",
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        limits = Limits(**{name: getattr(args, name) for name in vars(Limits())})
        detector = load_detector(
            args.model,
            config_file=args.config_file,
            device=args.device,
            batch_size=limits.max_batch,
            threads=args.threads,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"hkd_d2.serve: {error}", file=sys.stderr)
        return 2
    # After its shutdown uvicorn raises the signal once more, under the handler from before it:
    # that of Ctrl-C ends uvicorn.run, that of SIGTERM would end the process with 143.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvicorn.run(
        create_app(detector, limits),
        host=args.host,
        port=args.port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
