"""Messages on a stream socket: eight bytes with the length, then JSON."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any


class BrokenLinkError(Exception):
    """The other side has closed the socket, or it sent bytes that are no message."""


def send(link: socket.socket, message: Any) -> None:
    """Write a message."""
    data = json.dumps(message).encode()
    link.sendall(struct.pack("!Q", len(data)) + data)


def receive(link: socket.socket, most: int) -> Any:
    """Read a message.

    Args:
        link: the socket.
        most: longest message in bytes.

    Raises:
        BrokenLinkError: the socket is closed, or the message is too long or no JSON.
    """
    (length,) = struct.unpack("!Q", _exactly(link, 8))
    if length > most:
        raise BrokenLinkError(f"a message of {length} bytes; the limit is {most}")
    try:
        return json.loads(_exactly(link, length))
    except (ValueError, RecursionError) as error:
        raise BrokenLinkError("no JSON") from error


def _exactly(link: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        try:
            part = link.recv(min(count, 1 << 16))
        except OSError as error:
            raise BrokenLinkError(str(error)) from error
        if not part:
            raise BrokenLinkError("closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
