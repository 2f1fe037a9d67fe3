"""Identity across channels on real stores: links made and taken back by many at once, through replicas with caches of their own."""

import asyncio
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import redis

from features.activity import MERGED_FIELD
from features.importers import import_identities, load_mapping
from features.layout import entity_key
from features.materialize import materialize
from server.domain import Linked, Subject, Token
from server.errors import ForbiddenError, InvalidRequestError, NotFoundError
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Names, Pair, Replica, app, assert_whole, query, replica, web


async def test_a_merge_shows_in_the_next_call_of_every_replica(two: Pair, settings: ServerSettings, names: Names) -> None:
    first, second = two
    phone, card = app(names("phone")), web(names("card"))
    before = [await first.record(phone, "a", "b"), await second.record(card, "c")]
    for one, subject in itertools.product(two, (phone, card)):
        await one.read(subject)  # cached everywhere
    late = await second.states_of(before[1].user_id)
    linked = await first.graph.link(card, phone)
    await second.online.write_users(late)  # read before the merge, written after it
    key = entity_key("user_id", before[1].user_id, settings.project)
    assert redis.Redis.from_url(settings.redis_url).hget(key, MERGED_FIELD) == before[0].user_id.encode()
    assert linked == Linked(Token(before[0].user_id, 4), (before[1].user_id,))
    for one, subject in itertools.product(two, (phone, card, Subject(user_id=before[1].user_id))):
        assert await one.read(subject) == (linked.token.user_id, 4, ["a", "b", "c"])
        for token in (*before, linked.token):
            assert await one.read(subject, token) == (linked.token.user_id, 4, ["a", "b", "c"])
    assert await second.graph.link(phone, card) == Linked(linked.token, ())


async def test_an_unlink_gives_every_side_back_what_it_had(two: Pair, names: Names) -> None:
    first, second = two
    phone, card, shared = app(names("phone")), web(names("card")), names("shared")
    before = [await first.record(phone, "a", shared), await first.record(card, "b", shared)]
    apart = [await first.read(phone), await first.read(card)]
    linked = await first.graph.link(phone, card)
    assert (await second.read(card))[2] == sorted(["a", "b", shared])
    during = [await second.record(phone, "a2"), await second.record(card, "b2")]
    assert {token.user_id for token in during} == {before[0].user_id}
    unlinked = await second.graph.unlink(card, phone)
    assert (unlinked.removed_links, unlinked.still_linked) == (1, False)
    assert {unlinked.token.user_id, *(token.user_id for token in unlinked.separated)} == {token.user_id for token in before}
    for one in two:
        assert (await one.read(phone))[::2] == (apart[0][0], sorted([*apart[0][2], "a2"]))
        assert (await one.read(card))[::2] == (apart[1][0], sorted([*apart[1][2], "b2"]))
        for subject, token in itertools.product((phone, card), (*before, linked.token, *during, unlinked.token)):
            seen = await one.read(subject, token)
            assert seen[1] > max(token.version for token in (*before, linked.token, *during))
    again = await first.graph.unlink(card, phone)
    assert (again.removed_links, again.still_linked, again.separated, again.token) == (0, False, (), unlinked.token)


async def test_of_copies_of_an_event_the_one_received_first_is_seen(two: Pair, settings: ServerSettings, names: Names) -> None:
    phone, card, late = app(names("phone")), web(names("card")), web(names("late"))
    older = await two[0].identities.resolve(phone, create=True)
    token = await two[0].record(card, "same")
    await two[1].record(phone, "same")
    await two[1].record(late, "same")
    await two[0].graph.link(late, phone)
    await two[0].graph.link(phone, card)
    seen = "SELECT coalesce(origin_id, user_id) AS origin FROM events WHERE user_id = %s"
    hidden = "SELECT origin_id FROM events_shadowed WHERE user_id = %s"
    assert query(settings, seen, older.user_id) == [{"origin": token.user_id}]  # the younger customer's, received first
    assert len(query(settings, hidden, older.user_id)) == 2
    await two[1].graph.unlink(card, None)
    assert query(settings, seen, older.user_id) == [{"origin": older.user_id}]
    assert query(settings, seen, token.user_id) == [{"origin": token.user_id}]
    assert len(query(settings, hidden, older.user_id)) == 1


