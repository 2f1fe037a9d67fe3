"""One worker process: serves by the settings its supervisor sends it, and stops when told or when the supervisor is gone.

Started as ``python -m server.workers.worker``; not meant for people. Standard input: one line of JSON with the settings, then
nothing, and its end is the order to stop. Standard output: one line of JSON with the ports when it answers.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict

from features.settings import SettingsError
from server.listening import Ports
from server.logs import configure
from server.loop import finished
from server.process import serve
from server.settings import ServerSettings


def main() -> int:
    """Serves until stopped; returns the exit status, 2 when a setting is at fault."""
    order = json.loads(sys.stdin.readline())
    configure(worker=order["worker"])
    os.environ["CONCORD_CONFIG_FILE"] = os.devnull  # what it says is in the order already
    try:
        finished(_work(ServerSettings(**order["settings"])))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - as the command line says it
        return 2
    return 0


async def _work(settings: ServerSettings) -> None:
    stop = asyncio.Event()
    watching = asyncio.create_task(_watch_supervisor(stop))
    await serve(settings, announce=_announce, stop=stop, is_worker=True)
    watching.cancel()


async def _watch_supervisor(stop: asyncio.Event) -> None:
    """Sets ``stop`` when standard input ends: a supervisor that was killed must leave no workers behind."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop.set()


def _announce(ports: Ports) -> None:
    print(json.dumps(asdict(ports)), flush=True)  # noqa: T201 - read by the supervisor


if __name__ == "__main__":
    sys.exit(main())
