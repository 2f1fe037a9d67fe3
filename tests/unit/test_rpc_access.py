"""Every call proves who it is, has the scope, speaks for its own channel; admin calls are noted; no channel starves another."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from concord.v1 import (
    assistant_pb2,
    catalog_pb2,
    common_pb2,
    events_pb2,
    identity_pb2,
    models_pb2,
    profile_pb2,
    recommendation_pb2,
    search_pb2,
)
from server.errors import UnauthenticatedError, UnavailableError
from server.security.gate import Gate
from server.security.principals import Principal, principal
from server.security.scopes import ALL_SCOPES, CHANNEL_SCOPES, Scope
from tests.edge import Edge, Refusal, refusal, serving
from tests.fakes import FakeAudit, FakeRecommender, Fakes

RECOMMEND = "/concord.v1.RecommendationService/Recommend"
RECORD = "/concord.v1.EventService/RecordEvents"
ACTIVATE = "/concord.v1.ModelService/ActivateModel"
LINK = "/concord.v1.IdentityService/LinkIdentities"
RESOLVE = "/concord.v1.IdentityService/ResolveIdentity"
ASK = "/concord.v1.AssistantService/Ask"
SEARCH = "/concord.v1.SearchService/Search"
Code = grpc.StatusCode


@dataclass
class Keyring:
    """Who holds which key."""

    holders: dict[str, Principal] = field(
        default_factory=lambda: {
            "web-key": principal("key:web/1", ["web"], CHANNEL_SCOPES),
            "read-key": principal("key:reader/1", ["web"], [Scope.RECOMMENDATIONS_READ, Scope.IDENTITY_READ]),
            "limited-key": principal("key:limited/1", ["web"], ALL_SCOPES),
            "operator-key": principal("key:operator/1", ["*"], ALL_SCOPES),
        }
    )

    async def authenticate(self, bearer: str) -> Principal:
        if bearer not in self.holders:
            raise UnauthenticatedError("unknown", reason="CREDENTIALS_INVALID")
        return self.holders[bearer]


def guarded(**more: Any) -> Fakes:
    return Fakes(gate=Gate(Keyring(), open_to_all=False), **more)


def ask(channel: str = "web") -> bytes:
    subject = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="app", channel_user_id="anna"))
    return recommendation_pb2.RecommendRequest(subject=subject, channel=channel, surface="home").SerializeToString()


def event(channel: str, met_in: str = "") -> events_pb2.Event:
    subject = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel=met_in or channel, channel_user_id="anna"))
    return events_pb2.Event(subject=subject, channel=channel, action=common_pb2.ACTION_VIEW, item_id="i1")


def events(*happened: events_pb2.Event) -> bytes:
    return events_pb2.RecordEventsRequest(events=happened).SerializeToString()


def bearer(key: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {key}"),)}


async def refused(edge: Edge, method: str, message: bytes = b"", **options: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.raw(method, message, **options)
    return refusal(caught.value)


async def test_without_a_valid_key_nothing_is_answered() -> None:
    async with serving(guarded()) as edge:
        for options, reason in (({}, "CREDENTIALS_MISSING"), (bearer("guess"), "CREDENTIALS_INVALID"), (bearer(""), "CREDENTIALS_MISSING")):
            seen = await refused(edge, RECOMMEND, ask(), **options)
            assert (seen.code, seen.reason) == (Code.UNAUTHENTICATED, reason)
        assert edge.fakes.recommender.calls == []
        await edge.raw(RECOMMEND, ask(), **bearer("web-key"))
        await edge.raw(RECOMMEND, ask(), metadata=(("authorization", "bearer web-key"),))
    assert len(edge.fakes.recommender.calls) == 2
    assert {entry.outcome for entry in edge.fakes.audit.entries} == {
        "UNAUTHENTICATED CREDENTIALS_MISSING",
        "UNAUTHENTICATED CREDENTIALS_INVALID",
    }


async def test_a_bad_key_is_told_before_the_message_is_looked_at() -> None:
    async with serving(guarded()) as edge:
        assert (await refused(edge, RECOMMEND, b"\xff\xff")).code is Code.UNAUTHENTICATED


async def test_health_needs_no_key() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with serving(guarded()) as edge:
        answer = await health_pb2_grpc.HealthStub(edge.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_key_needs_the_methods_scope() -> None:
    upsert = catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item(item_id="i", title="t")]).SerializeToString()
    async with serving(guarded()) as edge:
        for key, method, message in (
            ("read-key", RECORD, events(event("web"))),
            ("web-key", "/concord.v1.CatalogService/UpsertItems", upsert),
            ("web-key", ACTIVATE, models_pb2.ActivateModelRequest(model_version="m").SerializeToString()),
        ):
            seen = await refused(edge, method, message, **bearer(key))
            assert (seen.code, seen.reason) == (Code.PERMISSION_DENIED, "SCOPE_MISSING")
        assert edge.fakes.recorder.calls == edge.fakes.catalog.calls == edge.fakes.models.calls == []
        await edge.raw("/concord.v1.CatalogService/UpsertItems", upsert, **bearer("operator-key"))
    assert edge.fakes.audit.entries[-1].principal == "key:web/1"


async def test_the_catalogue_is_written_for_the_whole_shop_or_not_at_all() -> None:
    upsert = catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item(item_id="i", title="t", channels=["app"])]).SerializeToString()
    async with serving(guarded()) as edge:
        seen = await refused(edge, "/concord.v1.CatalogService/UpsertItems", upsert, **bearer("limited-key"))
        assert (seen.code, seen.reason) == (Code.PERMISSION_DENIED, "CHANNEL_FORBIDDEN")
        assert edge.fakes.catalog.calls == []


async def test_a_read_that_may_create_needs_the_right_to_write() -> None:
    identity = common_pb2.ChannelIdentity(channel="web", channel_user_id="new")
    create = identity_pb2.ResolveIdentityRequest(identity=identity, create_if_missing=True).SerializeToString()
    find = identity_pb2.ResolveIdentityRequest(identity=identity).SerializeToString()
    async with serving(guarded()) as edge:
        assert (await refused(edge, RESOLVE, create, **bearer("read-key"))).reason == "SCOPE_MISSING"
        assert (await refused(edge, RESOLVE, find, **bearer("read-key"))).reason == "IDENTITY_UNKNOWN"
        await edge.raw(RESOLVE, create, **bearer("web-key"))


async def test_a_question_is_recorded_so_its_identity_must_be_the_callers() -> None:
    async with serving(guarded()) as edge:
        for channel, name, allowed in (("web", "web", True), ("web", "app", False), ("app", "app", False)):
            subject = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel=name, channel_user_id="a"))
            request = assistant_pb2.AskRequest(subject=subject, channel=channel, text="hello").SerializeToString()
            if allowed:
                await edge.raw(ASK, request, **bearer("web-key"))
            else:
                assert (await refused(edge, ASK, request, **bearer("web-key"))).reason == "CHANNEL_FORBIDDEN"
        named = assistant_pb2.AskRequest(subject=common_pb2.Subject(user_id="u1"), channel="web", text="hello")
        await edge.raw(ASK, named.SerializeToString(), **bearer("web-key"))


async def test_a_search_that_is_recorded_needs_the_right_to_write_events() -> None:
    subject = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="web", channel_user_id="a"))
    recorded = search_pb2.SearchRequest(subject=subject, channel="web", query="mug")
    looked = search_pb2.SearchRequest(subject=subject, channel="web", query="mug", skip_recording=True)
    async with serving(guarded()) as edge:
        assert (await refused(edge, SEARCH, recorded.SerializeToString(), **bearer("read-key"))).reason == "SCOPE_MISSING"
        await edge.raw(SEARCH, looked.SerializeToString(), **bearer("read-key"))
        await edge.raw(SEARCH, recorded.SerializeToString(), **bearer("web-key"))
        of_app = common_pb2.Subject(identity=common_pb2.ChannelIdentity(channel="app", channel_user_id="a"))
        # What is recorded is the caller's; who a customer is may be known from any channel.
        met = search_pb2.SearchRequest(subject=of_app, channel="web", query="mug")
        assert (await refused(edge, SEARCH, met.SerializeToString(), **bearer("web-key"))).reason == "CHANNEL_FORBIDDEN"
        met.skip_recording = True
        await edge.raw(SEARCH, met.SerializeToString(), **bearer("web-key"))
        elsewhere = search_pb2.SearchRequest(subject=subject, channel="app", query="mug", skip_recording=True)
        assert (await refused(edge, SEARCH, elsewhere.SerializeToString(), **bearer("web-key"))).reason == "CHANNEL_FORBIDDEN"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RECORD, events(event("app"))),
        (RECORD, events(event("web"), event("app"))),
        (RECORD, events(event("web", met_in="app"))),
        (RECOMMEND, ask("app")),
        (RESOLVE, identity_pb2.ResolveIdentityRequest(identity={"channel": "app", "channel_user_id": "a"}).SerializeToString()),
        (
            LINK,
            identity_pb2.LinkIdentitiesRequest(
                identity={"channel": "app", "channel_user_id": "a"}, subject={"user_id": "u"}
            ).SerializeToString(),
        ),
    ],
)
async def test_a_channel_speaks_for_itself_alone(method: str, message: bytes) -> None:
    async with serving(guarded()) as edge:
        seen = await refused(edge, method, message, **bearer("web-key"))
        assert (seen.code, seen.reason) == (Code.PERMISSION_DENIED, "CHANNEL_FORBIDDEN")
        assert edge.fakes.recorder.calls == edge.fakes.recommender.calls == edge.fakes.identities.calls == []
        assert edge.fakes.audit.entries[0].outcome == "PERMISSION_DENIED CHANNEL_FORBIDDEN"
        await edge.raw(method, message, **bearer("operator-key")) if method != RESOLVE else None


async def test_a_channel_may_ask_about_a_customer_another_one_met() -> None:
    async with serving(guarded()) as edge:
        await edge.raw(RECOMMEND, ask("web"), **bearer("web-key"))
        link = identity_pb2.LinkIdentitiesRequest(
            identity={"channel": "web", "channel_user_id": "a"}, subject={"identity": {"channel": "app", "channel_user_id": "b"}}
        )
        await edge.raw(LINK, link.SerializeToString(), **bearer("web-key"))
        await edge.raw(LINK, link.SerializeToString(), **bearer("operator-key"))
        link.subject.identity.channel = "web"
        await edge.raw(LINK, link.SerializeToString(), **bearer("web-key"))
        link.subject.user_id = "u"
        await edge.raw(LINK, link.SerializeToString(), **bearer("web-key"))
    may_create = [call[2] for call in edge.fakes.graph.calls]
    assert may_create == [False, True, True, True]  # an identity of the app exists already, or the app brings it in


async def test_a_stream_is_held_to_the_same() -> None:
    async with serving(guarded()) as edge:
        method: Any = edge.channel.stream_stream("/concord.v1.EventService/StreamEvents")
        anonymous = method()
        assert await anonymous.code() is Code.UNAUTHENTICATED
        call = method(**bearer("web-key"))
        await call.write(events_pb2.StreamEventsRequest(sequence=1, events=[event("web")]).SerializeToString())
        assert events_pb2.StreamEventsResponse.FromString(await call.read()).sequence == 1
        await call.write(events_pb2.StreamEventsRequest(sequence=2, events=[event("app")]).SerializeToString())
        assert await call.code() is Code.PERMISSION_DENIED
    assert len(edge.fakes.recorder.calls) == 1


async def test_a_stream_does_not_outlive_the_key_it_was_opened_with() -> None:
    keyring = Keyring()
    async with serving(Fakes(gate=Gate(keyring, open_to_all=False))) as edge, asyncio.timeout(5):
        method: Any = edge.channel.stream_stream("/concord.v1.EventService/StreamEvents")
        call = method(**bearer("web-key"))
        message = events_pb2.StreamEventsRequest(events=[event("web")]).SerializeToString()
        await call.write(message)
        await call.read()
        holder = keyring.holders.pop("web-key")
        await call.write(message)
        assert await call.code() is Code.UNAUTHENTICATED
        keyring.holders["web-key"] = holder
        call = method(**bearer("web-key"))
        await call.write(message)
        await call.read()
        keyring.holders["web-key"] = principal(holder.name, ["web"], [Scope.RECOMMENDATIONS_READ])
        await call.write(message)
        assert await call.code() is Code.PERMISSION_DENIED
    assert len(edge.fakes.recorder.calls) == 2


async def test_admin_methods_have_a_port_of_their_own() -> None:
    activate = models_pb2.ActivateModelRequest(model_version="m2").SerializeToString()
    async with serving(guarded(), admin_port=0) as edge:
        assert edge.server.admin_port != edge.server.port
        seen = await refused(edge, ACTIVATE, activate, **bearer("operator-key"))
        assert (seen.code, seen.reason) == (Code.PERMISSION_DENIED, "WRONG_PORT")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.server.admin_port}") as channel:
            admin = Edge(edge.fakes, edge.server, channel, edge.registry, edge.log)
            assert (await refused(admin, RECOMMEND, ask(), **bearer("operator-key"))).reason == "WRONG_PORT"
            assert (await refused(admin, ACTIVATE, activate, **bearer("web-key"))).reason == "SCOPE_MISSING"
            assert edge.fakes.models.calls == []
            await admin.raw(ACTIVATE, activate, **bearer("operator-key"))
            for anywhere in (admin, edge):
                await anywhere.raw("/concord.v1.ModelService/ListModels", **bearer("operator-key"))
    outcomes = [(entry.principal, entry.method, entry.target, entry.outcome) for entry in edge.fakes.audit.entries]
    assert outcomes[-2:] == [
        ("key:operator/1", "ModelService/ActivateModel", "model:m2", "REQUESTED"),
        ("key:operator/1", "ModelService/ActivateModel", "model:m2", "OK"),
    ]
    assert [outcome[3] for outcome in outcomes[:3]] == ["PERMISSION_DENIED WRONG_PORT"] * 2 + ["PERMISSION_DENIED SCOPE_MISSING"]


async def test_an_admin_call_that_cannot_be_noted_is_not_done() -> None:
    fakes = Fakes(audit=FakeAudit(error=UnavailableError("no log", reason="AUDIT_UNAVAILABLE")))
    async with serving(fakes) as edge:
        seen = await refused(edge, ACTIVATE, models_pb2.ActivateModelRequest(model_version="m2").SerializeToString())
    assert (seen.code, seen.reason) == (Code.UNAVAILABLE, "AUDIT_UNAVAILABLE")
    assert edge.fakes.models.calls == []


async def test_a_failed_admin_call_is_noted_as_failed() -> None:
    fakes = Fakes()
    fakes.models.error = RuntimeError("secret")
    async with serving(fakes) as edge:
        await refused(edge, ACTIVATE, models_pb2.ActivateModelRequest(model_version="m2").SerializeToString())
    assert [entry.outcome for entry in edge.fakes.audit.entries] == ["REQUESTED", "FAILED"]
    assert "secret" not in str(edge.fakes.audit.entries)


async def test_a_merge_is_noted_without_naming_the_customer_in_clear() -> None:
    link = identity_pb2.LinkIdentitiesRequest(identity={"channel": "web", "channel_user_id": "a"}, subject={"user_id": "u"})
    async with serving() as edge:
        await edge.raw(LINK, link.SerializeToString())
    (entry,) = edge.fakes.audit.entries
    assert (entry.method, entry.outcome, entry.target, entry.customer) == ("IdentityService/LinkIdentities", "OK MERGED", "", "u2")


async def test_one_channel_cannot_take_all_the_room() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=0.5)), max_in_flight=4, channel_share=0.5) as edge:
        calls = [asyncio.create_task(edge.raw(RECOMMEND, ask("web"))) for _ in range(3)]
        await edge.fakes.recommender.called.wait()
        await asyncio.sleep(0.1)
        await edge.raw(RECOMMEND, ask("app"))
        results = await asyncio.gather(*calls, return_exceptions=True)
    (error,) = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert (error.code(), refusal(error).reason) == (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")


async def test_a_channel_that_calls_too_often_is_told_when_to_come_back() -> None:
    async with serving(channel_calls_per_second=1) as edge:
        for _ in range(2):
            await edge.raw(RECOMMEND, ask())
        seen = await refused(edge, RECOMMEND, ask())
        await edge.raw(RECOMMEND, ask("app"))
        many = events(*[event("web")] * 5)
    assert (seen.code, seen.reason) == (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert 0 < int(seen.pushback) <= 1000
    async with serving(channel_events_per_second=1) as edge:
        await edge.raw(RECORD, many)
        assert (await refused(edge, RECORD, many)).reason == "RATE_LIMITED"
        await edge.raw(RECOMMEND, ask())  # which records no events


async def test_a_call_that_names_no_channel_counts_for_that_of_its_caller() -> None:
    keyring = Keyring()
    keyring.holders["app-key"] = principal("key:app/1", ["app"], CHANNEL_SCOPES)
    profile = profile_pb2.GetProfileRequest(subject={"user_id": "u"}).SerializeToString()
    method = "/concord.v1.ProfileService/GetProfile"
    async with serving(Fakes(gate=Gate(keyring, open_to_all=False)), channel_calls_per_second=1) as edge:
        for _ in range(2):
            await edge.raw(method, profile, **bearer("web-key"))
        assert (await refused(edge, method, profile, **bearer("web-key"))).reason == "RATE_LIMITED"
        await edge.raw(method, profile, **bearer("app-key"))


async def test_health_operators_and_other_services_answer_while_one_service_is_full() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with serving(Fakes(recommender=FakeRecommender(delay=1.0)), max_in_flight=2) as edge:
        for method, message in (("/concord.v1.ModelService/ListModels", b""), (RECORD, events(event("web")))):
            await edge.raw(method, message)  # a method nobody has called yet would be let in anyway
        held = [asyncio.create_task(edge.raw(RECOMMEND, ask())) for _ in range(8)]
        await edge.fakes.recommender.called.wait()
        await asyncio.sleep(0.05)
        async with asyncio.timeout(0.8):
            await health_pb2_grpc.HealthStub(edge.channel).Check(health_pb2.HealthCheckRequest())
            await edge.raw("/concord.v1.ModelService/ListModels")
            await edge.raw(RECORD, events(event("web")))
        results = await asyncio.gather(*held, return_exceptions=True)
    reasons = [refusal(result).reason for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert set(reasons) == {"SERVER_OVERLOADED"}
    assert len(reasons) in {5, 6}  # a call on its way in is not counted yet, and so one more may be let in
    assert edge.registry.get_sample_value("concord_rpc_shed_total") == len(reasons)


async def test_operators_are_not_counted_among_customers_calls() -> None:
    fakes = Fakes()
    fakes.models.delay = 0.2
    async with serving(fakes, max_in_flight=1) as edge:
        await edge.raw("/concord.v1.ModelService/ListModels")
        await asyncio.gather(*(edge.raw("/concord.v1.ModelService/ListModels") for _ in range(6)))


async def test_operators_calls_are_not_counted_against_the_rate_of_calls_without_a_channel() -> None:
    profile = profile_pb2.GetProfileRequest(subject={"user_id": "u"}).SerializeToString()
    async with serving(channel_calls_per_second=1) as edge:
        for _ in range(2):
            await edge.raw("/concord.v1.ProfileService/GetProfile", profile)
        assert (await refused(edge, "/concord.v1.ProfileService/GetProfile", profile)).reason == "RATE_LIMITED"
        for _ in range(5):
            await edge.raw("/concord.v1.ModelService/ListModels")


async def test_a_full_service_accepts_late() -> None:
    """What keeps overload out of Python: while two calls are worked on, most of the others wait unaccepted."""
    async with serving(Fakes(recommender=FakeRecommender(delay=0.3)), max_in_flight=2, max_streams_per_connection=500) as edge:
        held = [asyncio.create_task(edge.raw(RECOMMEND, ask())) for _ in range(400)]
        await edge.fakes.recommender.called.wait()
        await asyncio.sleep(0.2)
        shed = edge.registry.get_sample_value("concord_rpc_shed_total") or 0
        await asyncio.gather(*held, return_exceptions=True)
    assert shed <= 60  # one in 4 ms; without waiting, all of them at once


async def wave(edge: Edge, count: int) -> list[Refusal]:
    """Makes calls at once; returns how those ended that were not answered."""
    ended = await asyncio.gather(*(edge.raw(RECOMMEND, ask()) for _ in range(count)), return_exceptions=True)
    return [refusal(error) for error in ended if isinstance(error, grpc.aio.AioRpcError)]


async def test_while_grpc_turns_calls_away_some_callers_are_told_when_to_come_back() -> None:
    """The service has room all the time: what piles up does so before it is accepted, so nothing but the core's count tells."""
    told: list[Refusal] = []
    async with serving(max_in_flight=100_000, max_streams_per_connection=5_000) as edge, asyncio.timeout(30):
        while not told:
            told = [one for one in await wave(edge, 2_000) if one.code is Code.RESOURCE_EXHAUSTED]
        shed = edge.registry.get_sample_value("concord_rpc_shed_total")
    assert {(one.reason, one.pushback) for one in told} == {("SERVER_OVERLOADED", "250")}
    assert shed == len(told)


async def test_a_burst_that_finds_a_place_to_wait_is_answered() -> None:
    async with serving(max_streams_per_connection=5_000) as edge:
        await edge.raw(RECOMMEND, ask())
        for _ in range(15):  # more than the core may keep waiting, but never at once
            assert await wave(edge, 100) == []
        assert not edge.registry.get_sample_value("concord_rpc_shed_total")


async def test_calls_that_wait_to_be_let_in_do_not_hold_up_the_end() -> None:
    async with serving(Fakes(recommender=FakeRecommender(delay=1)), max_in_flight=1, max_streams_per_connection=500) as edge:
        calls = [asyncio.create_task(edge.raw(RECOMMEND, ask())) for _ in range(400)]
        await edge.fakes.recommender.called.wait()
        async with asyncio.timeout(5):
            await edge.server.stop(20)
            ended = await asyncio.gather(*calls, return_exceptions=True)
    assert any(isinstance(one, bytes) for one in ended)
