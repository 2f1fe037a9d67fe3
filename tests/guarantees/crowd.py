"""Channel backends under load: they ask, record and reprice over bare stubs, and write down what they were told."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import grpc
import psycopg

from concord.v1 import catalog_pb2, common_pb2, events_pb2, models_pb2, recommendation_pb2
from features.settings import DEFAULT_CHANNELS
from tests.guarantees.history import Activation, Fault, Listed, Offer, Read, Recorder, Row, Write

CHANNELS = DEFAULT_CHANNELS
LIMITS = (5, 10, 10, 20, 40)
_RECOMMEND = "/concord.v1.RecommendationService/Recommend"
_RECORD = "/concord.v1.EventService/RecordEvents"
_ACTIVATE = "/concord.v1.ModelService/ActivateModel"
_UPSERT = "/concord.v1.CatalogService/UpsertItems"
# Reconnects at once: a replica that came back must not be out of the run for gRPC's two minutes of backoff.
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)
_QUIET = recommendation_pb2.RecommendRequest(skip_exposure_logging=True).SerializeToString()


@dataclass(frozen=True)
class Question:
    """One thing to ask; ``filtered`` is a key of the crowd's filters, empty for none."""

    user: str
    channel: str
    surface: str = "home"
    context: tuple[str, ...] = ()
    limit: int = 10
    filtered: str = ""

    @property
    def place(self) -> str:
        """The place of the slate: surface and context, whose order does not matter."""
        return f"{self.surface}|{','.join(sorted(self.context))}"


@dataclass(frozen=True)
class Token:
    """The newest token a customer's writes returned."""

    text: str
    version: int


