"""A small asyncio client for channel backends: deadlines, safe retries, and the consistency token carried along."""
# ruff: noqa: ASYNC109 - a call's timeout becomes its gRPC deadline, which the server sees; asyncio.timeout would not tell it.

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Self
from uuid import UUID, uuid4

import grpc

from concord.assistant import AssistantCalls
from concord.customers import Customer, TokenMemory, subject_of, user
from concord.errors import error_details
from concord.search import SearchCalls
from concord.transport import OPTIONS
from concord.v1 import (
    articles_pb2_grpc,
    assistant_pb2_grpc,
    catalog_pb2_grpc,
    events_pb2_grpc,
    identity_pb2_grpc,
    profile_pb2_grpc,
    recommendation_pb2_grpc,
    search_pb2_grpc,
    understanding_pb2_grpc,
)
from concord.v1.catalog_pb2 import GetItemsRequest, GetItemsResponse
from concord.v1.common_pb2 import ChannelIdentity, Subject
from concord.v1.events_pb2 import Event, RecordEventsRequest, RecordEventsResponse
from concord.v1.identity_pb2 import (
    ForgetUserRequest,
    ForgetUserResponse,
    GetIdentityGraphRequest,
    GetIdentityGraphResponse,
    LinkIdentitiesRequest,
    LinkIdentitiesResponse,
    ResolveIdentityRequest,
    ResolveIdentityResponse,
    SeparatedCustomer,
    UnlinkIdentityRequest,
    UnlinkIdentityResponse,
)
from concord.v1.profile_pb2 import GetProfileRequest, GetProfileResponse
from concord.v1.recommendation_pb2 import (
    ItemFilter,
    RankItemsRequest,
    RankItemsResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarItemsRequest,
    SimilarItemsResponse,
)
from concord.v1.understanding_pb2 import (
    AnalyzeSentimentRequest,
    AnalyzeSentimentResponse,
    DetectIntentRequest,
    DetectIntentResponse,
    EmbedTextRequest,
    EmbedTextResponse,
)

# Why a token that this client remembered may be refused although its caller did nothing wrong.
_OUTLIVED = {"TOKEN_OF_OTHER_USER", "SUBJECT_UNKNOWN"}


