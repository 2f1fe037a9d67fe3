"""The client against a small real gRPC server: tokens, retries, deadlines and error details."""
# ruff: noqa: N802 - gRPC names the methods of a servicer.

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from uuid import UUID

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from concord import Concord, ErrorDetails, error_details, tls, user
from concord.customers import TokenMemory, subject_of
from concord.transport import SERVICE_CONFIG
from concord.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    common_pb2,
    events_pb2,
    events_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
    understanding_pb2,
    understanding_pb2_grpc,
)
from concord.v1.common_pb2 import ACTION_PURCHASE


class Shop(
    events_pb2_grpc.EventServiceServicer,
    identity_pb2_grpc.IdentityServiceServicer,
    profile_pb2_grpc.ProfileServiceServicer,
    catalog_pb2_grpc.CatalogServiceServicer,
    recommendation_pb2_grpc.RecommendationServiceServicer,
    search_pb2_grpc.SearchServiceServicer,
    understanding_pb2_grpc.UnderstandingServiceServicer,
):
    """Keeps what it received, fails as often as told, and stores events under the user id ``u-<channel_user_id>``."""

    def __init__(self, *, unavailable=0, error=None, seconds=0.0):
        self.unavailable = unavailable
        self.seconds = seconds
        self.error = error
        self.fails_with_token = False
        self.refusal = grpc.StatusCode.UNAVAILABLE
        self.received = []
        self.deadlines = []
        self.bearers = []
        self.versions = {}
        self.survivors = {}

    async def _enter(self, request, context):
        self.received.append(request)
        self.deadlines.append(context.time_remaining())
        self.bearers.append(dict(context.invocation_metadata()).get("authorization"))
        await asyncio.sleep(self.seconds)
        if self.unavailable:
            self.unavailable -= 1
            await context.abort(self.refusal, "away")
        if self.error is not None and (not self.fails_with_token or request.consistency_token):
            context.set_trailing_metadata((("grpc-status-details-bin", self.error),))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad request")

    def _user(self, subject):
        user_id = subject.user_id or f"u-{subject.identity.channel_user_id}"
        return self.survivors.get(user_id, user_id)

    def _state(self, subject):
        user_id = self._user(subject)
        version = self.versions.get(user_id)
        return {"user_id": user_id, "user_version": version, "consistency_token": f"{user_id}@{version}"} if version else {}

    async def RecordEvents(self, request, context):
        await self._enter(request, context)
        results, tokens = [], {}
        for event in request.events:
            user_id = self._user(event.subject)
            version = self.versions[user_id] = self.versions.get(user_id, 0) + 1
            tokens[user_id] = events_pb2.UserToken(user_id=user_id, user_version=version, consistency_token=f"{user_id}@{version}")
            results.append(events_pb2.EventResult(event_id=event.event_id, status=events_pb2.EVENT_STATUS_STORED, user_id=user_id))
        return events_pb2.RecordEventsResponse(results=results, tokens=tokens.values(), online=True)

    async def LinkIdentities(self, request, context):
        await self._enter(request, context)
        lost, kept = f"u-{request.identity.channel_user_id}", self._user(request.subject)
        self.survivors[lost] = kept
        version = self.versions[kept] = self.versions.get(kept, 0) + self.versions.get(lost, 0) + 1
        return identity_pb2.LinkIdentitiesResponse(
            user_id=kept, user_version=version, consistency_token=f"{kept}@{version}", merged_user_id=lost
        )

    async def UnlinkIdentity(self, request, context):
        await self._enter(request, context)
        parted, kept = f"u-{request.identity.channel_user_id}", "u-anna"
        self.survivors.pop(parted, None)
        version = max(self.versions.values()) + 1
        other = identity_pb2.SeparatedCustomer(user_id=kept, user_version=version, consistency_token=f"{kept}@{version}")
        return identity_pb2.UnlinkIdentityResponse(
            user_id=parted, user_version=version, consistency_token=f"{parted}@{version}", separated_customers=[other]
        )

    async def ForgetUser(self, request, context):
        await self._enter(request, context)
        return identity_pb2.ForgetUserResponse(receipt_id="r")

    async def GetIdentityGraph(self, request, context):
        await self._enter(request, context)
        return identity_pb2.GetIdentityGraphResponse(user_id=self._user(request.subject))

    async def ResolveIdentity(self, request, context):
        await self._enter(request, context)
        return identity_pb2.ResolveIdentityResponse(user_id="u-anna", created=request.create_if_missing)

    async def GetProfile(self, request, context):
        await self._enter(request, context)
        return profile_pb2.GetProfileResponse(**self._state(request.subject))

    async def GetItems(self, request, context):
        await self._enter(request, context)
        return catalog_pb2.GetItemsResponse(not_found_item_ids=request.item_ids)

    async def Recommend(self, request, context):
        await self._enter(request, context)
        state = self._state(request.subject)
        versions = common_pb2.Versions(user_version=state.pop("user_version", 0))
        return recommendation_pb2.RecommendResponse(items=[recommendation_pb2.RecommendedItem(item_id="A")], versions=versions, **state)

    async def RankItems(self, request, context):
        await self._enter(request, context)
        return recommendation_pb2.RankItemsResponse(unknown_item_ids=request.item_ids)

    async def SimilarItems(self, request, context):
        await self._enter(request, context)
        return recommendation_pb2.SimilarItemsResponse(items=[recommendation_pb2.SimilarItem(item_id="B")])

    async def Search(self, request, context):
        """Answers from the state before the search, with a token of that after it."""
        await self._enter(request, context)
        user_id = self._user(request.subject)
        version = self.versions.get(user_id, 0)
        recorded = version if request.skip_recording else version + 1
        self.versions[user_id] = recorded
        return search_pb2.SearchResponse(
            versions=common_pb2.Versions(user_version=version),
            recorded_version=recorded,
            user_id=user_id,
            consistency_token=f"{user_id}@{recorded}",
        )

    async def Suggest(self, request, context):
        await self._enter(request, context)
        return search_pb2.SuggestResponse(suggestions=[search_pb2.Suggestion(text=f"{request.prefix}mug")])

    async def EmbedText(self, request, context):
        await self._enter(request, context)
        return understanding_pb2.EmbedTextResponse(model_version="m1")