async def test_linking_and_unlinking_for_ever_does_not_let_versions_run_away(two: Pair, names: Names) -> None:
    phone, card = app(names("phone")), web(names("card"))
    await two[0].record(phone, "a")
    await two[1].record(card, "b")
    for _ in range(20):
        await two[0].graph.link(phone, card)
        unlinked = await two[1].graph.unlink(phone, card)
    assert unlinked.token.version < 60  # two a round; adding both sides up would have doubled them each time


async def test_a_chain_of_fifty_linked_in_any_order_is_one_customer(two: Pair, names: Names) -> None:
    chain = [web(names(str(k))) for k in range(50)]
    tokens = [await two[k % 2].record(subject, f"c{k}") for k, subject in enumerate(chain)]
    links = list(itertools.pairwise(chain))
    random.Random(3).shuffle(links)
    for k, (left, right) in enumerate(links):
        await two[k % 2].graph.link(left, right)
    expected = (tokens[0].user_id, 50 + 49, sorted(f"c{k}" for k in range(50)))
    assert {str(await one.read(subject)) for one in two for subject in chain} == {str(expected)}
    assert (await two[0].read(chain[49], tokens[7])) == expected
    unlinked = await two[1].graph.unlink(chain[24], chain[25])  # cut in the middle: two customers of twenty-five
    assert [token.user_id for token in (unlinked.token, *unlinked.separated)] == [tokens[0].user_id, tokens[25].user_id]
    assert len((await two[0].read(chain[0]))[2]) == len((await two[0].read(chain[49]))[2]) == 25


async def test_a_cycle_is_one_customer_until_two_links_are_gone(two: Pair, names: Names) -> None:
    ring = [web(names(str(k))) for k in range(3)]
    for subject in ring:
        await two[0].record(subject, subject.channel_user_id)
    merged = [await two[0].graph.link(ring[k], ring[(k + 1) % 3]) for k in range(3)]
    assert merged[2] == Linked(merged[1].token, ())  # closing the ring changes nothing anybody sees
    first = await two[1].graph.unlink(ring[0], ring[1])
    assert (first.removed_links, first.still_linked, first.separated, first.token) == (1, True, (), merged[1].token)
    second = await two[1].graph.unlink(ring[1], ring[2])
    assert (second.removed_links, second.still_linked, len(second.separated)) == (1, False, 1)
    assert (await two[0].read(ring[1]))[2] == [ring[1].channel_user_id]
    assert (await two[0].read(ring[0]))[2] == sorted([ring[0].channel_user_id, ring[2].channel_user_id])


async def test_what_follows_from_links_does_not_depend_on_their_order(two: Pair, settings: ServerSettings, names: Names) -> None:
    seen = set()
    for turn, order in enumerate(itertools.permutations([(0, 1), (1, 2), (2, 3), (3, 1)])):
        people = [web(names(f"{turn}-{k}")) for k in range(4)]
        tokens = [await two[k % 2].record(subject, f"own{k}", "same") for k, subject in enumerate(people)]
        for left, right in order:
            linked = await two[turn % 2].graph.link(people[left], people[right])
        short = {token.user_id: str(k) for k, token in enumerate(tokens)}
        rows = query(settings, "SELECT * FROM events WHERE user_id = %s", linked.token.user_id)
        events = sorted((row["item_id"], short[row["origin_id"] or row["user_id"]]) for row in rows)
        hidden = query(settings, "SELECT origin_id FROM events_shadowed WHERE user_id = %s", linked.token.user_id)
        homes = query(settings, "SELECT * FROM identities WHERE user_id = %s", linked.token.user_id)
        shadows, owners = sorted(short[row["origin_id"]] for row in hidden), sorted(short[row["home_id"]] for row in homes)
        seen.add(str((short[linked.token.user_id], linked.token.version, events, shadows, owners)))
    assert len(seen) == 1
    assert "('0', 11, [('own0', '0'), ('own1', '1'), ('own2', '2'), ('own3', '3'), ('same', '0')]" in seen.pop()