class Concord(AssistantCalls, SearchCalls):
    """One channel's connection to Concord.

    Customers are named by the id the channel knows them by (a plain string), or by a ``Subject``: ``user("u-1")`` for Concord's
    own id. Reads carry the newest consistency token that ``record``, ``link`` or an earlier read of the same customer brought, so
    they reflect what was written and never go back, whichever replica answers and whatever failed in between. Failed calls
    raise ``grpc.aio.AioRpcError``; ``error_details`` says why.

    Use it as an async context manager, inside the process and event loop that make the calls (never across a fork).

    Example:
        ```python
        async with Concord("localhost:50051", channel="web") as concord:
            await concord.record(concord.event("anna", "purchase", item_id="SKU-1", value=39.8, quantity=2))
            slate = await concord.recommend("anna", surface="home", limit=5)
            print([item.title for item in slate.items])
        ```

    Args:
        address: ``host:port``, or any gRPC target such as ``dns:///concord:50051``.
        channel: the registered name of this backend's channel, such as ``web``.
        credentials: what secures the connection: ``tls(...)``, or any of gRPC's own; None connects in plain text.
        api_key: the key that `concord keys create` printed, sent with every call. Over plain text everyone on the way can read it.
        token: called before each call for the token (JWT) to send in its place, so that it can be renewed.
        timeout: seconds each call may take, retries included, unless the call names its own.
        remembered_customers: how many customers' tokens are kept; the least recently used go first.
        new_event_id: source of event ids.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: str,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        token: Callable[[], str] | None = None,
        timeout: float = 1.0,
        remembered_customers: int = 10_000,
        new_event_id: Callable[[], UUID] = uuid4,
    ) -> None:
        self._address = address
        self._channel = channel
        self._credentials = credentials
        self._bearer = token if token is not None else (lambda: api_key)
        self._timeout = timeout
        self._memory = TokenMemory(remembered_customers)
        self._new_event_id = new_event_id

    async def __aenter__(self) -> Self:
        """Opens the channel; connecting happens with the first call."""
        if self._credentials is None:
            self._connection = grpc.aio.insecure_channel(self._address, options=OPTIONS)
        else:
            self._connection = grpc.aio.secure_channel(self._address, self._credentials, options=OPTIONS)
        self._events = _stub(events_pb2_grpc.EventServiceStub, self._connection)
        self._identities = _stub(identity_pb2_grpc.IdentityServiceStub, self._connection)
        self._profiles = _stub(profile_pb2_grpc.ProfileServiceStub, self._connection)
        self._catalog = _stub(catalog_pb2_grpc.CatalogServiceStub, self._connection)
        self._recommendations = _stub(recommendation_pb2_grpc.RecommendationServiceStub, self._connection)
        self._assistant = _stub(assistant_pb2_grpc.AssistantServiceStub, self._connection)
        self._articles = _stub(articles_pb2_grpc.ArticleServiceStub, self._connection)
        self._search = _stub(search_pb2_grpc.SearchServiceStub, self._connection)
        self._understanding = _stub(understanding_pb2_grpc.UnderstandingServiceStub, self._connection)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self._connection.close(None)

    def event(
        self,
        customer: Customer,
        action: str,
        *,
        item_id: str = "",
        text: str = "",
        value: float | None = None,
        quantity: float | None = None,
        session_id: str = "",
        slate_id: str = "",
        occurred_at: datetime | None = None,
    ) -> Event:
        """Returns an event in this channel with an id of its own, so that recording it again is harmless.

        Args:
            customer: who did it.
            action: ``view``, ``click``, ``search``, ``add_to_cart``, ``remove_from_cart``, ``purchase``, ``return``, ``rate``,
                ``review``, ``wishlist`` or ``message``.
            item_id: the item concerned.
            text: the query, review or message.
            value: amount of the line (quantity × unit price) in major units, or the rating from 1 to 5.
            quantity: units.
            session_id: the channel's session.
            slate_id: the slate it is a reaction to.
            occurred_at: when it happened, with a time zone; None: when the server receives it.

        Raises:
            ValueError: the action is none of these, or ``occurred_at`` has no time zone.
        """
        event = Event(
            event_id=str(self._new_event_id()),
            subject=subject_of(customer, self._channel),
            channel=self._channel,
            action=f"ACTION_{action.upper()}",
            item_id=item_id,
            text=text,
            value=value,
            quantity=quantity,
            session_id=session_id,
            slate_id=slate_id,
        )
        if occurred_at is not None:
            if occurred_at.tzinfo is None:
                raise ValueError("occurred_at needs a time zone")
            event.occurred_at.FromDatetime(occurred_at)
        return event

    async def record(self, *events: Event, timeout: float | None = None) -> RecordEventsResponse:
        """Stores 1 to 500 events; on return those not rejected are committed, once each however often they were sent.

        Events without an id or a channel get them. Look at ``results`` for rejected ones: they raise nothing.
        """
        completed = [self._completed(event) for event in events]
        answer: RecordEventsResponse = await self._call(self._events.RecordEvents, RecordEventsRequest(events=completed), timeout)
        for event, result in zip(completed, answer.results, strict=False):
            if result.user_id:
                self._memory.identify(event.subject, result.user_id)
        for token in answer.tokens:
            self._memory.remember(token.user_id, token.user_version, token.consistency_token)
        return answer

    async def recommend(
        self,
        customer: Customer,
        *,
        surface: str,
        limit: int = 10,
        page_token: str = "",
        context_item_ids: Iterable[str] = (),
        item_filter: ItemFilter | None = None,
        consistency_token: str = "",
        skip_exposure_logging: bool = False,
        timeout: float | None = None,
    ) -> RecommendResponse:
        """Returns what to show ``customer`` on ``surface``: the slate every channel gets.

        ``consistency_token`` is one handed over by another backend; by default the newest this client knows is sent.
        """
        subject = subject_of(customer, self._channel)
        request = RecommendRequest(
            subject=subject,
            channel=self._channel,
            surface=surface,
            limit=limit,
            page_token=page_token,
            context_item_ids=context_item_ids,
            filter=item_filter,
            consistency_token=consistency_token or self._memory.token_for(subject),
            skip_exposure_logging=skip_exposure_logging,
        )
        answer: RecommendResponse = await self._read(self._recommendations.Recommend, request, timeout, given=bool(consistency_token))
        self._memory.learn(subject, answer.user_id, answer.versions.user_version, answer.consistency_token)
        return answer

    async def rank(
        self,
        customer: Customer,
        item_ids: Iterable[str],
        *,
        surface: str,
        consistency_token: str = "",
        timeout: float | None = None,
    ) -> RankItemsResponse:
        """Returns 1 to 500 given items in the order that suits ``customer`` best."""
        subject = subject_of(customer, self._channel)
        request = RankItemsRequest(
            subject=subject,
            channel=self._channel,
            surface=surface,
            item_ids=item_ids,
            consistency_token=consistency_token or self._memory.token_for(subject),
        )
        answer: RankItemsResponse = await self._read(self._recommendations.RankItems, request, timeout, given=bool(consistency_token))
        self._memory.learn(subject, answer.user_id, answer.versions.user_version, answer.consistency_token)
        return answer

    async def similar(
        self, item_id: str, *, limit: int = 10, item_filter: ItemFilter | None = None, timeout: float | None = None
    ) -> SimilarItemsResponse:
        """Returns the items most like ``item_id`` that this channel sells."""
        request = SimilarItemsRequest(item_id=item_id, channel=self._channel, limit=limit, filter=item_filter)
        answer: SimilarItemsResponse = await self._call(self._recommendations.SimilarItems, request, timeout)
        return answer

    async def profile(self, customer: Customer, *, consistency_token: str = "", timeout: float | None = None) -> GetProfileResponse:
        """Returns what is known about ``customer``: identities, recent behaviour in all channels, features."""
        subject = subject_of(customer, self._channel)
        request = GetProfileRequest(subject=subject, consistency_token=consistency_token or self._memory.token_for(subject))
        answer: GetProfileResponse = await self._read(self._profiles.GetProfile, request, timeout, given=bool(consistency_token))
        self._memory.learn(subject, answer.user_id, answer.user_version, answer.consistency_token)
        return answer

    async def resolve(self, channel_user_id: str, *, create: bool = False, timeout: float | None = None) -> ResolveIdentityResponse:
        """Returns the customer this channel knows as ``channel_user_id``, creating one if asked."""
        identity = ChannelIdentity(channel=self._channel, channel_user_id=channel_user_id)
        request = ResolveIdentityRequest(identity=identity, create_if_missing=create)
        answer: ResolveIdentityResponse = await self._call(self._identities.ResolveIdentity, request, timeout)
        self._memory.identify(Subject(identity=identity), answer.user_id)
        return answer

    async def link(self, channel_user_id: str, customer: Customer, *, timeout: float | None = None) -> LinkIdentitiesResponse:
        """Declares this channel's ``channel_user_id`` and ``customer`` to be one; two known customers are merged."""
        identity = ChannelIdentity(channel=self._channel, channel_user_id=channel_user_id)
        subject = subject_of(customer, self._channel)
        request = LinkIdentitiesRequest(identity=identity, subject=subject)
        answer: LinkIdentitiesResponse = await self._call(self._identities.LinkIdentities, request, timeout)
        merged = [user(answer.merged_user_id)] if answer.merged_user_id else []
        for name in (Subject(identity=identity), subject, *merged):
            self._memory.identify(name, answer.user_id)
        self._memory.remember(answer.user_id, answer.user_version, answer.consistency_token)
        return answer

    async def unlink(
        self, channel_user_id: str, customer: Customer | None = None, *, timeout: float | None = None
    ) -> UnlinkIdentityResponse:
        """Takes back that this channel's ``channel_user_id`` and ``customer`` are one, or without one every link it has."""
        identity = ChannelIdentity(channel=self._channel, channel_user_id=channel_user_id)
        request = UnlinkIdentityRequest(identity=identity, subject=None if customer is None else subject_of(customer, self._channel))
        answer: UnlinkIdentityResponse = await self._call(self._identities.UnlinkIdentity, request, timeout)
        self._memory.identify(Subject(identity=identity), answer.user_id)
        customers: list[UnlinkIdentityResponse | SeparatedCustomer] = [answer, *answer.separated_customers]
        for parted in customers:
            self._memory.identify(user(parted.user_id), parted.user_id)  # no longer one that was merged into another
            self._memory.remember(parted.user_id, parted.user_version, parted.consistency_token)
        return answer

    async def graph(self, customer: Customer, *, timeout: float | None = None) -> GetIdentityGraphResponse:
        """Returns the personas ``customer`` consists of, their identities, and the links between them."""
        request = GetIdentityGraphRequest(subject=subject_of(customer, self._channel))
        answer: GetIdentityGraphResponse = await self._call(self._identities.GetIdentityGraph, request, timeout)
        return answer

    async def forget(self, customer: Customer, *, timeout: float | None = None) -> ForgetUserResponse:
        """Erases ``customer`` for good, in all channels, and returns the receipt; once more, it returns the same one."""
        subject = subject_of(customer, self._channel)
        answer: ForgetUserResponse = await self._call(self._identities.ForgetUser, ForgetUserRequest(subject=subject), timeout)
        self._memory.drop(subject)
        return answer

    async def items(self, item_ids: Iterable[str], *, timeout: float | None = None) -> GetItemsResponse:
        """Returns 1 to 500 items of the catalogue by id, and the ids it does not hold."""
        answer: GetItemsResponse = await self._call(self._catalog.GetItems, GetItemsRequest(item_ids=item_ids), timeout)
        return answer

    async def embed(self, *texts: str, purpose: str = "item", max_tokens: int = 0, timeout: float | None = None) -> EmbedTextResponse:
        """Returns the unit vectors of 1 to 128 texts by the active model; a text with nothing to read in it has none.

        Example:
            ```python
            answer = await concord.embed("blue enamel mug", "where is my order?")
            mug, order = (embedding.vector for embedding in answer.embeddings)
            print(answer.model_version, sum(a * b for a, b in zip(mug, order)))  # their cosine
            ```

        Args:
            texts: what to read.
            purpose: ``item`` (descriptions, searches, messages: where items lie) or ``user`` (what a customer did or wants, in words).
            max_tokens: read at most this many tokens of each text, 3 to 512; 0: as many as the model was trained to.
            timeout: seconds; long lists need more than the client's default.

        Raises:
            ValueError: the purpose is neither of these.
        """
        wanted = f"EMBEDDING_PURPOSE_{purpose.upper()}"
        request = EmbedTextRequest(channel=self._channel, texts=texts, purpose=wanted, max_tokens=max_tokens)
        answer: EmbedTextResponse = await self._call(self._understanding.EmbedText, request, timeout)
        return answer

    async def intent(self, text: str, *, top_k: int = 3, timeout: float | None = None) -> DetectIntentResponse:
        """Returns what the writer of ``text`` wants, likeliest first, and the items, orders and prices it speaks of.

        Example:
            ```python
            answer = await concord.intent("where is my order #A-1002?")
            if answer.in_scope:
                print(answer.intents[0].name, [(entity.text, entity.value) for entity in answer.entities])
            ```
        """
        request = DetectIntentRequest(channel=self._channel, text=text, top_k=top_k)
        answer: DetectIntentResponse = await self._call(self._understanding.DetectIntent, request, timeout)
        return answer

    async def sentiment(self, *texts: str, timeout: float | None = None) -> AnalyzeSentimentResponse:
        """Returns how positive 1 to 128 texts are, and what they say of which aspects, by the active model.

        Example:
            ```python
            answer = await concord.sentiment("Lovely colour, but it runs small.")
            review = answer.sentiments[0]
            print(review.score, [(one.aspect, one.score) for one in review.aspects])  # colour above 0, size below
            ```

        A text in neither English nor Chinese, or without a letter, has the label ``SENTIMENT_LABEL_UNJUDGED``.
        """
        request = AnalyzeSentimentRequest(channel=self._channel, texts=texts)
        answer: AnalyzeSentimentResponse = await self._call(self._understanding.AnalyzeSentiment, request, timeout)
        return answer

    async def _read(self, method: Any, request: Any, timeout: float | None, *, given: bool) -> Any:
        """Asks once more without the remembered token when its customer is no longer the subject's (unlinked, or forgotten)."""
        try:
            return await self._call(method, request, timeout)
        except grpc.aio.AioRpcError as error:
            if given or not request.consistency_token or error_details(error).reason not in _OUTLIVED:
                raise
        self._memory.drop(request.subject)
        request.ClearField("consistency_token")
        return await self._call(method, request, timeout)

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        bearer = self._bearer()
        metadata = (("authorization", f"Bearer {bearer}"),) if bearer else None
        return await method(request, timeout=self._timeout if timeout is None else timeout, metadata=metadata)

    def _completed(self, event: Event) -> Event:
        complete = Event()
        complete.CopyFrom(event)
        complete.event_id = event.event_id or str(self._new_event_id())
        complete.channel = event.channel or self._channel
        return complete


def _stub(kind: Callable[[grpc.aio.Channel], Any], connection: grpc.aio.Channel) -> Any:
    return kind(connection)  # generated stubs carry no types