@dataclass
class Crowd:
    """Clients of several replicas with one history.

    Attributes:
        name: of the client, in the history.
        users: customers to ask for and write to.
        items: the catalogue as this crowd, its only writer, left it.
        tokens: the newest acknowledged token of each customer.
        within: seconds a call may take unless it says otherwise.
        logged_share: how many answers are logged as exposures.
    """

    name: str
    recorder: Recorder
    channels: Sequence[grpc.aio.Channel]
    users: Sequence[str]
    items: dict[str, catalog_pb2.Item]
    dice: random.Random
    within: float = 5.0
    logged_share: float = 0.02
    tokens: dict[str, Token] = field(default_factory=dict)
    _requests: dict[Question, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ask = [channel.unary_unary(_RECOMMEND) for channel in self.channels]
        self._record = [channel.unary_unary(_RECORD) for channel in self.channels]
        self._upsert = [channel.unary_unary(_UPSERT) for channel in self.channels]
        categories = sorted({item.category for item in self.items.values()})
        dear = common_pb2.Money(currency_code="USD", units=40)
        self.filters = {
            "category": recommendation_pb2.ItemFilter(categories=categories[::2]),
            "stock": recommendation_pb2.ItemFilter(in_stock_only=True),
            "cheap": recommendation_pb2.ItemFilter(max_price=dear),
            "without": recommendation_pb2.ItemFilter(exclude_item_ids=sorted(self.items)[::3]),
        }

    def question(self) -> Question:
        """Returns a random question."""
        dice = self.dice
        surface, context = dice.choice((("home", ()), ("home", ()), ("cart", ()), ("product", (min(self.items),))))
        filtered = dice.choice(tuple(self.filters)) if dice.random() < 0.2 else ""
        return Question(dice.choice(self.users), dice.choice(CHANNELS), surface, context, dice.choice(LIMITS), filtered)

    async def ask(self, question: Question, *, replica: int | None = None, token: Token | None = None, within: float | None = None) -> Read:
        """Asks one question and writes down the answer."""
        replica = self.dice.randrange(len(self._ask)) if replica is None else replica
        request = self._request(question)
        if self.dice.random() >= self.logged_share:
            request += _QUIET
        if token is not None:
            request += recommendation_pb2.RecommendRequest(consistency_token=token.text).SerializeToString()
        start = time.monotonic()
        status, reply = await _call(self._ask[replica], request, within or self.within)
        end = time.monotonic()
        told = {} if reply is None else self._told(reply)
        read = Read(
            self.name,
            replica,
            question.channel,
            question.user,
            question.place,
            question.limit,
            question.filtered,
            start,
            end,
            status,
            token.version if token else 0,
            **told,
        )
        self.recorder.add(read)
        return read

    def _request(self, question: Question) -> bytes:
        request = self._requests.get(question)
        if request is None:
            request = recommendation_pb2.RecommendRequest(
                subject=common_pb2.Subject(user_id=question.user),
                channel=question.channel,
                surface=question.surface,
                limit=question.limit,
                context_item_ids=question.context,
                filter=self.filters.get(question.filtered),
            ).SerializeToString()
            self._requests[question] = request
        return request

    def _told(self, reply: bytes) -> dict[str, object]:
        answer = recommendation_pb2.RecommendResponse.FromString(reply)
        rows = tuple(
            Row(
                item.position,
                item.item_id,
                item.score,
                item.price.units * 1_000_000 + item.price.nanos // 1_000 if item.HasField("price") else None,
                item.price.currency_code,
                item.in_stock,
            )
            for item in answer.items
        )
        versions = answer.versions
        return {
            "user_version": versions.user_version,
            "model_version": versions.model_version,
            "index_version": versions.index_version,
            "offer_version": versions.offer_version,
            "slate": answer.slate_id,
            "body": self.recorder.body(rows),
            "stale": answer.stale,
            "degraded": ",".join(answer.degraded_reasons) or ("degraded" if answer.degraded else ""),
        }

    async def record(
        self,
        user: str,
        *,
        replica: int | None = None,
        channel: str = "",
        event_id: str = "",
        item_id: str = "",
        text: str = "",
        within: float | None = None,
    ) -> Write:
        """Records one event and writes down what came back; the token is remembered."""
        replica = self.dice.randrange(len(self._record)) if replica is None else replica
        channel = channel or self.dice.choice(CHANNELS)
        event_id = event_id or str(UUID(int=self.dice.getrandbits(128), version=4))
        event = events_pb2.Event(
            event_id=event_id,
            subject=common_pb2.Subject(user_id=user),
            channel=channel,
            action=common_pb2.ACTION_MESSAGE if text else common_pb2.ACTION_VIEW,
            item_id="" if text else item_id or self.dice.choice(sorted(self.items)),
            text=text,
        )
        request = events_pb2.RecordEventsRequest(events=[event]).SerializeToString()
        start = time.monotonic()
        status, reply = await _call(self._record[replica], request, within or self.within)
        end = time.monotonic()
        version, online = 0, False
        if reply is not None:
            answer = events_pb2.RecordEventsResponse.FromString(reply)
            if answer.results[0].status == events_pb2.EVENT_STATUS_REJECTED:
                status = f"REJECTED {answer.results[0].reason}"
            else:
                version, online = answer.tokens[0].user_version, answer.online
                if user not in self.tokens or version > self.tokens[user].version:
                    self.tokens[user] = Token(answer.tokens[0].consistency_token, version)
        write = Write(self.name, replica, channel, user, event_id, start, end, status, version, online)
        self.recorder.add(write)
        return write

    async def reprice(self) -> Offer:
        """Changes price and stock of a random item."""
        item = self.items[self.dice.choice(sorted(self.items))]
        changed = catalog_pb2.Item()
        changed.CopyFrom(item)
        changed.price.CopyFrom(common_pb2.Money(currency_code="USD", units=self.dice.randrange(1, 90), nanos=990_000_000))
        changed.stock = self.dice.choice((0, 3, 50, 50, 50))
        return await self.upsert(changed)

    async def redescribe(self) -> Offer:
        """Describes a random item anew, or adds one: either makes an index epoch due."""
        item = self.items[self.dice.choice(sorted(self.items))]
        changed = catalog_pb2.Item()
        changed.CopyFrom(item)
        number = self.dice.getrandbits(32)
        changed.title = f"{item.title.partition(' · ')[0]} · edition {number % 97}"
        if self.dice.random() < 0.3:
            changed.item_id = f"new-{number:08x}"
        return await self.upsert(changed)

    async def upsert(self, item: catalog_pb2.Item) -> Offer:
        """Stores one item as a whole and writes down the offer version it got."""
        replica = self.dice.randrange(len(self._upsert))
        start = time.monotonic()
        status, reply = await _call(
            self._upsert[replica], catalog_pb2.UpsertItemsRequest(items=[item]).SerializeToString(), max(self.within, 10.0)
        )
        end = time.monotonic()
        version = 0
        if reply is not None:
            version = catalog_pb2.UpsertItemsResponse.FromString(reply).offer_version
            self.items[item.item_id] = item
        micros = item.price.units * 1_000_000 + item.price.nanos // 1_000
        offer = Offer(self.name, item.item_id, micros, item.price.currency_code, item.stock, start, end, status, version)
        self.recorder.add(offer)
        return offer

    async def activate(self, model_version: str) -> Activation:
        """Moves the model pointer through a random replica."""
        channel = self.dice.choice(self.channels)
        start = time.monotonic()
        request = models_pb2.ActivateModelRequest(model_version=model_version).SerializeToString()
        status, reply = await _call(channel.unary_unary(_ACTIVATE), request, 20.0)
        count = 0 if reply is None else models_pb2.ActivateModelResponse.FromString(reply).activation_count
        activation = Activation(model_version, start, time.monotonic(), status, count)
        self.recorder.add(activation)
        return activation

    @contextlib.contextmanager
    def fault(self, what: str) -> Iterator[None]:
        """Writes down that something is done to a process or a store while the body runs."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.recorder.add(Fault(what, start, time.monotonic()))


async def _call(method: Callable[..., grpc.aio.Call], request: bytes, within: float) -> tuple[str, bytes | None]:
    try:
        return "OK", await method(request, timeout=within)
    except grpc.aio.AioRpcError as error:
        return error.code().name, None


@contextlib.asynccontextmanager
async def crowd(
    name: str, addresses: Sequence[str], path: Path, *, dsn: str, users: int, seed: int, within: float = 5.0
) -> AsyncIterator[Crowd]:
    """Connects a crowd to replicas; what it knows of customers and catalogue is from PostgreSQL, and its history goes to ``path``."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address, options=_OPTIONS)) for address in addresses]
        known = await asyncio.to_thread(_customers, dsn, users)
        items, listed = await asyncio.to_thread(_catalogue, dsn)
        recorder = stack.enter_context(contextlib.closing(Recorder(path)))
        for item in listed:
            recorder.add(item)
        # The name is part of the seed: two runs must not send events under the same ids.
        yield Crowd(name, recorder, channels, known, items, random.Random(f"{name} {seed}"), within)


def _customers(dsn: str, count: int) -> list[str]:
    query = "SELECT user_id FROM users WHERE merged_into IS NULL AND version > 5 ORDER BY user_id LIMIT %s"
    with psycopg.connect(dsn) as connection:
        return [row[0] for row in connection.execute(query, [count])]


def _catalogue(dsn: str) -> tuple[dict[str, catalog_pb2.Item], list[Listed]]:
    query = (
        "SELECT item_id, title, text, category, brand, price_micros, currency, stock, channels, image_ref, offer_version "
        "FROM items WHERE NOT removed AND price_micros IS NOT NULL ORDER BY item_id"
    )
    items, listed = {}, []
    with psycopg.connect(dsn) as connection:
        for item_id, title, text, category, brand, micros, currency, stock, channels, image_ref, version in connection.execute(query):
            units, rest = divmod(micros, 1_000_000)
            items[item_id] = catalog_pb2.Item(
                item_id=item_id,
                title=title,
                text=text,
                category=category,
                brand=brand,
                price=common_pb2.Money(currency_code=currency, units=units, nanos=rest * 1_000),
                stock=stock,
                channels=channels,
                image_ref=image_ref,
            )
            listed.append(Listed(item_id, micros, currency, stock, list(channels), version))
    return items, listed