@asynccontextmanager
async def serving(shop):
    """Yields the address at which ``shop`` is served."""
    server = grpc.aio.server()
    for add in (
        events_pb2_grpc.add_EventServiceServicer_to_server,
        identity_pb2_grpc.add_IdentityServiceServicer_to_server,
        profile_pb2_grpc.add_ProfileServiceServicer_to_server,
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server,
        recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server,
        search_pb2_grpc.add_SearchServiceServicer_to_server,
        understanding_pb2_grpc.add_UnderstandingServiceServicer_to_server,
    ):
        add(shop, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def connected(shop, **options):
    """Yields a client of ``shop``, in channel web, whose event ids count up."""
    numbers = count(1)
    async with serving(shop) as address:
        settings = {"channel": "web", "timeout": 10.0, "new_event_id": lambda: UUID(int=next(numbers))} | options
        async with Concord(address, **settings) as concord:
            yield concord


def test_service_config_retries_what_was_not_done_and_throttles():
    config = json.loads(SERVICE_CONFIG)
    (method,) = config["methodConfig"]
    assert method["name"] == [{}]  # every method
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert method["retryPolicy"]["maxAttempts"] == 4
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.1}


async def test_event_carries_everything_said():
    async with connected(Shop()) as concord:
        at = datetime(2026, 5, 1, 12, tzinfo=UTC)
        event = concord.event("anna", "purchase", item_id="A", value=3.5, quantity=2, session_id="s", slate_id="l", occurred_at=at)
    assert event.action == ACTION_PURCHASE
    assert (event.channel, event.subject.identity.channel, event.subject.identity.channel_user_id) == ("web", "web", "anna")
    assert (event.item_id, event.value, event.quantity, event.session_id, event.slate_id) == ("A", 3.5, 2, "s", "l")
    assert event.occurred_at.ToDatetime(tzinfo=UTC) == at
    assert UUID(event.event_id) == UUID(int=1)


