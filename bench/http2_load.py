"""An open-loop load of unary gRPC calls over plain sockets: it offers a rate whatever the server does, at a few µs a call.

A gRPC client in Python takes as much CPU as the server it calls, so it cannot offer ten times what the server can do. This one
writes prepared HTTP/2 frames every 2 ms and tells how each call ended: by its grpc-status, by the code of an RST_STREAM, late, or
lost with its connection. Like a gRPC client it keeps to the server's limit of streams and to its windows, and gives up at the
deadline; calls that find no stream wait in the client. ``cpu_share`` is what it took of one core. It runs as a process of its own:

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
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import grpc

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 3, 4
_TICK = 0.002
_FRAME = struct.Struct(">HBBBI")  # length (16 and 8 bits), kind, flags, stream
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Returns one HTTP/2 frame."""
    return _FRAME.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def status_of(trailers: bytes) -> str:
    """Returns the name of the grpc-status in a block of trailers, which gRPC writes as plain text where no table is allowed."""
    _, name, after = trailers.partition(b"\x0bgrpc-status")
    return _CODES[int(after[1 : 1 + after[0]])] if name else "NO_STATUS"


def _literal(name: str, value: str) -> bytes:
    """HPACK: a literal field that enters no table; names and values under 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


@dataclass
class Figures:
    """What became of the calls that were due in the measured time.

    Attributes:
        ended: how many ended how: a gRPC code, ``RST_STREAM 8`` (cancelled by the server), ``LATE`` or ``LOST``.
        pushed_back: how many were told when to come back (grpc-retry-pushback-ms).
        seconds: what the answers took.
        cpu_share: of one core, 0 to 1.
    """

    offered: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    pushed_back: int = 0
    seconds: list[float] = field(default_factory=list)
    lost_connections: int = 0
    cpu_share: float = 0.0


@dataclass
class Connection:
    """One client: its socket, since when each of its streams is open (oldest first), and calls waiting for a stream."""

    sock: socket.socket
    streams: "OrderedDict[int, float]" = field(default_factory=OrderedDict)
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
        self._peer = (host, int(port))
        fields = {"content-type": "application/grpc", "te": "trailers", "grpc-timeout": f"{int(deadline * 1000)}m", **metadata}
        block = b"\x83\x86" + _literal(":path", path) + _literal(":authority", address)
        block += b"".join(_literal(name, value) for name, value in fields.items())
        bodies = [b"\x00" + struct.pack(">I", len(message)) + message for message in messages]
        # A call is these three with its stream's number after the first and the second.
        self._head = frame(HEADERS, END_HEADERS, 0, block)[:5]
        self._calls = [(block + frame(DATA, END_STREAM, 0, body)[:5], body) for body in bodies]
        self._deadline = deadline
        self._sent = 0
        self._selector = selectors.DefaultSelector()
        self._connections = [self._connect(Connection(self._socket())) for _ in range(connections)]
        self.figures = Figures()

    def run(self, *, rate: float, outstanding: int, warm_up: float, seconds: float, prompt: bool = False) -> Figures:
        """Loads the server for ``warm_up`` and ``seconds``, of which only the latter count.

        With ``prompt`` a rate's calls are sent when they are due and each answer is read as it comes, which times them to some
        20 µs instead of 2 ms and costs several times as much.
        """
        started, used = time.perf_counter(), time.process_time()
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
                self._open(connection)
            if rate and not prompt:
                time.sleep(_TICK)  # reading each answer as it comes would cost one system call a call
            for key, _ in self._selector.select(self._pause(started, rate, turn) if prompt or not rate else 0):
                self._read(key.data)
        self.figures.cpu_share = (time.process_time() - used) / (warm_up + seconds)
        for connection in self._connections:
            connection.sock.close()
        return self.figures

    def _pause(self, started: float, rate: float, turn: int) -> float:
        """Returns the seconds until the next call is due, at most a tick."""
        return min(_TICK, max(0.0, started + (turn + 1) / rate - time.perf_counter())) if rate else _TICK

    def _socket(self) -> socket.socket:
        sock = socket.create_connection(self._peer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, 2**31 - 1)
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))
        sock.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - 65_535)))
        sock.setblocking(False)
        return sock

    def _connect(self, connection: Connection) -> Connection:
        self._selector.register(connection.sock, selectors.EVENT_READ, connection)
        return connection

    def _lose(self, connection: Connection) -> None:
        """Counts what was open on a connection that the server closed, and connects anew."""
        self.figures.lost_connections += 1
        for at in connection.streams.values():
            self.figures.ended["LOST"] += at >= self._counted_from
        self._selector.unregister(connection.sock)
        connection.sock.close()
        fresh = Connection(self._socket(), waiting=connection.waiting)
        self._connections[self._connections.index(connection)] = self._connect(fresh)

    def _expire(self, connection: Connection, now: float) -> None:
        """Gives up what is past its deadline, as every gRPC client does."""
        oldest = now - self._deadline
        while connection.waiting and connection.waiting[0] < oldest:
            self.figures.ended["LATE"] += connection.waiting.popleft() >= self._counted_from
        while connection.streams:
            stream, at = next(iter(connection.streams.items()))
            if at >= oldest:
                break
            del connection.streams[stream]
            self.figures.ended["LATE"] += at >= self._counted_from
            connection.unsent += frame(RST_STREAM, 0, stream, struct.pack(">I", 8))

    def _open(self, connection: Connection) -> None:
        out = [connection.unsent]
        while connection.waiting and len(connection.streams) < connection.most_streams:
            middle, body = self._calls[self._sent % len(self._calls)]
            if connection.window < len(body):
                break
            self._sent += 1
            connection.window -= len(body)
            number = connection.next_stream.to_bytes(4, "big")
            connection.streams[connection.next_stream] = connection.waiting.popleft()
            connection.next_stream += 2
            out += (self._head, number, middle, number, body)
        data = b"".join(out)
        try:
            sent = connection.sock.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError:  # closed by the server; reading says so too
            return
        connection.unsent = data[sent:]

    def _read(self, connection: Connection) -> None:
        try:
            received = connection.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._lose(connection)
            return
        data, at = connection.unread + received, 0
        while len(data) - at >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(data, at)
            end = at + 9 + (high << 8 | low)
            if len(data) < end:
                break
            if kind == RST_STREAM or (flags & END_STREAM and kind in (HEADERS, DATA)):
                self._end(connection, kind, stream, data[at + 9 : end])
            elif kind in (SETTINGS, PING, WINDOW_UPDATE):
                self._serve(connection, kind, flags, stream, data[at + 9 : end])
            at = end
        connection.unread = data[at:]

    def _serve(self, connection: Connection, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Does what a frame about the connection asks for."""
        if kind == WINDOW_UPDATE:
            connection.window += int.from_bytes(payload, "big") if stream == 0 else 0
        elif not flags & ACK:
            if kind == SETTINGS:
                settings = dict(struct.iter_unpack(">HI", payload))
                connection.most_streams = settings.get(MAX_CONCURRENT_STREAMS, connection.most_streams)
            connection.unsent += frame(kind, ACK, 0, payload if kind == PING else b"")

    def _end(self, connection: Connection, kind: int, stream: int, payload: bytes) -> None:
        """Counts how a call ended."""
        started = connection.streams.pop(stream, None)
        if started is None or started < self._counted_from:
            return
        if kind == RST_STREAM:
            self.figures.ended[f"RST_STREAM {int.from_bytes(payload, 'big')}"] += 1
            return
        status = status_of(payload) if kind == HEADERS else "NO_STATUS"
        self.figures.ended[status] += 1
        if status == "OK":
            self.figures.seconds.append(time.perf_counter() - started)
        elif b"grpc-retry-pushback-ms" in payload:
            self.figures.pushed_back += 1


