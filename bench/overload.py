"""What is left of the answers when ten times as many are asked for as can be given: goodput against its peak, and health meanwhile.

Against a server that is up on a shop with customers; the load is a process of its own (``http2_load.py``), on the same machine:

    concord serve &   python bench/overload.py --server 127.0.0.1:50051

Prints a table and a last line of JSON. ``measure`` is what tests call.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from cli.context import shop
from concord.v1 import common_pb2, recommendation_pb2
from features.settings import Settings

RECOMMEND = "/concord.v1.RecommendationService/Recommend"
_LOAD = Path(__file__).with_name("http2_load.py")


@dataclass(frozen=True)
class Overload:
    """What was seen; rates are calls a second, times milliseconds."""

    peak: float
    offered: float
    goodput: float
    refused: float
    late: float
    answer_ms_p50: float
    answer_ms_p99: float
    health_asked: int
    health_failed: int
    health_ms_max: float

    @property
    def ratio(self) -> float:
        """Goodput over its peak."""
        return self.goodput / self.peak


async def measure(
    address: str, messages: Sequence[bytes], *, times: float = 10.0, seconds: float = 6.0, connections: int = 16, path: str = RECOMMEND
) -> Overload:
    """Finds the peak with as many calls in flight as keep the server busy, then offers ``times`` as much, each call with 1 s."""
    peak = await _load(address, messages, path, connections, seconds, "--outstanding", "24")
    stop = asyncio.Event()
    watching = asyncio.create_task(_watch(address, stop))
    under = await _load(address, messages, path, connections, seconds, "--rate", str(times * peak["answered_per_second"]))
    stop.set()
    answered, failed = await watching
    return Overload(
        peak=peak["answered_per_second"],
        offered=under["offered_per_second"],
        goodput=under["answered_per_second"],
        refused=under["refused_per_second"],
        late=under["late_per_second"],
        answer_ms_p50=under["answer_ms_p50"],
        answer_ms_p99=under["answer_ms_p99"],
        health_asked=len(answered) + failed,
        health_failed=failed,
        health_ms_max=round(max(answered, default=0.0) * 1e3, 1),
    )


async def _load(address: str, messages: Sequence[bytes], path: str, connections: int, seconds: float, *kind: str) -> dict[str, float]:
    words = ["--address", address, "--path", path, "--connections", str(connections), "--seconds", str(seconds), *kind]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_LOAD), *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate("\n".join(message.hex() for message in messages).encode())
    figures: dict[str, float] = json.loads(out)
    return figures


async def _watch(address: str, stop: asyncio.Event) -> tuple[list[float], int]:
    """Asks for health ten times a second, as an orchestrator would a little less often; returns seconds, and how many failed."""
    taken, failed = [], 0
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not stop.is_set():
            started = time.perf_counter()
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
                failed += answer.status != health_pb2.HealthCheckResponse.SERVING
                taken.append(time.perf_counter() - started)
            except grpc.aio.AioRpcError:
                failed += 1
            await asyncio.sleep(0.1)
    return taken, failed


def requests(dsn: str, count: int = 200) -> list[bytes]:
    """Returns requests for the home page of customers with a history."""
    query = "SELECT user_id FROM users WHERE version > 0 AND merged_into IS NULL ORDER BY user_id LIMIT %s"
    with psycopg.connect(dsn) as connection:
        customers = [row[0] for row in connection.execute(query, [count])]
    return [
        recommendation_pb2.RecommendRequest(
            subject=common_pb2.Subject(user_id=customer), channel="web", surface="home", limit=20
        ).SerializeToString()
        for customer in customers
    ]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--connections", type=int, default=16)
    arguments = parser.parse_args()
    with shop(Settings) as settings:
        messages = requests(settings.postgres_dsn)
    seen = asyncio.run(
        measure(arguments.server, messages, times=arguments.times, seconds=arguments.seconds, connections=arguments.connections)
    )
    table = Table("overload", "")
    for name, value in asdict(seen).items():
        table.add_row(name.replace("_", " "), f"{value:,.1f}")
    Console().print(table)
    print(json.dumps({"bench": "overload", "ratio": round(seen.ratio, 3), **asdict(seen)}))


if __name__ == "__main__":
    main()