async def test_event_refuses_unknown_actions_and_naive_times():
    async with connected(Shop()) as concord:
        with pytest.raises(ValueError, match="ACTION_STEAL"):
            concord.event("anna", "steal")
        with pytest.raises(ValueError, match="time zone"):
            concord.event("anna", "view", item_id="A", occurred_at=datetime(2026, 5, 1))  # noqa: DTZ001
        assert not concord.event("anna", "search", text="lamp").HasField("value")


async def test_read_after_write_sends_the_newest_token():
    shop = Shop()
    async with connected(shop) as concord:
        await concord.recommend("anna", surface="home")
        await concord.record(concord.event("anna", "view", item_id="A"))
        await concord.record(concord.event("anna", "view", item_id="B"))
        await concord.recommend("anna", surface="home")
        await concord.rank("anna", ["A"], surface="search")
        await concord.profile("anna")
        await concord.profile(user("u-anna"))
        await concord.recommend("ben", surface="home")
        await concord.recommend("anna", surface="home", consistency_token="handed over")
    tokens = [request.consistency_token for request in shop.received if hasattr(request, "consistency_token")]
    assert tokens == ["", "u-anna@2", "u-anna@2", "u-anna@2", "u-anna@2", "", "handed over"]


async def test_token_follows_the_customer_through_a_merge():
    shop = Shop()
    async with connected(shop) as concord:
        await concord.record(concord.event("anna", "view", item_id="A"), concord.event("guest", "view", item_id="B"))
        answer = await concord.link("guest", "anna")
        assert (answer.user_id, answer.user_version) == ("u-anna", 3)
        for customer in ("guest", "anna", user("u-guest"), user("u-anna")):
            await concord.profile(customer)
    assert [request.consistency_token for request in shop.received[2:]] == ["u-anna@3"] * 4


async def test_what_one_answer_reflected_the_next_one_must():
    shop = Shop()
    async with connected(shop) as concord:
        shop.versions["u-anna"] = 4  # another backend wrote
        await concord.recommend("anna", surface="home")
        await concord.profile("anna")
        shop.versions["u-anna"] = 2  # a replica that lags answers, flagged stale: what was seen before still holds
        await concord.recommend("anna", surface="home")
        await concord.rank(user("u-anna"), ["A"], surface="home")
    assert [request.consistency_token for request in shop.received] == ["", "u-anna@4", "u-anna@4", "u-anna@4"]


@pytest.mark.parametrize("reason", ["TOKEN_OF_OTHER_USER", "SUBJECT_UNKNOWN"])
async def test_a_remembered_token_that_outlived_its_customer_is_dropped(reason):
    shop = Shop()
    async with connected(shop) as concord:
        await concord.record(concord.event("anna", "view", item_id="A"))
        shop.error, shop.fails_with_token = packed_status(ErrorInfo(reason=reason, domain="concord")), True
        assert (await concord.recommend("anna", surface="home")).items
        assert [request.consistency_token for request in shop.received[1:]] == ["u-anna@1", ""]
        with pytest.raises(grpc.aio.AioRpcError):
            await concord.recommend("ben", surface="home", consistency_token="handed over")  # the caller's own to explain


async def test_tokens_part_with_the_customers_and_go_with_the_forgotten():
    shop = Shop()
    async with connected(shop) as concord:
        await concord.record(concord.event("anna", "view", item_id="A"), concord.event("guest", "view", item_id="B"))
        await concord.link("guest", "anna")
        answer = await concord.unlink("guest", "anna")
        assert (answer.user_id, answer.user_version) == ("u-guest", 4)
        for customer in ("guest", "anna", user("u-guest"), user("u-anna")):
            await concord.profile(customer)
        assert (await concord.forget("guest")).receipt_id == "r"
        assert (await concord.graph("anna")).user_id == "u-anna"
        await concord.profile("guest")
        await concord.profile("anna")
    tokens = [request.consistency_token for request in shop.received if hasattr(request, "consistency_token")]
    assert tokens == ["u-guest@4", "u-anna@4", "u-guest@4", "u-anna@4", "", "u-anna@4"]


