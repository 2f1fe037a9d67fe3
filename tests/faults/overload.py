"""Row 19: ten times what the server can do, offered by processes that cost little CPU themselves."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from concord.v1 import models_pb2, recommendation_pb2
from concord.v1.common_pb2 import Subject
from tests.faults.caller import Caller, Reply, codes, percentile, timed
from tests.faults.processes import Server
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World

_LOAD = Path(__file__).parents[2] / "bench" / "http2_load.py"
_PATH = "/concord.v1.RecommendationService/Recommend"
_ROUNDS = 3  # peak and overload follow each other: what else the machine does must not decide
# Most of what is refused gRPC's core ends itself (CANCELLED, or a refused stream), for Python could not refuse that many.
_ALLOWED = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "LATE", "CANCELLED", "UNAVAILABLE", "RST_STREAM 7"}


@row(19, "10x overload", "RESOURCE_EXHAUSTED with pushback; goodput ≥ 80 % of peak; health and admin answer")
async def overloaded(world: World) -> Seen:
    checks = Checks()
    messages = [_message(whom) for whom in world.several(50)]
    async with world.serve(world.settings()) as server, Caller(server.address) as caller, Caller(server.admin_address) as admin:
        for whom in world.customers[-50:]:
            await caller.recommend(whom)
        rounds = [await _measure(world, server, admin, messages) for _ in range(_ROUNDS)]
        after = [await caller.recommend(whom) for whom in world.several(20)]
    shares = sorted(under["answered_per_second"] / peak["answered_per_second"] for peak, under, _ in rounds)
    goodput = shares[_ROUNDS // 2]
    checks.expect(goodput >= 0.8, f"goodput {goodput:.0%} of the peak")
    told = sum(under["pushed_back_per_second"] for _, under, _ in rounds) / sum(under["refused_per_second"] for _, under, _ in rounds)
    checks.expect(told == 1, f"only {told:.1%} of the refused were told RESOURCE_EXHAUSTED with pushback")
    checks.tell(f"goodput {goodput:.0%} of the peak, the median of {', '.join(f'{share:.0%}' for share in shares)}")
    for peak, under, asked in rounds:
        checks.tell(_told(peak, under, asked))
        checks.expect(under["offered_per_second"] > 8 * peak["answered_per_second"], "ten times as much was offered")
        for name in ("health", "admin"):
            checks.expect(all(reply.ok for reply in asked[name]) and len(asked[name]) > 5, f"{name}: {codes(asked[name])}")
        ended = set(under["ended"]) | {reply.code for reply in asked["callers"]}
        checks.expect(ended <= _ALLOWED, f"callers: {ended - _ALLOWED}")
        checks.expect(under["ended"].get("RESOURCE_EXHAUSTED", 0) > 0, "some are told RESOURCE_EXHAUSTED")
        shed = [reply for reply in asked["callers"] if reply.code == "RESOURCE_EXHAUSTED"]
        checks.expect(all((reply.pushback_ms or 0) > 0 for reply in shed), "RESOURCE_EXHAUSTED comes with pushback")
    checks.expect(all(reply.ok for reply in after), f"afterwards {codes(after)}")
    return checks.seen()


async def _measure(
    world: World, server: Server, admin: Caller, messages: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[Reply]]]:
    """Finds the peak, then offers ten times as much while health, an operator and other callers ask too."""
    peak = await _load(server, messages, seconds=max(2, world.scaled(5)), outstanding=32)
    rate = 10 * peak["answered_per_second"]
    loading = asyncio.create_task(_load(server, messages, seconds=max(3, world.scaled(6)), rate=rate))
    asked: dict[str, list[Reply]] = {"health": [], "admin": [], "callers": []}
    health = health_pb2_grpc.HealthStub(admin.wire)
    async with Caller(server.address, timeout=1) as other:
        while not loading.done():
            asked["health"].append(await timed(health.Check(health_pb2.HealthCheckRequest(), timeout=3)))
            asked["admin"].append(await timed(admin.models.ListModels(models_pb2.ListModelsRequest(), timeout=3)))
            asked["callers"] += await asyncio.gather(*(other.recommend(world.customer()) for _ in range(16)))
            await asyncio.sleep(0.05)
    return peak, await loading, asked


def _told(peak: dict[str, Any], under: dict[str, Any], asked: dict[str, list[Reply]]) -> str:
    most = peak["answered_per_second"]
    offered, answered, refused, told = (under[f"{name}_per_second"] for name in ("offered", "answered", "refused", "pushed_back"))
    return (
        f"peak {most:.0f}/s; offered {offered:.0f}/s: answered {answered:.0f}/s ({answered / most:.0%}; "
        f"{_per_processor(under, peak):.0%} for the time its event loop had a processor) in {under['answer_ms_p50']:.0f} ms, "
        f"refused {refused:.0f}/s, {told:.0f}/s of them told; ended {under['ended']}; "
        f"the load took {under['cpu_share']:.0%} of a core; other callers saw {codes(asked['callers'])}; "
        + ", ".join(f"{name} {codes(asked[name])} (p95 {percentile(asked[name], 0.95):.0f} ms)" for name in ("health", "admin"))
    )


def _per_processor(under: dict[str, Any], peak: dict[str, Any]) -> float:
    """Returns goodput over peak for the time on a processor: what others did on the machine is left out."""
    return float(under["answered_per_second"] / under["loop_share"] / (peak["answered_per_second"] / peak["loop_share"]))


def _loop_seconds(server: Server) -> float:
    """Returns how long the main thread of the server was on a processor."""
    (main,) = (thread for thread in psutil.Process(server.process.pid).threads() if thread.id == server.process.pid)
    return float(main.user_time + main.system_time)


def _message(whom: str) -> str:
    request = recommendation_pb2.RecommendRequest(
        subject=Subject(user_id=whom), channel="web", surface="home", limit=10, skip_exposure_logging=True
    )
    return request.SerializeToString().hex()


async def _load(server: Server, messages: Sequence[str], *, seconds: float, rate: float = 0.0, outstanding: int = 0) -> dict[str, Any]:
    """Runs the load of bench/http2_load.py in a process of its own; returns its figures, and how much of a core the event loop had."""
    command = [
        sys.executable,
        str(_LOAD),
        "--address",
        server.address,
        "--path",
        _PATH,
        "--rate",
        str(rate),
        "--outstanding",
        str(outstanding),
    ]
    command += ["--seconds", str(seconds), "--warm-up", "1"]
    before, started = _loop_seconds(server), time.monotonic()
    done = await asyncio.to_thread(subprocess.run, command, input="\n".join(messages), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-500:]
    return {**json.loads(done.stdout), "loop_share": (_loop_seconds(server) - before) / (time.monotonic() - started)}
