"""The way of a recommendation over stores in memory: one slate per state, followed through versions that move meanwhile."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from server.domain import Answer, ItemFilter, RecommendQuery, Subject, Token
from server.errors import ConflictError, InvalidRequestError, NotFoundError, PreconditionError, StaleStateError, UnavailableError
from server.ingest.identities import Known
from server.online.store import Fleet
from server.recommend.shelf import page_token
from tests.unit.memory import Replica, Shop


@pytest.fixture
def shop() -> Shop:
    shop = Shop()
    shop.views("u", "i001", "i002", "i003")
    return shop


def query(user_id: str = "u", *, channel: str = "web", limit: int = 10, surface: str = "home", **more: Any) -> RecommendQuery:
    return RecommendQuery(Subject(user_id=user_id), channel, surface, limit, **more)


async def ask(replica: Replica, user_id: str = "u", **more: Any) -> Answer:
    return await replica.recommender.recommend(query(user_id, **more))


def shown(answer: Answer) -> list[tuple[str, int, float, int | None]]:
    return [(item.item_id, item.position, item.score, item.card.price_micros) for item in answer.items]


def times(count: int, act: Callable[[], object]) -> Callable[[], None]:
    """Returns a hook that acts the first ``count`` times it is called."""
    left = [count]

    def hook() -> None:
        if left[0]:
            left[0] -= 1
            act()

    return hook


async def test_a_slate_is_computed_once_and_then_read_by_every_channel_and_replica(shop: Shop) -> None:
    first, second = shop.replica(), shop.replica()
    answers = [await ask(replica, channel=channel) for replica in (first, second) for channel in ("web", "app", "store")]
    assert first.fleet.computations == 1
    assert second.fleet.computations == 0
    assert (first.count("miss"), first.count("hit"), second.count("hit")) == (1, 2, 3)
    assert len({answer.slate_id for answer in answers}) == 1
    assert len({answer.versions for answer in answers}) == 1
    assert all(shown(answer) == shown(answers[0]) for answer in answers)
    assert answers[0].token == Token("u", 3)


async def test_fifty_concurrent_misses_compute_once(shop: Shop) -> None:
    replica = shop.replica()
    answers = await asyncio.gather(*(ask(replica, channel=f"c{k}") for k in range(50)))
    assert replica.fleet.computations == 1
    assert replica.count("miss") == 50  # they all missed, and waited for the one
    assert all((answer.slate_id, shown(answer)) == (answers[0].slate_id, shown(answers[0])) for answer in answers)


async def test_two_replicas_that_compute_at_once_answer_with_the_slate_committed_first(shop: Shop) -> None:
    first, second = shop.replica(), shop.replica()
    second.states.stale = True  # a replica that would say something else
    answers = await asyncio.gather(*(ask(replica) for replica in (first, second) * 5))
    assert (first.fleet.computations, second.fleet.computations) == (1, 1)
    assert len({(answer.slate_id, answer.stale, answer.as_of) for answer in answers}) == 1
    assert len(shop.online.slates) == 1


async def test_a_caller_who_leaves_does_not_take_the_computation_along(shop: Shop) -> None:
    replica = shop.replica()
    leaving = asyncio.create_task(ask(replica))
    while not replica.fleet.computations:
        await asyncio.sleep(0.001)
    staying = asyncio.create_task(ask(replica))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).items
    assert leaving.cancelled()
    assert replica.fleet.computations == 1


async def test_a_failed_computation_reaches_every_waiting_call_and_is_not_remembered(shop: Shop) -> None:
    replica = shop.replica()
    replica.fleet.error = RuntimeError("no memory")
    outcomes = await asyncio.gather(*(ask(replica) for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 5
    replica.fleet.error = None
    assert (await ask(replica)).items


async def test_an_event_between_the_look_and_the_computation_is_in_the_answer(shop: Shop) -> None:
    replica = shop.replica()
    shop.online.on_read = times(1, lambda: shop.views("u", "i030"))
    replica.fleet.current = replica.fleet.snapshot("m1", 1)
    answer = await ask(replica)
    assert answer.versions.user_version == 4
    assert replica.fleet.computations == 1
    assert (await ask(replica)).slate_id == answer.slate_id


async def test_each_event_makes_a_new_slate_and_versions_never_go_back(shop: Shop) -> None:
    replica, seen = shop.replica(), []
    for k in range(5):
        seen.append((await ask(replica)).versions.user_version)
        shop.views("u", f"i{k + 10:03d}")
    assert seen == [3, 4, 5, 6, 7]


async def test_a_slate_newer_than_the_state_at_hand_is_answered_not_replaced(shop: Shop) -> None:
    replica = shop.replica()
    old = shop.online.customers["u"]
    shop.views("u", "i030")
    newest = await ask(replica)
    slates = dict(shop.online.slates)
    shop.online.customers["u"] = old  # Redis came back with an older state
    again = await ask(replica)
    assert (again.slate_id, again.versions.user_version) == (newest.slate_id, 4)
    assert shop.online.slates == slates


async def test_a_pointer_that_moves_while_we_look_is_followed(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.online.on_read = times(1, lambda: shop.point(model_version="m2", activation=2, index_version=5))
    still = await ask(replica)  # this read was made before the move: one moment, one answer
    assert (still.slate_id, still.versions.model_version) == (before.slate_id, "m1")
    after = await ask(replica)
    assert (after.versions.model_version, after.versions.index_version) == ("m2", 5)
    assert after.slate_id != before.slate_id


async def test_rolling_back_finds_the_slate_that_stood(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.point(model_version="m2", activation=2)
    assert (await ask(replica)).slate_id != before.slate_id
    shop.point(model_version="m1", activation=3)
    assert (await ask(replica)).slate_id == before.slate_id
    assert replica.fleet.computations == 2


async def test_versions_that_never_rest_end_in_unavailable(shop: Shop) -> None:
    replica = shop.replica()

    def move() -> None:
        assert shop.online.fleet is not None
        shop.point(index_version=shop.online.fleet.index_version + 1)

    shop.online.on_read = move
    with pytest.raises(UnavailableError) as caught:
        await ask(replica)
    assert caught.value.reason == "VERSIONS_MOVING"
    assert shop.online.reads < 50
    shop.online.on_read = times(5, move)  # a few moves are followed
    assert (await ask(replica)).items


async def test_a_token_waits_for_nothing_older(shop: Shop) -> None:
    replica = shop.replica()
    await ask(replica)
    version = shop.views("u", "i030", seen=False)
    assert (await ask(replica)).versions.user_version == 3  # without the token Redis decides
    answer = await ask(replica, token=Token("u", version))
    assert (answer.versions.user_version, answer.token) == (4, Token("u", 4))
    assert replica.states.rebuilds == 1
    again = await ask(replica, token=Token("u", 2))
    assert again.slate_id == answer.slate_id


async def test_a_token_ahead_of_the_truth_is_refused(shop: Shop) -> None:
    with pytest.raises(StaleStateError) as caught:
        await ask(shop.replica(), token=Token("u", 9))
    assert (caught.value.reason, caught.value.field) == ("TOKEN_AHEAD", "consistency_token")


async def test_a_lost_online_store_is_rebuilt_and_answers_the_same(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.online.customers.clear()
    shop.online.slates.clear()
    shop.online.fleet = None
    after = await ask(replica)
    assert (after.slate_id, shown(after), after.versions) == (before.slate_id, shown(before), before.versions)
    assert shop.online.fleet == Fleet("m1", 1, 1, 1)


async def test_an_unknown_customer_is_said_to_be_unknown(shop: Shop) -> None:
    with pytest.raises(NotFoundError) as caught:
        await ask(shop.replica(), "nobody")
    assert caught.value.field == "subject.user_id"


async def test_a_merged_customer_is_followed_to_the_survivor_and_remembered(shop: Shop) -> None:
    subject = Subject(channel="web", channel_user_id="cookie")
    replica = shop.replica(known=[(subject, "loser")])
    shop.truth.merged["loser"] = "u"
    answer = await replica.recommender.recommend(RecommendQuery(subject, "web", "home", 5))
    assert (answer.user_id, answer.token) == ("u", Token("u", 3))
    assert (await replica.identities.customer_of(subject)).user_id == "u"
    direct = await ask(replica, limit=5)
    assert shown(answer) == shown(direct)


async def test_an_exposure_names_the_persona_that_asked(shop: Shop) -> None:
    replica = shop.replica()
    shop.truth.merged["loser"] = "u"
    for user_id in ("loser", "u"):
        await ask(replica, user_id)
    assert [answer.user_id for answer, _, _ in replica.journal.logged] == ["u", "u"]
    assert replica.journal.personas == ["loser", "u"]


async def test_an_identity_whose_customer_was_regrouped_is_resolved_again(shop: Shop) -> None:
    subject = Subject(channel="web", channel_user_id="cookie")
    replica = shop.replica(known=[(subject, "u")])
    shop.views("v", "i001")
    shop.truth.identities[subject] = "v"  # unlinked by another replica, which has written what is left of "u"
    shop.truth.membership["u"] = shop.online.membership["u"] = 1
    for _ in range(2):
        answer = await replica.recommender.recommend(RecommendQuery(subject, "web", "home", 5))
        assert answer.user_id == "v"
        ranked = await replica.recommender.rank(subject, channel="web", surface="home", item_ids=["i001"], token=None)
        assert ranked.user_id == "v"


@pytest.mark.parametrize("away", [False, True])
async def test_an_identity_that_leaves_between_the_look_and_the_features_is_resolved_again(shop: Shop, away: bool) -> None:
    """The first look saw the customer with it; the features, and so the answer, are those of the customer without it."""
    subject = Subject(channel="web", channel_user_id="cookie")
    shop.views("v", "i001")

    def part() -> None:
        shop.truth.identities[subject] = "v"
        shop.truth.membership["u"] = shop.truth.membership.get("u", 0) + 1
        shop.views("u", "i009")

    for ranking in (False, True):
        replica = shop.replica()
        await ask(replica, "v")  # so that the snapshot is there and one look is enough
        shop.truth.identities.clear()
        replica.identities._cache[subject] = Known("u", shop.truth.membership.get("u", 0))
        shop.online.away, shop.online.on_read, replica.states.on_recorded = away, times(1, part), times(1, part)
        if ranking:
            answer = await replica.recommender.rank(subject, channel="web", surface="home", item_ids=["i001"], token=None)
        else:
            answer = await replica.recommender.recommend(RecommendQuery(subject, "web", "home", 5))
        assert answer.user_id == "v"
        shop.online.away = False


async def test_an_identity_of_a_forgotten_customer_is_nobody(shop: Shop) -> None:
    subject = Subject(channel="web", channel_user_id="cookie")
    replica = shop.replica(known=[(subject, "forgotten")])
    answer = await replica.recommender.recommend(RecommendQuery(subject, "web", "home", 5))
    assert (answer.user_id, answer.token) == ("", None)


async def test_customers_that_merge_in_a_circle_end_in_unavailable(shop: Shop) -> None:
    shop.truth.merged |= {"a": "b", "b": "a"}
    with pytest.raises(UnavailableError) as caught:
        await ask(shop.replica(), "a")
    assert caught.value.reason == "MERGE_IN_PROGRESS"


async def test_a_slate_stands_until_it_expires(shop: Shop) -> None:
    replica = shop.replica(ttl_seconds=60)
    before = await ask(replica)
    shop.pass_time(59)
    assert (await ask(replica)).slate_id == before.slate_id
    shop.pass_time(2)
    after = await ask(replica)
    assert after.as_of > before.as_of
    assert after.slate_id != before.slate_id
    assert shown(after) == shown(before)


async def test_pages_join_to_the_whole_slate(shop: Shop) -> None:
    replica, token = shop.replica(), ""
    joined: list[tuple[str, int, float, int | None]] = []
    whole = await ask(replica, limit=100)
    assert (len(whole.items), whole.next_page_token) == (40, "")
    while token or not joined:
        page = await ask(replica, limit=7, page_token=token)
        joined += shown(page)
        token = page.next_page_token
    assert joined == shown(whole)


async def test_a_page_token_of_a_slate_that_is_gone_is_a_conflict(shop: Shop) -> None:
    replica = shop.replica()
    token = (await ask(replica)).next_page_token
    shop.views("u", "i030")
    with pytest.raises(ConflictError) as caught:
        await ask(replica, page_token=token)
    assert (caught.value.reason, caught.value.field) == ("SLATE_EXPIRED", "page_token")


async def test_a_page_token_beyond_the_slate_is_none_of_ours(shop: Shop) -> None:
    """Its position would be written to the journal, where one that no column holds would keep all later exposures waiting."""
    replica = shop.replica()
    slate_id = (await ask(replica)).slate_id
    for position in (40, 3_000_000_000):
        with pytest.raises(InvalidRequestError) as caught:
            await ask(replica, page_token=page_token(slate_id, position))
        assert (caught.value.reason, caught.value.field) == ("INVALID_TOKEN", "page_token")
    assert len((await ask(replica, page_token=page_token(slate_id, 39))).items) == 1
    assert len(replica.journal.logged) == 2


async def test_prices_are_live_and_the_slate_stays(shop: Shop) -> None:
    replica = shop.replica()
    before = await ask(replica)
    shop.point(offer_version=7)
    after = await ask(replica)
    assert (after.slate_id, after.versions.offer_version) == (before.slate_id, 7)
    assert [(i, p, s) for i, p, s, _ in shown(after)] == [(i, p, s) for i, p, s, _ in shown(before)]
    assert {(b or 0) - (a or 0) for (*_, a), (*_, b) in zip(shown(before), shown(after), strict=True)} == {60_000}
    assert replica.offers.asked == [1, 7]


async def test_context_and_surface_are_places_of_their_own(shop: Shop) -> None:
    replica = shop.replica()
    products: list[dict[str, Any]] = [{"surface": "product", "context_item_ids": (item,)} for item in ("i020", "i021")]
    answers = [await ask(replica, **more) for more in ({}, *products)]
    assert len({answer.slate_id for answer in answers}) == len(shop.online.slates) == 3
    assert shown(answers[1]) != shown(answers[2])  # a context item counts as just viewed


async def test_someone_nobody_has_met_gets_the_slate_of_all_newcomers(shop: Shop) -> None:
    strangers = [Subject(channel=channel, channel_user_id="new") for channel in ("web", "app")]
    replica = shop.replica(known=[(stranger, "") for stranger in strangers])
    answer, other = [await replica.recommender.recommend(RecommendQuery(who, who.channel, "home", 10)) for who in strangers]
    assert (answer.user_id, answer.token, answer.versions.user_version) == ("", None, 0)
    assert all(item.newcomer for item in answer.items)
    assert (other.slate_id, shown(other)) == (answer.slate_id, shown(answer))
    assert not any(item.newcomer for item in (await ask(replica)).items)


async def test_a_stale_profile_is_said_and_stays_said_while_the_slate_stands(shop: Shop) -> None:
    replica = shop.replica()
    replica.states.stale = True
    assert (await ask(replica)).stale
    replica.states.stale = False
    assert (await ask(replica)).stale
    shop.views("u", "i030")
    assert not (await ask(replica)).stale


async def test_without_a_model_popularity_answers_and_ranking_refuses(shop: Shop) -> None:
    shop.point(model_version="")
    replica = shop.replica()
    answer = await ask(replica)
    assert answer.degraded_reasons == ("NO_ACTIVE_MODEL",)
    assert answer.items[0].item_id == "i000"
    for call in (
        replica.recommender.rank(Subject("u"), channel="web", surface="home", item_ids=["i001"], token=None),
        replica.recommender.similar("i001", channel="web", limit=3, filters=ItemFilter()),
    ):
        with pytest.raises(PreconditionError) as caught:
            await call
        assert caught.value.reason == "NO_ACTIVE_MODEL"


async def test_ranking_gives_the_scores_of_the_slate_and_names_unknown_items(shop: Shop) -> None:
    replica = shop.replica()
    slate = {item.item_id: item.score for item in (await ask(replica, limit=100)).items}
    some = [*sorted(slate)[:12], "gone", sorted(slate)[0], "gone"]
    committed = dict(shop.online.slates)
    answer = await replica.recommender.rank(Subject("u"), channel="web", surface="home", item_ids=some, token=Token("u", 3))
    assert {item.item_id: item.score for item in answer.items} == {item: slate[item] for item in sorted(slate)[:12]}
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert answer.unknown_item_ids == ("gone",)
    assert (answer.slate_id, answer.token) == ("", Token("u", 3))
    assert shop.online.slates == committed


async def test_similar_items_are_near_sold_and_not_the_item_itself(shop: Shop) -> None:
    replica = shop.replica()
    whole = await replica.recommender.similar("i005", channel="web", limit=100, filters=ItemFilter())
    assert len(whole.items) == 59
    assert "i005" not in {item.item_id for item in whole.items}
    scores = [item.score for item in whole.items]
    assert scores == sorted(scores, reverse=True)
    vectors = replica.fleet.snapshot("m1", 1).vectors
    assert whole.items[0].score == pytest.approx(0.5 * max(float(vectors[5] @ vectors[k]) for k in range(60) if k != 5))
    few = await replica.recommender.similar("i005", channel="app", limit=4, filters=ItemFilter(categories=frozenset({"c1"})))
    assert shown(few) == [row for row, item in zip(shown(whole), whole.items, strict=True) if item.card.category == "c1"][:4]
    with pytest.raises(NotFoundError) as caught:
        await replica.recommender.similar("gone", channel="web", limit=3, filters=ItemFilter())
    assert caught.value.field == "item_id"


async def test_similar_items_beyond_a_shortlist_are_found_where_too_few_of_it_pass(shop: Shop) -> None:
    replica = shop.replica()
    only = ItemFilter(categories=frozenset({"c1"}))
    whole, few = [await replica.recommender.similar("i005", channel="web", limit=10, filters=f) for f in (ItemFilter(), only)]
    exact = replica.fleet.current
    assert exact is not None
    nearest = np.sort([5, *(exact.table.rows[item.item_id] for item in whole.items)]).astype(np.int32)
    index = SimpleNamespace(shortlist=lambda _: nearest)  # of all c1 the ten nearest hold too few
    replica.fleet.current = replace(exact, index=cast("Any", index))
    asked = [await replica.recommender.similar("i005", channel="web", limit=10, filters=f) for f in (ItemFilter(), only)]
    assert [shown(answer) for answer in asked] == [shown(whole), shown(few)]
    assert not {item.item_id for item in few.items} <= {item.item_id for item in whole.items}


async def test_exposures_are_logged_as_answered_unless_unwanted(shop: Shop) -> None:
    replica = shop.replica()
    answer = await ask(replica, channel="app")
    await ask(replica, log_exposure=False)
    assert replica.journal.logged == [(answer, "app", "home")]


async def test_an_answer_says_how_long_each_stage_took(shop: Shop) -> None:
    replica = shop.replica()
    miss, hit = await ask(replica), await ask(replica)
    computed = {"features", "user_vector", "candidates", "ranking", "policy", "commit"}
    assert computed <= set(miss.stages)
    assert set(hit.stages) == {"identity", "online_read", "offers", "answer"}
