"""Listening sockets of the services: taken before anything slow is loaded, so that a taken port is said at once."""

import errno
import socket

from shared.command import UsageError


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
    # Accepted connections inherit it; asyncio does not set it for them, and a reply's second packet would wait 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
