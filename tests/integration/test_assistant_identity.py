"""Conversations follow their customer: through links and their undoing, merges under way, and into oblivion."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from server.assistant.answer import Answer, Kind
from server.assistant.conversations import Conversations, Turn
from server.domain import Subject, Versions
from server.errors import NotFoundError
from server.ingest.identities import Known
from server.online.states import MergedError, RegroupedError
from server.settings import ServerSettings
from tests.integration.replicas import Names, Pair, Replica, app, query, web
from tests.integration.test_forget import traces

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
TURNS = "SELECT user_id, origin_id, question FROM assistant_turns WHERE question = ANY(%s) ORDER BY asked_at"


@pytest.fixture(scope="module")
def talks(two: Pair) -> tuple[Conversations, Conversations]:
    first, second = (Conversations(one.pool, remembered=5, seconds=3_600) for one in two)
    return first, second


async def ask(
    one: Replica, talks: Conversations, subject: Subject, question: str, *, minutes: int = 0, event_id: uuid.UUID | None = None
) -> Turn:
    """Records a turn as the assistant does."""
    known = await one.identities.customer_of(subject)
    event_id = event_id or uuid.uuid4()

    async def act(known: Known) -> Turn:
        at = AT + timedelta(minutes=minutes)
        while True:
            talk = await talks.read(known.user_id, event_id, asked_at=at)
            known.checked(None, talk.membership)
            if talk.answered:
                return talk.answered
            turn = Turn(talk.count + 1, subject.channel, question, Answer(Kind.COURTESY, "en"), Versions(1, "m", 1, 1), 1, at)
            if stored := await talks.commit(known.user_id, known.persona_id, event_id, turn, seen=talk.count):
                return stored

    return await one.identities.following(subject, known, act)


async def heard(one: Replica, talks: Conversations, subject: Subject) -> list[str]:
    """What a subject's conversation holds, oldest first."""
    known = await one.identities.customer_of(subject)

    async def act(known: Known) -> list[str]:
        talk = await talks.read(known.user_id, uuid.uuid4(), asked_at=AT + timedelta(minutes=50))
        known.checked(None, talk.membership)
        return [turn.question for turn in reversed(talk.before)]

    return await one.identities.following(subject, known, act)


async def test_turns_are_joined_by_a_link_and_given_back_by_an_unlink(
    two: Pair, talks: tuple[Conversations, Conversations], names: Names
) -> None:
    phone, card, same = app(names("phone")), web(names("card")), uuid.uuid4()
    await two[0].record(phone, "seen-1")
    await two[1].record(card, "seen-2")
    await ask(two[0], talks[0], phone, "p1", minutes=1)
    await ask(two[1], talks[1], card, "c1", minutes=2)
    await ask(two[0], talks[0], phone, "p2", minutes=3, event_id=same)
    await ask(two[1], talks[1], card, "c2", minutes=4, event_id=same)  # both used one event id before they were known to be one
    await two[0].graph.link(phone, card)
    for one, conversations in zip(two, talks, strict=True):
        for subject in (phone, card):
            assert await heard(one, conversations, subject) == ["p1", "c1", "p2", "c2"]
            assert (await ask(one, conversations, subject, "again", event_id=same)).question == "p2"  # the first one's answer
    later = await ask(two[1], talks[1], card, "c3", minutes=6)
    assert later.number == 5
    await two[1].graph.unlink(card, phone)
    for one, conversations in zip(two, talks, strict=True):
        assert await heard(one, conversations, phone) == ["p1", "p2"]
        assert await heard(one, conversations, card) == ["c1", "c2", "c3"]


async def test_a_forgotten_customer_leaves_no_turn_and_none_comes_after(
    two: Pair, talks: tuple[Conversations, Conversations], settings: ServerSettings, names: Names
) -> None:
    phone, card, other = app(names("phone")), web(names("card")), web(names("other"))
    tokens = [await two[0].record(one, f"seen-{k}") for k, one in enumerate((phone, card, other))]
    question = f"secret {uuid.uuid4().hex}"
    await ask(two[0], talks[0], phone, question)
    await ask(two[1], talks[1], card, question, minutes=1)
    await ask(two[1], talks[1], other, "kept")
    await two[0].graph.link(phone, card)
    known = await two[1].identities.customer_of(card)
    assert "assistant_turns" in str(traces(settings, question))
    receipt = await two[0].erasure.forget(card)
    assert receipt.counts["turns"] == 2
    late = Turn(3, "web", question, Answer(Kind.COURTESY, "en"), Versions(1, "m", 1, 1), 1, AT)
    with pytest.raises(NotFoundError):  # an answer that was under way
        await talks[1].commit(known.user_id, known.persona_id, uuid.uuid4(), late, seen=2)
    with pytest.raises(NotFoundError):
        await talks[1].read(tokens[0].user_id, uuid.uuid4(), asked_at=AT)
    assert traces(settings, question) == []
    assert await heard(two[0], talks[0], other) == ["kept"]


async def test_an_answer_to_whoever_has_been_merged_meanwhile_is_made_again(
    two: Pair, talks: tuple[Conversations, Conversations], names: Names
) -> None:
    phone, card = app(names("phone")), web(names("card"))
    older, younger = [await two[0].record(one, f"seen-{k}") for k, one in enumerate((phone, card))]
    turn = Turn(1, "web", "q", Answer(Kind.COURTESY, "en"), Versions(1, "m", 1, 1), 1, AT)
    known = await two[1].identities.customer_of(card)
    await two[0].graph.link(phone, card)
    with pytest.raises(RegroupedError):
        await talks[1].commit(known.user_id, known.persona_id, uuid.uuid4(), turn, seen=0)
    with pytest.raises(MergedError):
        await talks[1].read(younger.user_id, uuid.uuid4(), asked_at=AT)
    await ask(two[1], talks[1], card, names("q"))
    assert await heard(two[0], talks[0], Subject(user_id=older.user_id)) == [names("q")]


async def test_of_many_messages_at_once_each_knows_those_before_it(
    two: Pair, talks: tuple[Conversations, Conversations], settings: ServerSettings, names: Names
) -> None:
    phone, event_id = app(names("phone")), uuid.uuid4()
    await two[0].record(phone, "seen")
    turns = await asyncio.gather(*(ask(two[k % 2], talks[k % 2], phone, names(f"q{k}"), minutes=k) for k in range(8)))
    assert sorted(turn.number for turn in turns) == list(range(1, 9))
    same = await asyncio.gather(*(ask(two[k % 2], talks[k % 2], phone, names(f"s{k}"), event_id=event_id) for k in range(8)))
    assert len({turn.question for turn in same}) == 1
    assert len(query(settings, TURNS, [names(f"s{k}") for k in range(8)])) == 1


async def test_only_recent_turns_are_gone_on_from(two: Pair, talks: tuple[Conversations, Conversations], names: Names) -> None:
    phone = app(names("phone"))
    token = await two[0].record(phone, "seen")
    for k in range(8):
        await ask(two[0], talks[0], phone, f"q{k}", minutes=k)
    talk = await talks[0].read(token.user_id, uuid.uuid4(), asked_at=AT + timedelta(minutes=65))
    assert ([turn.question for turn in talk.before], talk.count) == (["q7", "q6"], 8)  # of the last hour, five at the most
    talk = await talks[0].read(token.user_id, uuid.uuid4(), asked_at=AT + timedelta(minutes=9))
    assert [turn.question for turn in talk.before] == ["q7", "q6", "q5", "q4", "q3"]