async def test_simultaneous_merges_end_as_one_after_the_other_would(two: Pair, settings: ServerSettings, names: Names) -> None:
    for turn in range(4):
        people = [web(names(f"{turn}-{k}")) for k in range(8)]
        tokens = [await two[0].record(subject, f"m{k}") for k, subject in enumerate(people)]
        links = [(people[k], people[(k * 3 + 1) % 8]) for k in range(8) if k != (k * 3 + 1) % 8] + list(itertools.pairwise(people))
        await asyncio.gather(*(two[k % 2].graph.link(left, right) for k, (left, right) in enumerate(links)))
        expected = (tokens[0].user_id, 8 + 7, sorted(f"m{k}" for k in range(8)))
        assert {str(await one.read(subject, token)) for one in two for subject, token in zip(people, tokens, strict=True)} == {
            str(expected)
        }
        assert_whole(settings)


async def test_merges_and_unlinks_racing_with_ingest_lose_and_double_nothing(two: Pair, settings: ServerSettings, names: Names) -> None:
    phone, card = app(names("phone")), web(names("card"))
    users = [(await two[0].record(subject, f"{subject.channel}-first")).user_id for subject in (phone, card)]
    sent: dict[str, set[str]] = {"app": {"app-first"}, "web": {"web-first"}}

    async def write(one: Replica, subject: Subject, number: int) -> None:
        for k in range(20):
            name = f"{subject.channel}-{number}-{k}"
            whom = subject if k % 2 else Subject(user_id=users[subject is card])
            await one.record(whom, name)
            sent[subject.channel].add(name)

    async def regroup() -> None:
        for k in range(12):
            await two[k % 2].graph.link(phone, card)
            await asyncio.sleep(0.002)
            await two[(k + 1) % 2].graph.unlink(card, phone)

    await asyncio.gather(regroup(), *(write(two[n % 2], subject, n) for n, subject in enumerate((phone, card, phone, card))))
    assert_whole(settings)
    stored = query(settings, "SELECT item_id FROM events WHERE user_id = ANY(%s)", users)
    assert sorted(row["item_id"] for row in stored) == sorted(sent["app"] | sent["web"])
    for subject, user_id in zip((phone, card), users, strict=True):
        rows = query(settings, "SELECT item_id FROM events WHERE user_id = %s", user_id)
        assert {row["item_id"] for row in rows} == sent[subject.channel]  # apart at the end: each side has its own
        assert {(await one.read(subject))[0] for one in two} == {user_id}


async def test_tokens_of_strangers_are_refused_however_often_others_merged(two: Pair, names: Names) -> None:
    people = [web(names(str(k))) for k in range(3)]
    tokens = [await two[0].record(subject, "x") for subject in people]
    await two[0].graph.link(people[0], people[1])
    await two[0].graph.unlink(people[0], None)
    assert (await two[1].read(people[0], tokens[1]))[0] == tokens[0].user_id
    for subject in people[:2]:
        with pytest.raises(InvalidRequestError) as refused:
            await two[1].read(subject, tokens[2])
        assert refused.value.reason == "TOKEN_OF_OTHER_USER"


async def test_an_identity_imported_with_others_gets_a_persona_of_its_own(
    two: Pair, settings: ServerSettings, names: Names, tmp_path: Path
) -> None:
    user_id, phone, card = names("u"), app(names("phone")), web(names("card"))
    source = tmp_path / "identities.jsonl"
    source.write_text(
        "".join(json.dumps({"channel": s.channel, "channel_user_id": s.channel_user_id, "user_id": user_id}) + "\n" for s in (phone, card))
    )
    assert import_identities(settings.postgres_dsn, source, load_mapping("sample_shop"), rejects=tmp_path / "r").stored == 2
    before = await two[0].record(phone, "before")
    assert (await two[1].read(card))[0] == user_id
    unlinked = await two[0].graph.unlink(card, phone)
    assert (unlinked.removed_links, unlinked.still_linked, unlinked.separated[0].user_id) == (0, False, user_id)
    assert (await two[1].read(card, before)) == (unlinked.token.user_id, unlinked.token.version, [])
    assert (await two[1].record(card, "after")).user_id == unlinked.token.user_id
    assert (await two[0].read(phone))[2] == ["before"]
    again = await two[0].graph.unlink(card, None)
    assert (again.token.user_id, again.separated) == (unlinked.token.user_id, ())


