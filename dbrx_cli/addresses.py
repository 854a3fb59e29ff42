"""Addresses of this machine: which ones no other machine reaches, and a socket that listens at one."""

from __future__ import annotations

import ipaddress
import socket

from model.errors import InputError


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own. `localhost` and all names under it are (RFC 6761)."""
    name = host.strip("[]").lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `InputError` where nobody can. Port 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=512)
        # asyncio does so for sockets made with proto=IPPROTO_TCP, which this is not. Connections inherit it. Without it
        # the second write of an answer waits for the client to acknowledge the first: 40 ms a request.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python repeats the address behind it
        raise InputError(
            f"--host {host} --port {port}: {reason}", "give an address of this machine and a free port"
        ) from None
