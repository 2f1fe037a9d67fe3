"""The server as a whole: every method of the contract answers, health flips, reflection can be switched off, stopping drains."""

import asyncio
import importlib
import inspect
import pkgutil
import socket
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

import concord.v1
from concord.v1 import common_pb2, recommendation_pb2
from features.settings import SettingsError
from server.logs import configure
from server.metrics import Metrics
from server.rpc.server import SERVICE_NAMES, build_server
from server.settings import ServerSettings
from tests.edge import serving
from tests.fakes import FakeRecommender, Fakes

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def contract() -> list[ServiceDescriptor]:
    names = [module.name for module in pkgutil.iter_modules(concord.v1.__path__) if module.name.endswith("_pb2")]
    files: list[FileDescriptor] = [importlib.import_module(f"concord.v1.{name}").DESCRIPTOR for name in names]
    return [service for file in files for service in file.services_by_name.values()]


def test_every_service_of_the_contract_is_served() -> None:
    assert sorted(SERVICE_NAMES) == sorted(service.full_name for service in contract())


@pytest.mark.parametrize("service", contract(), ids=lambda service: service.name)
async def test_every_method_of_the_contract_is_implemented(service: ServiceDescriptor) -> None:
    async with serving() as edge:
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            call: Any = edge.channel.stream_stream(path)() if method.client_streaming else edge.channel.unary_unary(path)(b"")
            if method.client_streaming:
                await call.write(b"")
            assert await call.code() in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}, path


def test_no_servicer_method_is_left_to_the_generated_base() -> None:
    for service in contract():
        module = importlib.import_module("server.rpc." + service.file.name.rsplit("/", 1)[1].removesuffix(".proto"))
        servicer = next(value for name, value in vars(module).items() if name.endswith("Servicer") and inspect.isclass(value))
        assert {method.name for method in service.methods} <= set(vars(servicer))


@pytest.mark.parametrize("path", ["/concord.v1.RecommendationService/Divine", "/concord.v1.OracleService/Ask", "/other.Service/Call"])
async def test_unknown_methods_are_unimplemented(path: str) -> None:
    async with serving() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(path)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_not_serving_until_flipped() -> None:
    server = build_server(Fakes().services(), ServerSettings(port=0), Metrics(CollectorRegistry()), configure())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(service: str = "") -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

        assert {await status(name) for name in ("", *SERVICE_NAMES)} == {NOT_SERVING}
        await server.set_serving(True)
        assert {await status(name) for name in ("", *SERVICE_NAMES)} == {SERVING}
        await server.set_serving(False)
        assert {await status(name) for name in ("", *SERVICE_NAMES)} == {NOT_SERVING}
    await server.stop(0)


async def test_stopping_tells_watchers_and_does_not_wait_for_them() -> None:
    async with serving() as edge:
        watch = health_pb2_grpc.HealthStub(edge.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        started = asyncio.get_running_loop().time()
        await edge.server.stop(20)
        assert asyncio.get_running_loop().time() - started < 5
        assert (await watch.read()).status == NOT_SERVING


async def test_stopping_lets_calls_in_flight_finish() -> None:
    request = recommendation_pb2.RecommendRequest(subject=common_pb2.Subject(user_id="u"), channel="web", surface="home")
    path = "/concord.v1.RecommendationService/Recommend"
    async with serving(Fakes(recommender=FakeRecommender(delay=1.2))) as edge:
        call = asyncio.create_task(edge.raw(path, request.SerializeToString()))
        await edge.fakes.recommender.called.wait()
        stopping = asyncio.create_task(edge.server.stop(10))
        await asyncio.sleep(0.5)  # past the pause in which new calls are still taken
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.raw(path, request.SerializeToString(), timeout=2)
        assert recommendation_pb2.RecommendResponse.FromString(await call).slate_id == "s1"
        await stopping
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("settings", "switched_on"),
    [
        ({"reflection": True, "host": "0.0.0.0"}, True),
        ({"reflection": False}, False),
        ({}, True),
        ({"host": "0.0.0.0"}, False),
    ],
)
async def test_reflection_lists_the_services_where_it_is_on(settings: dict[str, Any], switched_on: bool) -> None:
    async with serving(**settings) as edge:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(edge.channel).ServerReflectionInfo(iter([request]))
        if not switched_on:
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
            return
        listed = {service.name for service in (await call.read()).list_services_response.service}
    assert set(SERVICE_NAMES) < listed


async def test_a_taken_port_is_an_error_not_a_silent_second_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(SettingsError, match=f"CONCORD_PORT.*{settings.port}"):
            build_server(Fakes().services(), settings, Metrics(CollectorRegistry()), configure())


async def test_garbage_on_the_port_hurts_nobody() -> None:
    async with serving() as edge:
        for junk in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\xff" * 500, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(junk)
            await writer.drain()
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await writer.wait_closed()
        request = recommendation_pb2.RecommendRequest(subject=common_pb2.Subject(user_id="u"), channel="web", surface="home")
        await edge.raw("/concord.v1.RecommendationService/Recommend", request.SerializeToString())
