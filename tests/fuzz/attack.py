"""Sends cases to a running server and counts what nobody should see: INTERNAL, a dead process, leaked text, growing memory."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil

from concord import error_details
from tests.fuzz.cases import Case

# What an error or a message must never hold: our insides, a store's own words, a file, an address of memory.
_LEAK = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|psycopg|redis\.|hiredis|sqlalchemy|onnxruntime|google\.protobuf"
    r"|\b(SELECT|INSERT|UPDATE|DELETE) .{0,40}\b(FROM|INTO|SET)\b|duplicate key|violates|object at 0x|CANARY",
    re.IGNORECASE,
)
# Codes of our own table. UNKNOWN and INTERNAL are bugs; DATA_LOSS, OUT_OF_RANGE and the rest are not in the contract.
_ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_IN_FLIGHT = 24
_TIMEOUT = 20.0


@dataclass
class Findings:
    """What came of the cases; ``examples`` holds the first case of each kind of finding."""

    cases: int = 0
    internal: int = 0
    crashes: int = 0
    leaks: int = 0
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    resident_mib: list[float] = field(default_factory=list)
    examples: dict[str, tuple[Case, str]] = field(default_factory=dict)

    def note(self, finding: str, case: Case, text: str) -> None:
        """Keeps the first example of a finding."""
        self.examples.setdefault(f"{finding} {case.method}", (case, text))

    @property
    def growth_mib(self) -> float:
        """How much more memory the server holds at the end than at half time: what is learned early is not a leak."""
        half = len(self.resident_mib) // 2
        return self.resident_mib[-1] - self.resident_mib[half] if half else 0.0


class Attack:
    """Fires cases a bounded number at a time: over the channel of their method, or that named ""; streams over one of their own."""

    def __init__(
        self, server: psutil.Process, channels: dict[str, grpc.aio.Channel], streams: grpc.Channel, *, advance: Callable[[int], None]
    ) -> None:
        self._server = server
        self._channels = channels
        self._streams = streams
        self._advance = advance
        self.findings = Findings()

    async def run(self, cases: Iterable[Case], *, sample_every: int) -> Findings:
        """Sends every case; memory is sampled at the start, every so many cases and at the end."""
        waiting: set[asyncio.Task[None]] = set()
        for number, case in enumerate(cases):
            if number % sample_every == 0:
                self._sample()
            if not self._server.is_running() or self._server.status() == psutil.STATUS_ZOMBIE:
                self.findings.crashes += 1
                self.findings.note("crash", case, "the server process is gone")
                break
            waiting.add(asyncio.create_task(self._send(case)))
            if len(waiting) >= _IN_FLIGHT:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*waiting)
        self._sample()
        return self.findings

    def _sample(self) -> None:
        self.findings.resident_mib.append(self._server.memory_info().rss / 2**20)

    async def _send(self, case: Case) -> None:
        code, text, known = grpc.StatusCode.OK, "", True
        try:
            if case.streaming:
                await asyncio.to_thread(self._stream, case)
            else:
                await self._unary(case)
        except (grpc.aio.AioRpcError, grpc.RpcError) as error:
            code, text = error.code(), _everything(error)
            known = bool(error_details(error).reason) or code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED}
        found = self.findings
        found.cases += 1
        found.codes[case.method.rpartition("/")[2], code.name] += 1
        if code not in _ALLOWED:
            found.internal += 1
            found.note("internal", case, text)
        elif code is grpc.StatusCode.UNAVAILABLE and not known:  # not our word for it: the connection broke under the call
            found.crashes += 1
            found.note("connection", case, text)
        if _LEAK.search(text):
            found.leaks += 1
            found.note("leak", case, text)
        self._advance(1)

    async def _unary(self, case: Case) -> None:
        call: Any = self._channels.get(case.method, self._channels[""]).unary_unary(case.method)
        await call(case.payloads[0], timeout=_TIMEOUT)

    def _stream(self, case: Case) -> None:
        """Over the blocking client: the asyncio one says INTERNAL itself when a stream ends while it is still writing."""
        call: Any = self._streams.stream_stream(case.method)
        for _ in call(iter(case.payloads), timeout=_TIMEOUT):
            pass


def _everything(error: Any) -> str:
    """All a caller sees of a failure, binary details included."""
    parts: Sequence[Any] = [error.details() or "", *(value for _, value in error.trailing_metadata() or ())]
    return " ".join(part.decode("latin-1") if isinstance(part, bytes) else str(part) for part in parts)
