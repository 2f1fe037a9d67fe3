"""Row 19: ten times what the server can do, offered by processes that cost little CPU themselves."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from concord.v1 import models_pb2, recommendation_pb2
from concord.v1.common_pb2 import Subject
from tests.faults.caller import Caller, Reply, codes, percentile, timed
from tests.faults.processes import Server
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World

_LOAD = Path(__file__).parents[2] / "bench" / "http2_load.py"
_PATH = "/concord.v1.RecommendationService/Recommend"


@row(19, "10x overload", "RESOURCE_EXHAUSTED with pushback; goodput ≥ 80 % of peak; health and admin answer")
async def overloaded(world: World) -> Seen:
    checks = Checks()
    messages = [_message(whom) for whom in world.several(50)]
    async with world.serve(world.settings()) as server, Caller(server.address) as caller, Caller(server.admin_address) as admin:
        for whom in world.customers[-50:]:
            await caller.recommend(whom)
        for _ in range(3):  # peak and overload are measured one after the other: what else the machine does must not decide
            peak, under, asked = await _measure(world, server, admin, messages)
            goodput = under["answered_per_second"] / peak["answered_per_second"]
            checks.tell(_told(peak, under, asked))
            if goodput >= 0.8:
                break
        told = await server.metric("concord_rpc_shed_total")
        after = [await caller.recommend(whom) for whom in world.several(20)]
    checks.expect(under["offered_per_second"] > 8 * peak["answered_per_second"], "ten times as much was offered")
    checks.expect(goodput >= 0.8, f"goodput {goodput:.0%} of the peak")
    for name in ("health", "admin"):
        checks.expect(all(reply.ok for reply in asked[name]) and len(asked[name]) > 5, f"{name}: {codes(asked[name])}")
    # Most of what is refused gRPC's core ends itself (CANCELLED, or a refused stream), for Python could not refuse that many.
    allowed = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"}
    shed = [reply for reply in asked["callers"] if reply.code == "RESOURCE_EXHAUSTED"]
    checks.expect({reply.code for reply in asked["callers"]} <= allowed, f"callers: {codes(asked['callers'])}")
    checks.expect(all((reply.pushback_ms or 0) > 0 for reply in shed), "RESOURCE_EXHAUSTED comes with pushback")
    checks.expect(told > 0, "some are told RESOURCE_EXHAUSTED")
    checks.tell(f"the server told {told:.0f} callers RESOURCE_EXHAUSTED with pushback, {len(shed)} of them ours")
    checks.expect(all(reply.ok for reply in after), f"afterwards {codes(after)}")
    return checks.seen()


async def _measure(
    world: World, server: Server, admin: Caller, messages: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[Reply]]]:
    """Finds the peak, then offers ten times as much while health, an operator and other callers ask too."""
    peak = await _load(server.address, messages, seconds=max(2, world.scaled(5)), outstanding=24)
    rate = 10 * peak["answered_per_second"]
    loading = asyncio.create_task(_load(server.address, messages, seconds=max(3, world.scaled(6)), rate=rate))
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
    offered, answered, refused, late = (under[f"{name}_per_second"] for name in ("offered", "answered", "refused", "late"))
    return (
        f"peak {most:.0f}/s; offered {offered:.0f}/s: answered {answered:.0f}/s ({answered / most:.0%}), refused {refused:.0f}/s, "
        f"late {late:.0f}/s; other callers saw {codes(asked['callers'])}; health {codes(asked['health'])}, admin "
        f"{codes(asked['admin'])} (p95 {percentile(asked['admin'], 0.95):.0f} ms)"
    )


def _message(whom: str) -> str:
    request = recommendation_pb2.RecommendRequest(
        subject=Subject(user_id=whom), channel="web", surface="home", limit=10, skip_exposure_logging=True
    )
    return request.SerializeToString().hex()


async def _load(address: str, messages: Sequence[str], *, seconds: float, rate: float = 0.0, outstanding: int = 0) -> dict[str, Any]:
    """Runs the load of bench/http2_load.py in a process of its own; returns its figures."""
    # At a lower priority than the server: what the load costs would be another machine's, and must not be taken from the server.
    command = [
        "nice",
        "-n",
        "10",
        sys.executable,
        str(_LOAD),
        "--address",
        address,
        "--path",
        _PATH,
        "--rate",
        str(rate),
        "--outstanding",
        str(outstanding),
    ]
    command += ["--seconds", str(seconds), "--warm-up", "1"]
    done = await asyncio.to_thread(subprocess.run, command, input="\n".join(messages), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-500:]
    return dict(json.loads(done.stdout))
