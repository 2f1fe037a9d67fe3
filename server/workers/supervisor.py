"""The supervisor: starts worker processes on shared ports, starts again what dies, and stops all of them in good order."""

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from time import monotonic

import structlog
from prometheus_client import CollectorRegistry

from server.listening import Ports, shared_port
from server.metrics import serve_metrics
from server.security.gate import check_exposure
from server.settings import ServerSettings
from server.workers.metrics import WorkerMetrics

_log = structlog.get_logger(__name__)
# A worker that ends is started again after the first pause, which doubles up to the longest while it does not live long enough.
_FIRST_PAUSE, _LONGEST_PAUSE, _LONG_ENOUGH = 0.5, 30.0, 60.0
# Beyond the time that calls in flight may take: pauses for load balancers, a collector of traces that is away, leaving the fleet.
_STOP_SECONDS = 10.0


async def supervise(settings: ServerSettings, *, announce: Callable[[Ports], None]) -> int:
    """Runs ``settings.workers`` server processes until SIGTERM or SIGINT, then has all of them drain.

    Args:
        settings: everything a server can be told; ports that are 0 are picked once for all.
        announce: called once, when all workers answer.

    Returns:
        0 when all workers ended well; otherwise the exit status of one that did not. A worker that ends before all have answered
        once ends the others too: it would only fail again.

    Raises:
        SettingsError: an address cannot be shared, or is public and nothing was said about authentication.
    """
    check_exposure(settings, settings.host)
    with contextlib.ExitStack() as held:
        port = held.enter_context(shared_port(settings.host, settings.port, setting="CONCORD_PORT"))
        admin_port = settings.admin_port
        if admin_port >= 0:
            admin_port = held.enter_context(shared_port(settings.admin_host, admin_port, setting="CONCORD_ADMIN_PORT"))
        fixed = settings.model_copy(update={"port": port, "admin_port": admin_port})
        registry = CollectorRegistry()
        supervisor = Supervisor(fixed, registry, announce)
        if settings.metrics_port >= 0:
            endpoint = serve_metrics(registry, settings.host, settings.metrics_port)
            held.callback(endpoint.close)
            supervisor.metrics_port = endpoint.port
        return await supervisor.run()


class Supervisor:
    """Keeps the workers running; ``metrics_port`` is what it announces of its own."""

    def __init__(self, settings: ServerSettings, registry: CollectorRegistry, announce: Callable[[Ports], None]) -> None:
        self._settings = settings
        self._announce = announce
        self._answering: dict[int, Ports] = {}
        self._metrics = WorkerMetrics(registry, self._metrics_ports)
        self._stop = asyncio.Event()
        self._announced = False
        self.metrics_port = -1

    async def run(self) -> int:
        """Runs until told to stop; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        async with asyncio.TaskGroup() as group:
            keeping = [group.create_task(self._keep(number)) for number in range(self._settings.workers)]
        return max((task.result() for task in keeping), key=abs)

    def _metrics_ports(self) -> dict[int, int]:
        """Returns where the workers' own metrics are; asked on another thread, while workers come and go."""
        return {number: ports.metrics_port for number, ports in tuple(self._answering.items())}

    async def _keep(self, number: int) -> int:
        """Fills one place among the workers until told to stop; returns the exit status of the last process."""
        pause = _FIRST_PAUSE
        while True:
            started = monotonic()
            status = await self._work(number)
            if self._stop.is_set():
                return status
            if not self._announced:
                _log.error("a worker ended before all were ready", worker=number, status=status)
                self._stop.set()
                return status or 1
            pause = _FIRST_PAUSE if monotonic() - started > _LONG_ENOUGH else min(2 * pause, _LONGEST_PAUSE)
            _log.error("a worker ended and is started again", worker=number, status=status, pause_seconds=pause)
            self._metrics.restarts.labels(number).inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
                return 0

    async def _work(self, number: int) -> int:
        """Runs one process to its end, or ends it when told to stop; returns its exit status, negative for a signal that killed it."""
        try:
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "server.workers.worker", stdin=PIPE, stdout=PIPE)
        except OSError as error:  # no memory, or too many processes: it may be better later
            _log.error("a worker cannot be started", worker=number, problem=error.strerror)
            return 1
        hearing = asyncio.create_task(self._hear(number, process))
        ending, stopping = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait((ending, stopping), return_when=asyncio.FIRST_COMPLETED)
        status = ending.result() if ending.done() else await self._ended(process)
        for task in (hearing, stopping):
            task.cancel()
        await asyncio.wait((hearing, stopping))
        if self._answering.pop(number, None):
            self._count()
        return status

    async def _hear(self, number: int, process: Process) -> None:
        """Sends a process its order and waits for its word that it answers."""
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"worker": number, "settings": self._settings.model_dump(mode="json")}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        if line := await process.stdout.readline():
            self._answering[number] = Ports(**json.loads(line))
            self._count()

    def _count(self) -> None:
        """Notes how many answer, and announces the first time that all do."""
        self._metrics.ready.set(len(self._answering))
        if len(self._answering) == self._settings.workers and not self._announced:
            self._announced = True
            one = next(iter(self._answering.values()))
            self._announce(Ports(one.port, one.admin_port, self.metrics_port))

    async def _ended(self, process: Process) -> int:
        """Has a process drain and end; returns its exit status, 0 where it had not begun to listen to signals yet."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            status = await asyncio.wait_for(process.wait(), self._settings.drain_seconds + _STOP_SECONDS)
        except TimeoutError:
            _log.error("a worker does not stop and is killed", pid=process.pid)
            process.kill()
            status = await process.wait()
        return 0 if status == -signal.SIGTERM else status