async def test_profiles_of_a_merge_are_taken_again_when_it_is_undone(two: Pair, new_shop: NewShop) -> None:
    settings = new_shop()
    async with replica(settings) as one:
        phone, card = app("phone"), web("card")
        tokens = [await one.record(phone, "a", "b"), await one.record(card, "c")]
        await asyncio.to_thread(materialize, settings)
        apart = [await profile(one, settings, token.user_id) for token in tokens]
        assert [row["event_count"] for row, _ in apart] == [2, 1]
        await one.graph.link(phone, card)
        await asyncio.to_thread(materialize, settings)
        assert (await profile(one, settings, tokens[0].user_id))[0]["event_count"] == 3
        await one.graph.unlink(phone, card)
        assert [await profile(one, settings, token.user_id) for token in tokens] == apart


async def profile(one: Replica, settings: ServerSettings, user_id: str) -> tuple[dict[str, Any], Any]:
    """A customer's newest profile in PostgreSQL, but for the times it was made for and at, and the event count in Redis."""
    rows = query(settings, "SELECT * FROM user_profile WHERE user_id = %s ORDER BY event_timestamp DESC LIMIT 1", user_id)
    online = await one.online.user_features(user_id, rows[0]["event_timestamp"])
    times = {"computed_at", "event_timestamp", "days_since_event"}
    return {name: value for name, value in rows[0].items() if name not in times}, online["user_profile"]["event_count"].value


async def test_a_merge_while_redis_is_away_is_caught_up_by_whoever_looks(
    two: Pair, settings: ServerSettings, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone, card = app(names("phone")), web(names("card"))
    tokens = [await two[0].record(phone, "a"), await two[0].record(card, "b")]
    for subject in (phone, card):
        await two[1].read(subject)

    async def away(_states: object) -> None:
        raise redis.ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(two[0].online, "write_users", away)
        linked = await two[0].graph.link(phone, card)
    waiting = query(settings, "SELECT user_id FROM online_outbox WHERE user_id = ANY(%s)", [token.user_id for token in tokens])
    assert len(waiting) == 2
    assert (await two[1].read(card))[2] == ["b"]  # Redis knows nothing of it yet, and nobody asked for more
    assert await two[1].read(card, linked.token) == (tokens[0].user_id, 3, ["a", "b"])
    assert await two[1].read(phone, tokens[1]) == (tokens[0].user_id, 3, ["a", "b"])


async def test_the_graph_tells_personas_identities_and_links(two: Pair, names: Names) -> None:
    phone, card, fresh = app(names("phone")), web(names("card")), web(names("fresh"))
    tokens = [await two[0].record(phone, "a"), await two[0].record(card, "b")]
    await two[0].graph.link(phone, card)
    linked = await two[0].graph.link(fresh, card)
    graph = await two[1].graph.read(fresh)
    assert graph.token == linked.token == Token(tokens[0].user_id, 3)  # a new identity changed no version
    assert [persona.user_id for persona in graph.personas[:2]] == [token.user_id for token in tokens]
    assert [persona.identities for persona in graph.personas] == [
        ((subject.channel, subject.channel_user_id),) for subject in (phone, card, fresh)
    ]
    pairs = {frozenset((link.left_id, link.right_id)) for link in graph.links}
    ids = [persona.user_id for persona in graph.personas]
    assert pairs == {frozenset(ids[:2]), frozenset(ids[1:])}
    with pytest.raises(NotFoundError):
        await two[1].graph.read(web(names("nobody")))


async def test_an_identity_of_another_channel_is_linked_where_it_exists_and_not_created(
    two: Pair, settings: ServerSettings, names: Names
) -> None:
    phone, card = app(names("phone")), web(names("card"))
    with pytest.raises(ForbiddenError) as refused:
        await two[0].graph.link(phone, card, may_create=False)
    assert (refused.value.reason, refused.value.field) == ("CHANNEL_FORBIDDEN", "subject.identity.channel")
    assert query(settings, "SELECT 1 FROM identities WHERE channel_user_id = ANY(%s)", [phone.channel_user_id, card.channel_user_id]) == []
    token = await two[0].record(card, names("a"))
    linked = await two[0].graph.link(phone, card, may_create=False)
    assert linked.token.user_id == token.user_id
