"""An open-loop load of unary gRPC calls over plain sockets: it offers a rate whatever the server does, at a few µs a call.

A gRPC client in Python takes as much CPU as the server it calls, so it cannot offer ten times what the server can do. This one
writes prepared HTTP/2 frames and looks only at frame headers: a DATA frame is an answer, anything else that ends a stream is not.
Like a gRPC client it keeps to the server's limit of streams and to its windows, and gives up at the deadline; calls that find no
stream wait in the client. It runs as a process of its own:

    python bench/http2_load.py --address 127.0.0.1:50051 --path /concord.v1.RecommendationService/Recommend --rate 1000 < messages

Messages are read from standard input, one in hex a line; the figures are printed as one line of JSON.
"""

import argparse
import json
import selectors
import socket
import struct
import sys
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
_TICK = 0.002


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Returns one HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(name: str, value: str) -> bytes:
    """HPACK: a literal field that enters no table; names and values under 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


@dataclass
class Figures:
    """What became of the calls that were due in the measured time; ``seconds`` are those of the answers."""

    offered: int = 0
    answered: int = 0
    refused: int = 0
    late: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Connection:
    """One client: its socket, open streams in the order they were opened, and calls waiting for a stream."""

    sock: socket.socket
    streams: "OrderedDict[int, tuple[float, bool]]" = field(default_factory=OrderedDict)
    waiting: "deque[float]" = field(default_factory=deque)
    unread: bytes = b""
    unsent: bytes = b""
    next_stream: int = 1
    most_streams: int = 100
    window: int = 65_535


class Load:
    """Offers calls at ``rate`` a second, or keeps ``outstanding`` of them in flight, over ``connections`` connections."""

    def __init__(
        self, address: str, path: str, messages: list[bytes], *, connections: int, deadline: float, metadata: dict[str, str]
    ) -> None:
        host, _, port = address.rpartition(":")
        fields = {"content-type": "application/grpc", "te": "trailers", "grpc-timeout": f"{int(deadline * 1000)}m", **metadata}
        block = b"\x83\x86" + _literal(":path", path) + _literal(":authority", address)
        self._headers = block + b"".join(_literal(name, value) for name, value in fields.items())
        self._bodies = [b"\x00" + struct.pack(">I", len(message)) + message for message in messages]
        self._deadline = deadline
        self._sent = 0
        self._selector = selectors.DefaultSelector()
        self._connections = [self._connect(host, int(port)) for _ in range(connections)]
        self.figures = Figures()

    def run(self, *, rate: float, outstanding: int, warm_up: float, seconds: float) -> Figures:
        """Loads the server for ``warm_up`` and ``seconds``, of which only the latter count."""
        started = time.perf_counter()
        self._counted_from, ends = started + warm_up, started + warm_up + seconds
        turn = 0
        while (now := time.perf_counter()) < ends:
            if rate:
                count = int((now - started) * rate) - turn
            else:
                count = outstanding - sum(len(one.streams) + len(one.waiting) for one in self._connections)
            for _ in range(max(0, count)):
                self._connections[turn % len(self._connections)].waiting.append(now)
                turn += 1
                self.figures.offered += now >= self._counted_from
            for connection in self._connections:
                self._expire(connection, now)
                self._open(connection, now)
            for key, _ in self._selector.select(_TICK if rate else 0.0005):
                self._read(key.data)
        for connection in self._connections:
            connection.sock.close()
        return self.figures

    def _connect(self, host: str, port: int) -> Connection:
        sock = socket.create_connection((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, 2**31 - 1)
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))
        sock.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - 65_535)))
        sock.setblocking(False)
        connection = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def _expire(self, connection: Connection, now: float) -> None:
        """Gives up what is past its deadline, as every gRPC client does."""
        oldest = now - self._deadline
        while connection.waiting and connection.waiting[0] < oldest:
            self.figures.late += connection.waiting.popleft() >= self._counted_from
        for stream, (at, _) in list(connection.streams.items()):
            if at >= oldest:
                break
            del connection.streams[stream]
            self.figures.late += at >= self._counted_from
            connection.unsent += frame(RST_STREAM, 0, stream, struct.pack(">I", 8))

    def _open(self, connection: Connection, now: float) -> None:
        out = [connection.unsent]
        while connection.waiting and len(connection.streams) < connection.most_streams:
            body = self._bodies[self._sent % len(self._bodies)]
            if connection.window < len(body):
                break
            self._sent += 1
            connection.window -= len(body)
            stream = connection.next_stream
            connection.next_stream += 2
            connection.streams[stream] = (connection.waiting.popleft(), False)
            out.append(frame(HEADERS, END_HEADERS, stream, self._headers) + frame(DATA, END_STREAM, stream, body))
        data = b"".join(out)
        try:
            sent = connection.sock.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        connection.unsent = data[sent:]

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.unread + connection.sock.recv(1 << 20)
        except BlockingIOError:
            return
        at = 0
        while len(data) - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if len(data) - at < 9 + length:
                break
            self._take(connection, data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : at + 9 + length])
            at += 9 + length
        connection.unread = data[at:]

    def _take(self, connection: Connection, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA and stream in connection.streams:
            connection.streams[stream] = (connection.streams[stream][0], True)
        elif kind == SETTINGS and not flags & ACK:
            settings = dict(struct.iter_unpack(">HI", payload))
            connection.most_streams = settings.get(MAX_CONCURRENT_STREAMS, connection.most_streams)
            connection.unsent += frame(SETTINGS, ACK, 0, b"")
        elif kind == PING and not flags & ACK:
            connection.unsent += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            connection.window += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            raise RuntimeError(f"the server closes the connection: {payload[8:].decode(errors='replace')}")
        if (kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & END_STREAM)) and (ended := connection.streams.pop(stream, None)):
            self._count(*ended)

    def _count(self, started: float, answered: bool) -> None:
        if started < self._counted_from:
            return
        if answered:
            self.figures.answered += 1
            self.figures.seconds.append(time.perf_counter() - started)
        else:
            self.figures.refused += 1


def main() -> None:
    """Loads the server and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="calls a second; 0: as many as --outstanding allows")
    parser.add_argument("--outstanding", type=int, default=32)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds that do not count")
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    messages = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    load = Load(arguments.address, arguments.path, messages, connections=arguments.connections, deadline=arguments.deadline, metadata={})
    figures = load.run(rate=arguments.rate, outstanding=arguments.outstanding, warm_up=arguments.warm_up, seconds=arguments.seconds)
    ordered = sorted(figures.seconds) or [0.0]
    result = {
        "offered_per_second": figures.offered / arguments.seconds,
        "answered_per_second": figures.answered / arguments.seconds,
        "refused_per_second": figures.refused / arguments.seconds,
        "late_per_second": figures.late / arguments.seconds,
        "answer_ms_p50": ordered[len(ordered) // 2] * 1e3,
        "answer_ms_p99": ordered[int(len(ordered) * 0.99)] * 1e3,
    }
    print(json.dumps({name: round(value, 1) for name, value in result.items()}))


if __name__ == "__main__":
    main()
