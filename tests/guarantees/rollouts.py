"""Models switched back and forth under load, and an offline check of every answer given meanwhile: what C4 promises."""

import asyncio
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from concord.v1 import events_pb2, events_pb2_grpc, models_pb2, models_pb2_grpc, recommendation_pb2, recommendation_pb2_grpc
from concord.v1.common_pb2 import Action, Subject

CHANNELS = ("web", "app", "mini_program", "messaging", "store")
SURFACES = ("home", "cart")
# Without the client's own retries: a call that failed once has failed.
_OPTIONS = (("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0))
# Slates of a model just switched to have to be computed: what callers feel of a switch lasts a little longer than the call.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Switch:
    """One activation: when it was called, when it was acknowledged, and to which model."""

    called: float
    acknowledged: float
    model_version: str


@dataclass(frozen=True)
class Seen:
    """One answer; ``key`` is everything that decides it, ``digest`` its ranked items with scores and prices.

    ``computed`` says that no slate stood for it: the first call of a customer after a switch pays for one, whatever was prepared.
    """

    started: float
    ended: float
    address: str
    model_version: str
    key: tuple[Any, ...]
    digest: str
    computed: bool = False


@dataclass
class History:
    """All that happened, in the order it ended."""

    switches: list[Switch] = field(default_factory=list)
    answers: list[Seen] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What the check counted.

    Attributes:
        answers, switches, failures: how many; failures are calls of readers, writers and activations that failed.
        mixed: keys (customer, surface, versions) answered with different bytes.
        late: answers by the old model to calls that began after an answer by the new one had ended, or after the acknowledgement.
        usual_p99, switching_p99: seconds, of calls apart from any switch and of calls during one or just after.
        hits_p99, misses_p99: the same two, of answers whose slate stood and of those whose slate had to be computed.
        by_model: answers of each model.
        rss: resident memory of each process after each switch, in bytes.
    """

    answers: int
    switches: int
    failures: int
    mixed: int
    late: int
    usual_p99: float
    switching_p99: float
    hits_p99: tuple[float, float]
    misses_p99: tuple[float, float]
    by_model: dict[str, int]
    rss: list[list[int]]
    first_failures: list[str]


async def run_rollouts(
    addresses: Sequence[str],
    model_versions: Sequence[str],
    customers: Sequence[str],
    *,
    count: int,
    readers: int = 3,
    pause_seconds: float = 1.5,
    reader_pause_seconds: float = 0.01,
    writes_a_second: float = 5.0,
    pids: Sequence[int] = (),
    seed: int = 7,
    progress: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """Switches ``count`` times through ``model_versions`` while readers ask all replicas and a writer moves customers' versions.

    Args:
        addresses: of the replicas; readers, and activations, go round them.
        customers: user ids to ask for.
        pids: processes whose memory is noted after each switch.
    """
    history, stop = History(), asyncio.Event()
    rss: list[list[int]] = []
    wires = {address: grpc.aio.insecure_channel(address, options=_OPTIONS) for address in addresses}
    try:
        loads = [
            asyncio.create_task(_read(history, stop, wires, customers, random.Random(seed + k), reader_pause_seconds))
            for k in range(readers)
        ]
        loads.append(asyncio.create_task(_write(history, stop, wires, customers, random.Random(seed), 1 / writes_a_second)))
        await asyncio.sleep(2 * pause_seconds)
        for k, version in zip(range(count), itertools.cycle(model_versions), strict=False):
            await _switch(history, wires[addresses[k % len(addresses)]], version)
            rss.append([resident(pid) for pid in pids])
            progress(f"switch {k + 1} of {count}: {len(history.answers)} answers, {len(history.failures)} failures")
            await asyncio.sleep(pause_seconds)
        stop.set()
        await asyncio.gather(*loads)
    finally:
        stop.set()
        await asyncio.gather(*(wire.close() for wire in wires.values()))
    return check(history, rss)


async def _switch(history: History, wire: grpc.aio.Channel, version: str) -> None:
    called = monotonic()
    request = models_pb2.ActivateModelRequest(model_version=version, wait=Duration(seconds=20))
    try:
        await models_pb2_grpc.ModelServiceStub(wire).ActivateModel(request, timeout=25)
    except grpc.aio.AioRpcError as error:
        history.failures.append(f"activation of {version}: {error.code().name} {error.details()}")
    else:
        history.switches.append(Switch(called, monotonic(), version))


async def _read(
    history: History,
    stop: asyncio.Event,
    wires: Mapping[str, grpc.aio.Channel],
    customers: Sequence[str],
    chance: random.Random,
    pause_seconds: float,
) -> None:
    stubs = {address: recommendation_pb2_grpc.RecommendationServiceStub(wire) for address, wire in wires.items()}
    while not stop.is_set():
        address, channel, surface = chance.choice([*stubs]), chance.choice(CHANNELS), chance.choice(SURFACES)
        customer = chance.choice(customers)
        request = recommendation_pb2.RecommendRequest(subject=Subject(user_id=customer), channel=channel, surface=surface, limit=20)
        started = monotonic()
        try:
            answer = await stubs[address].Recommend(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            history.failures.append(f"{address}: {error.code().name} {error.details()}")
        else:
            key = (customer, channel, surface, answer.versions.SerializeToString(deterministic=True))
            computed = any(timing.stage == "commit" for timing in answer.stage_timings)
            history.answers.append(Seen(started, monotonic(), address, answer.versions.model_version, key, digest(answer), computed))
        await asyncio.sleep(pause_seconds)


async def _write(
    history: History,
    stop: asyncio.Event,
    wires: Mapping[str, grpc.aio.Channel],
    customers: Sequence[str],
    chance: random.Random,
    pause_seconds: float,
) -> None:
    stubs = [events_pb2_grpc.EventServiceStub(wire) for wire in wires.values()]
    while not stop.is_set():
        whom = Subject(user_id=chance.choice(customers))
        event = events_pb2.Event(subject=whom, channel="web", action=Action.ACTION_VIEW, item_id=f"r{chance.randrange(50)}")
        try:
            await chance.choice(stubs).RecordEvents(events_pb2.RecordEventsRequest(events=[event]), timeout=10)
        except grpc.aio.AioRpcError as error:
            history.failures.append(f"event: {error.code().name} {error.details()}")
        await asyncio.sleep(pause_seconds)


def digest(answer: recommendation_pb2.RecommendResponse) -> str:
    """Returns a fingerprint of what must be equal to the byte: order, scores and prices."""
    parts = [item.item_id.encode() + item.price.SerializeToString(deterministic=True) + item.score.hex().encode() for item in answer.items]
    return hashlib.sha256(b"\x1e".join(parts)).hexdigest()


def check(history: History, rss: list[list[int]]) -> Verdict:
    """Counts what went wrong in a history, and how long calls took."""
    digests: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for seen in history.answers:
        digests[seen.key].add(seen.digest)
    spans = [(switch.called, switch.acknowledged + SETTLE_SECONDS) for switch in history.switches]
    usual, during = _apart_and_during(history.answers, spans)
    counts: dict[str, int] = defaultdict(int)
    for seen in history.answers:
        counts[seen.model_version] += 1
    return Verdict(
        answers=len(history.answers),
        switches=len(history.switches),
        failures=len(history.failures),
        mixed=sum(len(found) > 1 for found in digests.values()),
        late=len(late_answers(history)),
        usual_p99=_p99(usual),
        switching_p99=_p99(during),
        hits_p99=(_p99([s for s in usual if not s.computed]), _p99([s for s in during if not s.computed])),
        misses_p99=(_p99([s for s in usual if s.computed]), _p99([s for s in during if s.computed])),
        by_model=dict(counts),
        rss=rss,
        first_failures=history.failures[:5],
    )


def _apart_and_during(answers: Sequence[Seen], spans: Sequence[tuple[float, float]]) -> tuple[list[Seen], list[Seen]]:
    """Parts the answers into those that no span touches and the rest."""
    during = [any(s.ended >= start and s.started <= end for start, end in spans) for s in answers]
    return [s for s, within in zip(answers, during, strict=True) if not within], list(itertools.compress(answers, during))


def _p99(answers: Sequence[Seen]) -> float:
    return percentile([s.ended - s.started for s in answers], 0.99)


def late_answers(history: History) -> list[Seen]:
    """Returns answers of another model than the one switched to, to calls that began when its reign had provably begun.

    It has begun with the acknowledgement, or as soon as any call of this switch came back answered by it, whichever is earlier.
    Until the next switch is called, nothing else may answer.
    """
    late = []
    ends = [*(switch.called for switch in history.switches[1:]), float("inf")]
    for switch, end in zip(history.switches, ends, strict=True):
        own = [s for s in history.answers if switch.called <= s.started and s.ended < end]
        begun = min([switch.acknowledged, *(s.ended for s in own if s.model_version == switch.model_version)])
        late += [s for s in own if s.started > begun and s.model_version != switch.model_version]
    return late


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that ``share`` of all values do not exceed, 0 for none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes (Linux)."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
