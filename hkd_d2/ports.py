"""A look at a network port before the work that ends in listening there."""

import socket


def check_port(host: str, port: int) -> None:
    """Raise ValueError where this process cannot listen; port 0 is any free one.

    Args:
        host: name or address of this machine.
        port: from 0 to 65535.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"The port is {port}; give one from 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise ValueError(
            f"Nothing can listen at {host}, port {port} ({error.strerror or error}); give another "
            "host or port."
        ) from error
