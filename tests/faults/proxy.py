"""A TCP proxy that cuts, delays, stalls and swallows, per direction: between a client, a server and its stores."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

UP, DOWN = "up", "down"  # towards the target, towards the caller
_CHUNK = 256 * 1024


@dataclass(eq=False)
class Link:
    """One connection through the proxy. ``swallow`` makes the next bytes of the target vanish and the connection close."""

    caller: asyncio.StreamWriter
    target: asyncio.StreamWriter
    chunks_up: int = 0
    swallow: bool = False
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def close(self) -> None:
        """Ends both sides at once."""
        for writer in (self.caller, self.target):
            writer.transport.abort()


Tap = Callable[[Link, str, bytes], Awaitable[bool]]
"""Sees each chunk before it is passed on (link, direction, bytes); False drops it and closes the connection."""


class Proxy:
    """Forwards 127.0.0.1:``port`` to a TCP port or a Unix socket.

    Attributes:
        delay: seconds each chunk waits, per direction.
        accepting: False closes new connections at once, as a host whose service is down would.
        flowing: per direction, cleared while nothing may pass.
        tap: looks at each chunk.
    """

    def __init__(self, target: int | str, *, tap: Tap | None = None) -> None:
        self._target = target
        self.tap = tap
        self.delay = {UP: 0.0, DOWN: 0.0}
        self.flowing = {UP: asyncio.Event(), DOWN: asyncio.Event()}
        for flows in self.flowing.values():
            flows.set()
        self.accepting = True
        self.links: set[Link] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        """Opens the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Closes the port and every connection."""
        self._server.close()
        tasks = [task for link in self.links for task in link.tasks]
        self.cut()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Ends all connections; new ones are served."""
        for link in list(self.links):
            link.close()

    def stall(self, *directions: str) -> None:
        """Lets nothing pass from now on; connections stay open."""
        for direction in directions:
            self.flowing[direction].clear()

    def flow(self) -> None:
        """Lets everything pass again."""
        for flows in self.flowing.values():
            flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.accepting:
            writer.transport.abort()
            return
        try:
            if isinstance(self._target, str):
                from_target, to_target = await asyncio.open_unix_connection(self._target)
            else:
                from_target, to_target = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, to_target)
        self.links.add(link)
        link.tasks = {
            asyncio.ensure_future(self._pump(link, UP, reader, to_target)),
            asyncio.ensure_future(self._pump(link, DOWN, from_target, writer)),
        }
        try:
            await asyncio.wait(link.tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            link.close()
            self.links.discard(link)
            for task in link.tasks:
                task.cancel()

    async def _pump(self, link: Link, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                if self.delay[direction]:
                    await asyncio.sleep(self.delay[direction])
                await self.flowing[direction].wait()
                if direction == UP:
                    link.chunks_up += 1
                if self.tap is not None and not await self.tap(link, direction, data):
                    return
                sink.write(data)
                await sink.drain()


class LostCommits:
    """A tap that lets a COMMIT through and then swallows PostgreSQL's answer to it: done, but the caller never learns.

    Args:
        marker: bytes that must have passed on the connection before, so that the commit of these and no other is lost.
        count: how many commits to lose.
    """

    def __init__(self, marker: bytes, *, count: int = 1) -> None:
        self._marker = marker
        self._left = count
        self._armed: set[Link] = set()
        self.lost = 0

    async def __call__(self, link: Link, direction: str, data: bytes) -> bool:
        """Marks the connection at the COMMIT and drops what comes back, which proves that the commit is done."""
        if direction == UP:
            if self._marker in data:
                self._armed.add(link)
            if self._left and link in self._armed and b"COMMIT" in data:
                self._left -= 1
                self._armed.discard(link)
                link.swallow = True
        elif link.swallow:
            self.lost += 1
            return False
        return True