@pytest.mark.parametrize("refusal", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_retries_send_the_same_event_ids(refusal):
    shop = Shop(unavailable=2)
    shop.refusal = refusal
    async with connected(shop) as concord:
        unnamed = events_pb2.Event(subject=subject_of("anna", "web"), action=ACTION_PURCHASE, item_id="A")
        answer = await concord.record(unnamed, concord.event("anna", "view", item_id="B"))
    sent = [[event.event_id for event in request.events] for request in shop.received]
    assert len(sent) == 3
    assert sent[0] == sent[1] == sent[2] == [result.event_id for result in answer.results]
    assert all(UUID(event_id) for event_id in sent[0])
    assert len(set(sent[0])) == 2
    assert {event.channel for event in shop.received[0].events} == {"web"}
    assert unnamed.event_id == ""  # the caller's message is left alone


async def test_gives_up_after_four_attempts():
    shop = Shop(unavailable=99)
    async with connected(shop) as concord:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await concord.items(["A"])
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(shop.received) == 4


async def test_calls_that_an_overloaded_server_ends_are_retried_within_the_throttle():
    """gRPC's core ends them as CANCELLED; a bucket of 100 allows 50 retries, then each call is made once."""
    shop = Shop(unavailable=100_000)
    shop.refusal = grpc.StatusCode.CANCELLED
    async with connected(shop) as concord:
        ended = await asyncio.gather(*(concord.items(["A"]) for _ in range(300)), return_exceptions=True)
    assert {error.code() for error in ended} == {grpc.StatusCode.CANCELLED}
    assert 301 <= len(shop.received) <= 350


async def test_every_call_has_a_deadline():
    shop = Shop()
    async with connected(shop, timeout=7.0) as concord:
        await concord.record(concord.event("anna", "view", item_id="A"))
        await concord.recommend("anna", surface="home")
        await concord.rank("anna", ["A"], surface="home")
        await concord.similar("A")
        await concord.profile("anna")
        await concord.resolve("anna", create=True)
        await concord.link("anna", user("u-anna"))
        await concord.items(["A"])
        await concord.items(["A"], timeout=3.0)
    assert len(shop.deadlines) == 9
    assert all(5 < seconds < 7.5 for seconds in shop.deadlines[:8])  # the wire format rounds a little up
    assert 1 < shop.deadlines[8] < 3.5


async def test_a_server_that_hangs_costs_no_more_than_the_deadline():
    async with connected(Shop(seconds=60), timeout=0.1) as concord, asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await concord.items(["A"])
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_key_is_sent_with_every_call():
    shop = Shop()
    async with connected(shop, api_key="concord_1_secret") as concord:
        await concord.recommend("anna", surface="home")
        await concord.resolve("anna")
        assert "secret" not in repr(concord)
    async with connected(shop) as concord:
        await concord.recommend("anna", surface="home")
    assert shop.bearers == ["Bearer concord_1_secret", "Bearer concord_1_secret", None]


async def test_the_token_is_asked_for_before_each_call():
    shop, tokens = Shop(), iter(["first", "second"])
    async with connected(shop, token=lambda: next(tokens)) as concord:
        for _ in range(2):
            await concord.recommend("anna", surface="home")
    assert shop.bearers == ["Bearer first", "Bearer second"]


def test_a_client_certificate_needs_its_key(tmp_path):
    (tmp_path / "certificate.pem").write_text("")
    with pytest.raises(ValueError, match="go together"):
        tls(certificate=tmp_path / "certificate.pem")
    with pytest.raises(FileNotFoundError):
        tls(tmp_path / "gone.pem")


async def test_requests_say_what_was_asked():
    shop = Shop()
    async with connected(shop) as concord:
        only = recommendation_pb2.ItemFilter(in_stock_only=True)
        await concord.recommend(
            "anna", surface="cart", limit=3, page_token="p", context_item_ids=["C"], item_filter=only, skip_exposure_logging=True
        )
        await concord.similar("A", limit=4, item_filter=only)
    recommend, similar = shop.received
    assert recommend == recommendation_pb2.RecommendRequest(
        subject=subject_of("anna", "web"),
        channel="web",
        surface="cart",
        limit=3,
        page_token="p",
        context_item_ids=["C"],
        filter=only,
        skip_exposure_logging=True,
    )
    assert similar == recommendation_pb2.SimilarItemsRequest(item_id="A", channel="web", limit=4, filter=only)


def packed_status(*details):
    status = Status(code=3, message="bad request")
    for detail in details:
        status.details.add().Pack(detail)
    return status.SerializeToString()


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        pytest.param(
            packed_status(
                ErrorInfo(reason="SURFACE_UNKNOWN", domain="concord"),
                BadRequest(field_violations=[BadRequest.FieldViolation(field="surface", description="is not registered")]),
            ),
            ErrorDetails("SURFACE_UNKNOWN", "surface", "is not registered"),
            id="full",
        ),
        pytest.param(
            packed_status(ErrorInfo(reason="OTHER", domain="mesh.example")), ErrorDetails("", "", "bad request"), id="another domain"
        ),
        pytest.param(b"\xff\xff", ErrorDetails("", "", "bad request"), id="malformed"),
        pytest.param(
            Status(details=[Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")]).SerializeToString(),
            ErrorDetails("", "", "bad request"),
            id="malformed inside",
        ),
    ],
)
async def test_error_details_say_why(packed, expected):
    async with connected(Shop(error=packed)) as concord:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await concord.recommend("anna", surface="hoem")
    assert error_details(caught.value) == expected


async def test_error_details_without_a_server():
    async with Concord("127.0.0.1:1", channel="web", timeout=5.0) as concord:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await concord.items(["A"])
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    details = error_details(caught.value)
    assert (details.reason, details.field) == ("", "")
    assert details.message


def test_token_memory_keeps_the_newest_and_is_bounded():
    memory = TokenMemory(2)
    memory.remember("a", 5, "a@5")
    memory.remember("a", 4, "a@4")  # an answer that arrived late
    assert memory.token_for(user("a")) == "a@5"
    memory.remember("b", 1, "b@1")
    assert memory.token_for(user("a")) == "a@5"  # and so b is now the least recently used
    memory.remember("c", 1, "c@1")
    assert [memory.token_for(user(name)) for name in "abc"] == ["a@5", "", "c@1"]


async def test_occurred_at_in_another_time_zone_is_the_same_instant():
    at = datetime(2026, 5, 1, 12, tzinfo=UTC)
    async with connected(Shop()) as concord:
        event = concord.event("anna", "view", item_id="A", occurred_at=at.astimezone(timezone(timedelta(hours=8))))
    assert event.occurred_at.ToDatetime(tzinfo=UTC) == at


async def test_a_search_counts_once_and_what_follows_it_knows_of_it():
    shop = Shop(unavailable=1)
    async with connected(shop) as concord:
        await concord.search("anna", "blue mug", limit=3, session_id="s")
        await concord.recommend("anna", surface="home")
        await concord.search("anna", "blue mug", page_token="later")
        await concord.search("anna", "blue mug", skip_recording=True)
    first, retried, recommend, later, skipped = shop.received
    assert first == retried
    assert (first.query, first.channel, first.limit, first.session_id) == ("blue mug", "web", 3, "s")
    assert first.event_id == str(UUID(int=1))
    assert recommend.consistency_token == "u-anna@1"  # of the state with the search in it
    assert (later.event_id, skipped.event_id, skipped.skip_recording) == ("", "", True)


async def test_a_prefix_is_completed_for_the_clients_channel():
    shop = Shop()
    async with connected(shop) as concord:
        assert [one.text for one in (await concord.suggest("blue ", limit=3)).suggestions] == ["blue mug"]
    assert shop.received == [search_pb2.SuggestRequest(channel="web", prefix="blue ", limit=3)]


async def test_texts_are_sent_with_what_they_are():
    shop = Shop()
    async with connected(shop) as concord:
        assert (await concord.embed("a cup", "a mug")).model_version == "m1"
        await concord.embed("views cups", purpose="user", max_tokens=9)
        with pytest.raises(ValueError, match="EMBEDDING_PURPOSE_FISH"):
            await concord.embed("a cup", purpose="fish")
    assert shop.received == [
        understanding_pb2.EmbedTextRequest(channel="web", texts=["a cup", "a mug"], purpose=understanding_pb2.EMBEDDING_PURPOSE_ITEM),
        understanding_pb2.EmbedTextRequest(
            channel="web", texts=["views cups"], purpose=understanding_pb2.EMBEDDING_PURPOSE_USER, max_tokens=9
        ),
    ]
