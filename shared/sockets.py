"""Listening sockets of the services: taken before anything slow is loaded, so that a taken port is said at once.

One that is open to others without an API token is said in the log.
"""

import errno
import socket
from pathlib import Path

import structlog

from shared.access import NAME, exposed
from shared.command import UsageError

CONTAINER = Path("/.dockerenv")  # there the published address decides who can connect


def listen(service: str, host: str, port: int) -> socket.socket:
    """A listening socket; UsageError that names the variable to change when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UsageError(
            f"port {port} of {host} is in use; stop what listens there or set DRZERO_{service.upper()}__PORT "
            f"(and DRZERO_{service.upper()}__URL, where clients have one)"
        ) from error
    if exposed(host) and not CONTAINER.exists():
        remedy = f"set {NAME} on all services, or DRZERO_{service.upper()}__HOST=127.0.0.1"
        structlog.get_logger().warning("anybody may use this port", address=f"{host}:{port}", remedy=remedy)
    # Accepted connections inherit it; asyncio does not set it for them, and a reply's second packet would wait 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
