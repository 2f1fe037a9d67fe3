"""Where a server listens: the ports it says it answers on, and addresses that worker processes share."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from features.settings import SettingsError


@dataclass(frozen=True)
class Ports:
    """Where a server answers: gRPC, admin methods (the same port where there is one), metrics (-1 when off)."""

    port: int
    admin_port: int
    metrics_port: int


@contextmanager
def shared_port(host: str, port: int, *, setting: str) -> Iterator[int]:
    """Holds ``port`` on ``host`` for processes of this user that bind it with SO_REUSEPORT; yields its number, picked where it is 0.

    The sockets held here do not listen, so they are given no connection. Who binds the port without sharing, as a server by itself
    or another supervisor does, is refused as long as they stand.

    Raises:
        SettingsError: the address cannot be bound, or is no address of a network.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise SettingsError(f"{setting}: {host} is no address that workers can share") from None
    with ExitStack() as held:
        for family, *_, address in found:
            try:
                port = _require_free(family, (address[0], port))
                held.enter_context(_hold(family, (address[0], port)))
            except OSError:
                raise SettingsError(f"{setting}: cannot listen on {host}:{port}; is the port taken?") from None
        yield port


def _require_free(family: int, address: tuple[str | int, int]) -> int:
    """Listens for a moment as one who does not share; connections that linger from before are in nobody's way."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        _bind(probe, address)
        probe.listen(1)
        number: int = probe.getsockname()[1]
        return number


def _hold(family: int, address: tuple[str | int, int]) -> socket.socket:
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(held, address)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # with it the next probe would not notice this socket
    except OSError:
        held.close()
        raise
    return held


def _bind(sock: socket.socket, address: tuple[str | int, int]) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
