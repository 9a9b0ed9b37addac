"""Serve a detector over HTTP.

    hkd serve --model student.onnx

Needs the extra [serve], and for .onnx neither PyTorch nor Detectron2. SIGTERM and Ctrl-C end it
with exit code 0: what was admitted is answered, nothing new is taken.
"""

import argparse
import logging
import signal

from hkd_d2.cli.arguments import add_config_file, add_device
from hkd_d2.ports import check_port
from hkd_d2.serve.limits import Limits

DRAIN_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    standard = Limits()
    parser.add_argument("--model", required=True, metavar="FILE", help=".onnx, .pth, .safetensors")
    add_config_file(parser, "of weights")
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of onnxruntime [its own choice]")
    parser.add_argument("--host", default="127.0.0.1", help="[%(default)s, this machine]")
    parser.add_argument("--port", type=int, default=8000, help="[%(default)s]; 0: any free")
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
            metavar="N",
            help=f"{meaning} [%(default)s]",
        )


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from hkd_d2.serve.app import create_app
    except ModuleNotFoundError as error:
        missing = {"uvicorn", "fastapi", "starlette", "prometheus_client", "python_multipart"}
        if error.name not in missing:
            raise
        raise ImportError(
            f"the service needs {error.name}; install it with: pip install 'hkd_d2[serve]'"
        ) from None
    from hkd_d2.inference import load_detector

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    limits = Limits(**{name: getattr(args, name) for name in vars(Limits())})
    check_port(args.host, args.port)
    detector = load_detector(
        args.model,
        config_file=args.config_file,
        device=args.device,
        batch_size=limits.max_batch,
        threads=args.threads,
    )
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
