"""Health: which services can answer with what is there, without flapping, and told apart by name."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from server import health
from server.errors import UnavailableError
from server.health import DEPENDENCIES, NEEDS, Health, HealthWatch, Probe
from server.metrics import Metrics
from server.rpc.server import SERVICE_NAMES
from tests.edge import serving

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
RECOMMENDATION, EVENT = "concord.v1.RecommendationService", "concord.v1.EventService"

SEARCH, UNDERSTANDING = "concord.v1.SearchService", "concord.v1.UnderstandingService"


class Dependency:
    """Answers, fails or hangs as told."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.hang: asyncio.Event | None = None

    async def __call__(self) -> None:
        self.asked += 1
        if self.hang is not None:
            await self.hang.wait()
        if self.error is not None:
            raise self.error


class Watched:
    def __init__(self, pause_seconds: float = 0.0) -> None:
        self.registry = CollectorRegistry()
        self.dependencies = {name: Dependency() for name in DEPENDENCIES}
        self.published: list[Health] = []
        probes = {name: Probe(dependency, pause_seconds) for name, dependency in self.dependencies.items()}
        self.watch = HealthWatch(probes, Metrics(self.registry), self._publish)

    async def _publish(self, seen: Health) -> None:
        self.published.append(seen)

    def metric(self, dependency: str) -> float | None:
        return self.registry.get_sample_value("concord_dependency_up", {"dependency": dependency})


def up(*names: str) -> Health:
    return Health({name: name in names for name in DEPENDENCIES})


def test_every_service_says_what_it_needs_and_nothing_unknown() -> None:
    assert set(NEEDS) == set(SERVICE_NAMES)
    assert {name for needs in NEEDS.values() for group in needs for name in group} <= set(DEPENDENCIES)


@pytest.mark.parametrize(
    ("there", "able"),
    [
        (("postgres", "redis", "snapshot"), set(SERVICE_NAMES)),
        (("redis", "snapshot"), {RECOMMENDATION, "concord.v1.FeatureService", SEARCH, UNDERSTANDING}),
        (("postgres", "snapshot"), set(SERVICE_NAMES)),
        (("postgres", "redis"), set(SERVICE_NAMES) - {RECOMMENDATION, SEARCH, UNDERSTANDING, "concord.v1.AssistantService"}),
        (("snapshot", "model", "index", "registry"), set()),
    ],
)
def test_services_follow_from_what_is_there(there: tuple[str, ...], able: set[str]) -> None:
    assert {name for name, can in up(*there).services.items() if can} == able
    assert up(*there).overall == (RECOMMENDATION in able)


async def test_one_lost_ping_is_no_outage_and_one_answer_ends_one() -> None:
    watched = Watched()
    await watched.watch.look()
    assert watched.metric("redis") == 1
    redis = watched.dependencies["redis"]
    seen = []
    for failing in (True, False, True, True, True, False, True):
        redis.error = ConnectionError() if failing else None
        seen.append((await watched.watch.look()).dependencies["redis"])
    assert seen == [True, True, True, False, False, True, True]
    redis.error = ConnectionError()
    await watched.watch.look()
    assert watched.metric("redis") == 0
    assert watched.metric("postgres") == 1


async def test_nothing_is_up_before_it_has_answered() -> None:
    watched = Watched()
    watched.dependencies["postgres"].error = UnavailableError("x", reason="X")
    assert not (await watched.watch.look()).dependencies["postgres"]


async def test_a_dependency_that_hangs_is_away_is_asked_once_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.02)
    watched = Watched()
    await watched.watch.look()
    postgres = watched.dependencies["postgres"]
    postgres.hang = asyncio.Event()
    looks = [await watched.watch.look() for _ in range(4)]
    assert [look.dependencies["postgres"] for look in looks] == [True, False, False, False]
    assert all(look.dependencies["redis"] for look in looks)
    assert postgres.asked == 2
    postgres.hang.set()
    assert (await watched.watch.look()).dependencies["postgres"]


