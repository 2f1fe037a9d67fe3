"""Feast's own HTTP feature server over the shop's registry and Redis, and a load for it: the peer of several benchmarks."""

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import features
from cli.stack import free_port
from features.settings import Settings
from harness import WORK

# 21 features of a customer, over both views.
FEATURES = [
    *(f"user_activity:{name}" for name in ("version", "recent_items", "recent_actions", "recent_channels", "recent_times")),
    *(f"user_activity:{name}" for name in ("purchased_items", "purchased_days", "views_7d", "carts_7d", "purchases_28d", "searches_7d")),
    *(f"user_profile:{name}" for name in ("event_count", "purchase_count", "purchase_value", "days_since_event", "days_since_purchase")),
    *(f"user_profile:{name}" for name in ("price_mean", "price_low", "price_high", "top_categories", "top_category_shares")),
]


@contextmanager
def feature_server(settings: Settings) -> Iterator[int]:
    """Runs ``feast serve`` with one worker, as its own documentation starts it; yields its port."""
    port = free_port()
    repository = Path(features.__file__).parent
    words = [sys.executable, "-m", "feast.cli.cli", "-c", str(repository), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (WORK / "feast.log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--no-access-log", "--max-requests", "1000000"], stdout=log, stderr=log, env=os.environ | settings.feast_environment()
        )
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"feast serve did not start; see {WORK / 'feast.log'}") from None
            time.sleep(0.1)
        else:
            return


def request(customers: Sequence[str], *, join_key: str = "user_id", refs: Sequence[str] = FEATURES) -> bytes:
    """Returns an HTTP/1.1 request for the features of some customers or items."""
    body = json.dumps({"features": list(refs), "entities": {join_key: list(customers)}}).encode()
    head = f"POST /get-online-features HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def http_load(port: int, customers: Sequence[str], *, seconds: float, connections: int) -> float:
    """Keeps one call in flight on each connection; returns the calls a second that were answered with 200."""
    messages = [request([customer]) for customer in customers]
    selector, answered, turn = selectors.DefaultSelector(), 0, 0
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    unread = dict.fromkeys(sockets, b"")
    for sock in sockets:
        selector.register(sock, selectors.EVENT_READ)
        sock.sendall(messages[(turn := turn + 1) % len(messages)])
    started = time.perf_counter()
    while (now := time.perf_counter()) < started + 1 + seconds:
        for key, _ in selector.select(0.1):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            unread[sock] += sock.recv(1 << 16)
            if whole(unread[sock]):
                if not unread[sock].startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(unread[sock][:500].decode())
                answered += now > started + 1
                unread[sock] = b""
                sock.sendall(messages[(turn := turn + 1) % len(messages)])
    for sock in sockets:
        sock.close()
    return answered / seconds


def whole(data: bytes) -> bool:
    """Says whether an answer has come in full; Feast's server always names its length."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) >= int(length.partition(b":")[2])