def main() -> None:
    """Loads the server and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="calls a second; 0: as many as --outstanding allows")
    parser.add_argument("--prompt", action="store_true", help="with --rate: time answers to 20 µs instead of 2 ms, at more cost")
    parser.add_argument("--outstanding", type=int, default=32)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds that do not count")
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    messages = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    load = Load(arguments.address, arguments.path, messages, connections=arguments.connections, deadline=arguments.deadline, metadata={})
    bounds = {"warm_up": arguments.warm_up, "seconds": arguments.seconds}
    figures = load.run(rate=arguments.rate, outstanding=arguments.outstanding, prompt=arguments.prompt, **bounds)
    ordered = sorted(figures.seconds) or [0.0]
    ended = figures.ended
    counts = {
        "offered": figures.offered,
        "answered": ended["OK"],
        "refused": ended.total() - ended["OK"] - ended["LATE"],
        "late": ended["LATE"],
        "pushed_back": figures.pushed_back,
    }
    result = {
        **{f"{name}_per_second": round(count / arguments.seconds, 1) for name, count in counts.items()},
        "answer_ms_p50": round(ordered[len(ordered) // 2] * 1e3, 2),
        "answer_ms_p99": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
        "ended": dict(ended.most_common()),
        "lost_connections": figures.lost_connections,
        "cpu_share": round(figures.cpu_share, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