async def test_two_who_look_at_once_ask_once_each_in_turn() -> None:
    watched = Watched()
    first, second = await asyncio.gather(watched.watch.look(), watched.watch.look())
    assert first == second
    assert {dependency.asked for dependency in watched.dependencies.values()} == {2}


async def test_an_expensive_probe_runs_at_its_pace_while_well_and_at_once_while_not() -> None:
    watched = Watched(pause_seconds=3600)
    model = watched.dependencies["model"]
    await watched.watch.look()
    await watched.watch.look()
    assert model.asked == 1
    failing = Watched(pause_seconds=3600)
    failing.dependencies["model"].error = RuntimeError("x")
    await failing.watch.look()
    await failing.watch.look()
    assert failing.dependencies["model"].asked == 2


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    return {name: int(answer.status) for name, answer in listed.statuses.items()}


async def test_degraded_states_are_told_apart_over_grpc() -> None:
    async with serving() as edge:
        await edge.server.show_health(up("postgres", "snapshot"))
        seen = await statuses(edge.channel)
        assert {name.removeprefix("concord.dependency."): seen[name] == SERVING for name in seen if "dependency" in name} == {
            name: name in {"postgres", "snapshot"} for name in DEPENDENCIES
        }
        assert seen[""] == seen[EVENT] == SERVING
        await edge.server.show_health(up("redis", "snapshot"))
        seen = await statuses(edge.channel)
        assert (seen[""], seen[EVENT], seen[RECOMMENDATION]) == (SERVING, NOT_SERVING, SERVING)
        checked = await health_pb2_grpc.HealthStub(edge.channel).Check(health_pb2.HealthCheckRequest(service="concord.dependency.postgres"))
        assert checked.status == NOT_SERVING


async def test_dependencies_that_are_up_make_no_service_serve_before_it_is_warm() -> None:
    async with serving() as edge:
        await edge.server.set_serving(False)
        await edge.server.show_health(up(*DEPENDENCIES))
        seen = await statuses(edge.channel)
        assert {seen[name] for name in ("", *SERVICE_NAMES)} == {NOT_SERVING}
        assert seen["concord.dependency.redis"] == SERVING
        await edge.server.set_serving(True)
        assert set((await statuses(edge.channel)).values()) == {SERVING}


async def test_a_watcher_hears_of_a_change_and_of_nothing_else() -> None:
    async with serving() as edge:
        watch = health_pb2_grpc.HealthStub(edge.channel).Watch(health_pb2.HealthCheckRequest(service=EVENT))

        async def said() -> Any:
            return (await asyncio.wait_for(watch.read(), 5)).status

        assert await said() == SERVING
        for _ in range(3):
            await edge.server.show_health(up("postgres", "snapshot"))
        await edge.server.show_health(up("redis", "snapshot"))
        assert await said() == NOT_SERVING
        watch.cancel()


async def test_after_the_stop_nothing_serves_again() -> None:
    async with serving() as edge:
        stopping = asyncio.create_task(edge.server.stop(1))
        await asyncio.sleep(0.05)
        await edge.server.show_health(up(*DEPENDENCIES))
        seen = await statuses(edge.channel)
        assert {seen[name] for name in ("", *SERVICE_NAMES)} == {NOT_SERVING}
        await stopping


async def test_the_watch_looks_until_it_is_ended_and_leaves_no_task() -> None:
    watched = Watched()
    running = asyncio.create_task(watched.watch.run(0.001))
    await _until(lambda: len(watched.published) > 3)
    watched.dependencies["redis"].hang = asyncio.Event()
    asked = watched.dependencies["redis"].asked
    await _until(lambda: watched.dependencies["redis"].asked > asked)
    running.cancel()
    await asyncio.wait([running])
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "Dependency" in repr(task.get_coro())]


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)
