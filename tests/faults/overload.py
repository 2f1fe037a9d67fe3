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
        peak = await _load(server.address, messages, seconds=max(2, world.scaled(6)), outstanding=32)
        capacity = peak["answered_per_second"]
        loading = asyncio.create_task(_load(server.address, messages, seconds=max(3, world.scaled(8)), rate=10 * capacity))
        asked: dict[str, list[Reply]] = {"health": [], "admin": [], "refused": []}
        while not loading.done():
            asked["health"].append(await timed(health_pb2_grpc.HealthStub(admin.wire).Check(health_pb2.HealthCheckRequest(), timeout=2)))
            asked["admin"].append(await timed(admin.models.ListModels(models_pb2.ListModelsRequest(), timeout=2)))
            asked["refused"].append(await caller.recommend(world.customer(), timeout=1))
            await asyncio.sleep(0.05)
        under = await loading
        after = [await caller.recommend(whom) for whom in world.several(20)]
    goodput = under["answered_per_second"] / capacity
    checks.expect(under["offered_per_second"] > 8 * capacity, f"offered only {under['offered_per_second'] / capacity:.1f}x")
    checks.expect(goodput >= 0.8, f"goodput {goodput:.0%} of the peak")
    for name in ("health", "admin"):
        checks.expect(all(reply.ok for reply in asked[name]) and len(asked[name]) > 5, f"{name}: {codes(asked[name])}")
    shed = [reply for reply in asked["refused"] if reply.code == "RESOURCE_EXHAUSTED"]
    checks.expect({reply.code for reply in asked["refused"]} <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, codes(asked["refused"]))
    checks.expect(all((reply.pushback_ms or 0) > 0 for reply in shed), "refusals with pushback")
    checks.expect(all(reply.ok for reply in after), f"afterwards {codes(after)}")
    checks.tell(
        f"peak {capacity:.0f}/s; offered {under['offered_per_second']:.0f}/s: answered {under['answered_per_second']:.0f}/s ({goodput:.0%}), "
        f"refused {under['refused_per_second']:.0f}/s, late {under['late_per_second']:.0f}/s; a caller among them saw {codes(asked['refused'])}; "
        f"health {codes(asked['health'])}, admin {codes(asked['admin'])} (p95 {percentile(asked['admin'], 0.95):.0f} ms)"
    )
    return checks.seen()


def _message(whom: str) -> str:
    request = recommendation_pb2.RecommendRequest(
        subject=Subject(user_id=whom), channel="web", surface="home", limit=10, skip_exposure_logging=True
    )
    return request.SerializeToString().hex()


async def _load(address: str, messages: Sequence[str], *, seconds: float, rate: float = 0.0, outstanding: int = 0) -> dict[str, Any]:
    """Runs the load of bench/http2_load.py in a process of its own; returns its figures."""
    command = [sys.executable, str(_LOAD), "--address", address, "--path", _PATH, "--rate", str(rate), "--outstanding", str(outstanding)]
    command += ["--seconds", str(seconds), "--warm-up", "1"]
    done = await asyncio.to_thread(subprocess.run, command, input="\n".join(messages), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-500:]
    return dict(json.loads(done.stdout))
