"""A closed loop of HTTP/1.1 calls over kept connections: the twin of http2_load.py for peers that speak JSON.

One process holds ``--connections`` callers; each sends its next call when the last one is answered. Bodies are read, not parsed:

    python bench/http1_load.py --address 127.0.0.1:8000 --path /predict --seconds 8 < bodies

Bodies are read from standard input, one in hex a line; the figures are printed as one line of JSON.
"""

import argparse
import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field

_LENGTH = b"content-length:"


@dataclass
class Caller:
    """One connection: what was read of the answer it waits for, and since when it waits."""

    sock: socket.socket
    unread: bytearray = field(default_factory=bytearray)
    since: float = 0.0


def answered(data: bytearray) -> bool | None:
    """Returns whether a whole answer was a 200; None while it is not whole."""
    head, found, body = bytes(data).partition(b"\r\n\r\n")
    if not found:
        return None
    lines = head.lower().split(b"\r\n")
    length = next(int(line[len(_LENGTH) :]) for line in lines if line.startswith(_LENGTH))
    return None if len(body) < length else b" 200 " in lines[0]


def run(address: str, path: str, bodies: list[bytes], *, connections: int, warm_up: float, seconds: float) -> dict[str, float]:
    """Loads the server for ``warm_up`` and ``seconds``, of which only the latter count."""
    host, _, port = address.rpartition(":")
    head = f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: "
    calls = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
    selector, sent = selectors.DefaultSelector(), 0
    started, used = time.perf_counter(), time.process_time()
    counted_from, ends = started + warm_up, started + warm_up + seconds

    def send(caller: Caller) -> None:
        nonlocal sent
        caller.sock.sendall(calls[sent % len(calls)])
        sent, caller.since = sent + 1, time.perf_counter()

    for _ in range(connections):
        caller = Caller(socket.create_connection((host, int(port))))
        selector.register(caller.sock, selectors.EVENT_READ, caller)
        send(caller)
    good = bad = 0
    taken: list[float] = []
    while (now := time.perf_counter()) < ends:
        for key, _ in selector.select(ends - now):
            caller = key.data
            received = caller.sock.recv(1 << 20)
            if not received:
                raise ConnectionError("the server closed a connection")
            caller.unread += received
            outcome = answered(caller.unread)
            if outcome is None:
                continue
            if (now := time.perf_counter()) >= counted_from:
                good, bad = good + outcome, bad + (not outcome)
                taken.append(now - caller.since)
            caller.unread.clear()
            send(caller)
    ordered = sorted(taken) or [0.0]
    return {
        "answered_per_second": round(good / seconds, 1),
        "refused_per_second": round(bad / seconds, 1),
        "answer_ms_p50": round(ordered[len(ordered) // 2] * 1e3, 1),
        "cpu_share": round((time.process_time() - used) / (warm_up + seconds), 3),
    }


def main() -> None:
    """Loads the server and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds that do not count")
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    bodies = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    figures = run(
        arguments.address,
        arguments.path,
        bodies,
        connections=arguments.connections,
        warm_up=arguments.warm_up,
        seconds=arguments.seconds,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
