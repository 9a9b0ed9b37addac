"""Bounds of the service, apart from it so that the command line needs no web framework."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; the defaults are ours.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of an image.
        max_batch: images that run together.
        max_delay: seconds that an image waits for company.
        max_queue: requests that are read, decoded or waiting; more are refused with 503.
        max_wait: seconds until an image has begun; refused with 503 after them.
        read_seconds: for a request's body to arrive; 408 after them.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 16_000_000
    max_batch: int = 8
    max_delay: float = 0.005
    max_queue: int = 32
    max_wait: float = 2.0
    read_seconds: float = 10.0

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "max_delay" else 1 if isinstance(value, int) else 1e-3
            if value < least:
                raise ValueError(f"{name} is {value}; give {least:g} or more.")
