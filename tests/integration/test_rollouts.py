"""Three replicas as processes: a model replaces another everywhere at once, or nowhere."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from concord import Concord, error_details, user
from concord.v1 import models_pb2, models_pb2_grpc
from features.bundle import ENCODER
from features.models import publish
from server.settings import ServerSettings
from tests.guarantees.rollouts import History, Seen, Switch, late_answers, run_rollouts
from tests.integration.test_processes import customers, process, run
from tests.unit.bundles import vary_bundle

FAIL, WAIT = models_pb2.ACTIVATION_POLICY_FAIL, models_pb2.ACTIVATION_POLICY_WAIT


@dataclass(frozen=True)
class Fleet:
    """Replicas with a folder each, so that a bundle can be damaged for one of them."""

    settings: ServerSettings
    folders: list[Path]
    processes: list["Popen[str]"]
    addresses: list[str]
    versions: list[str]
    customers: list[str]

    def damage(self, replica: int, version: str) -> Path:
        """Makes it impossible for one replica to keep a bundle: where a file belongs stands a folder with something in it."""
        obstacle = self.folders[replica] / "bundles" / version / ENCODER
        (obstacle / "lost").mkdir(parents=True)
        return obstacle


def start(settings: ServerSettings, stack: ExitStack, folder: Path) -> tuple["Popen[str]", str]:
    return stack.enter_context(process(settings, CONCORD_DATA_DIR=str(folder)))


@pytest.fixture(scope="module")
def fleet(live: ServerSettings, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("rollouts")
    versions = ["rollout-a", "rollout-b", "rollout-c", "rollout-d", "damaged-fail", "damaged-wait", "killed", "told"]
    with psycopg.connect(live.postgres_dsn) as connection:
        for seed, version in enumerate(versions):
            vary_bundle(bundle, folder / version, version, seed=seed)
            publish(connection, folder / version, live.models_base)
    folders = [folder / f"replica-{k}" for k in range(3)]
    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        started = list(threads.map(lambda home: start(live, stack, home), folders))
        yield Fleet(live, folders, [one for one, _ in started], [address for _, address in started], versions, customers(live)[:40])


async def activate(address: str, version: str, *, wait: float = 20.0, **arguments: object) -> models_pb2.ActivateModelResponse:
    request = models_pb2.ActivateModelRequest(model_version=version, wait=Duration(seconds=int(wait)), **arguments)
    async with grpc.aio.insecure_channel(address) as wire:
        return await models_pb2_grpc.ModelServiceStub(wire).ActivateModel(request, timeout=wait + 5)


async def replicas(address: str) -> list[models_pb2.Replica]:
    async with grpc.aio.insecure_channel(address) as wire:
        answer = await models_pb2_grpc.ModelServiceStub(wire).ListReplicas(models_pb2.ListReplicasRequest(), timeout=5)
        return list(answer.replicas)


async def models_answering(fleet: Fleet) -> set[str]:
    seen = set()
    for address in fleet.addresses:
        async with Concord(address, channel="web", timeout=10.0) as client:
            seen.add((await client.recommend(user(fleet.customers[0]), surface="home")).versions.model_version)
    return seen


async def test_models_switch_under_load_without_a_mixed_late_or_failed_answer(fleet: Fleet) -> None:
    verdict = await run_rollouts(
        fleet.addresses,
        fleet.versions[:4],
        fleet.customers,
        count=10,
        pause_seconds=0.7,
        reader_pause_seconds=0.03,
        pids=[one.pid for one in fleet.processes],
    )
    assert (verdict.failures, verdict.mixed, verdict.late) == (0, 0, 0), verdict
    assert verdict.switches == 10
    assert verdict.answers > 300
    assert set(verdict.by_model) >= set(fleet.versions[:4])
    assert min(verdict.by_model.values()) > 5
    # Six switches after every model was loaded once: what is replaced is freed.
    for before, after in zip(verdict.rss[3], verdict.rss[-1], strict=True):
        assert after < before * 1.15


async def test_a_replica_that_cannot_load_a_model_keeps_serving_is_named_and_stops_the_activation(fleet: Fleet) -> None:
    before = await models_answering(fleet)
    fleet.damage(2, "damaged-fail")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activate(fleet.addresses[0], "damaged-fail", on_unready=FAIL)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error_details(refused.value).reason == "REPLICA_UNREADY"
    assert f"replica {fleet.addresses[2]}: BUNDLE_INVALID" in (refused.value.details() or "")
    assert await models_answering(fleet) == before
    listed = {replica.address: replica for replica in await replicas(fleet.addresses[1])}
    assert "damaged-fail" in listed[fleet.addresses[2]].failures
    assert not listed[fleet.addresses[0]].failures
    assert "BUNDLE_INVALID" in run(fleet.settings, "replicas", COLUMNS="300").stdout


async def test_the_answering_replica_names_its_own_failure(fleet: Fleet) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activate(fleet.addresses[2], "damaged-fail", on_unready=FAIL)
    assert error_details(refused.value).reason == "BUNDLE_INVALID"


async def test_an_activation_waits_for_the_repair_when_asked_to(fleet: Fleet) -> None:
    before = await models_answering(fleet)
    obstacle = fleet.damage(1, "damaged-wait")
    waiting = asyncio.create_task(activate(fleet.addresses[0], "damaged-wait", on_unready=WAIT))
    async with asyncio.timeout(10):
        while not any("damaged-wait" in replica.failures for replica in await replicas(fleet.addresses[0])):
            await asyncio.sleep(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as second:
        await activate(fleet.addresses[2], fleet.versions[0])
    assert second.value.code() is grpc.StatusCode.ABORTED
    assert error_details(second.value).reason == "ACTIVATION_IN_PROGRESS"
    assert not waiting.done()
    assert await models_answering(fleet) == before
    (obstacle / "lost").rmdir()
    obstacle.rmdir()
    assert (await waiting).model_version == "damaged-wait"
    assert await models_answering(fleet) == {"damaged-wait"}
    assert all(not replica.failures.get("damaged-wait") for replica in await replicas(fleet.addresses[0]))


async def test_a_repair_that_does_not_come_in_time_is_a_refusal(fleet: Fleet) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activate(fleet.addresses[0], "damaged-fail", on_unready=WAIT, wait=1)
    assert error_details(refused.value).reason == "REPLICA_UNREADY"
    await activate(fleet.addresses[0], fleet.versions[0])  # and nothing of it stays in the way


async def test_the_command_line_moves_the_whole_fleet_and_says_so_when_it_has_moved(fleet: Fleet) -> None:
    told = await asyncio.to_thread(run, fleet.settings, "activate", "told")
    assert "active: told" in told.stdout, told.stderr
    assert await models_answering(fleet) == {"told"}
    refused = await asyncio.to_thread(run, fleet.settings, "activate", "damaged-fail")
    assert refused.returncode == 2
    assert fleet.addresses[2] in refused.stderr.replace("\n", "")


async def test_a_killed_replica_stops_nobody_for_long_and_one_that_leaves_not_at_all(fleet: Fleet) -> None:
    with ExitStack() as stack:
        (dies, dead), (leaves, gone) = (start(fleet.settings, stack, fleet.folders[0].with_name(f"more-{k}")) for k in range(2))
        assert {dead, gone} <= {replica.address for replica in await replicas(fleet.addresses[0]) if replica.live}
        leaves.terminate()
        assert await asyncio.to_thread(leaves.wait, 15) == 0
        assert gone not in {replica.address for replica in await replicas(fleet.addresses[0])}
        dies.kill()
        await activate(fleet.addresses[1], "killed", wait=10)
    assert await models_answering(fleet) == {"killed"}
    listed = {replica.address: replica.live for replica in await replicas(fleet.addresses[0])}
    assert listed[dead] is False
    assert [listed[address] for address in fleet.addresses] == [True] * 3


def test_the_check_sees_an_old_answer_after_a_new_one() -> None:
    switch = Switch(10.0, 12.0, "new")
    new = Seen(10.5, 11.0, "a", "new", ("k",), "x")
    fine, late = replace(new, started=10.9, ended=11.5, model_version="old"), replace(new, started=11.1, ended=11.5, model_version="old")
    assert late_answers(History([switch], [new, fine])) == []
    assert late_answers(History([switch], [new, fine, late])) == [late]
    unanswered = replace(late, started=12.5, ended=12.6)
    assert late_answers(History([switch], [unanswered])) == [unanswered]
