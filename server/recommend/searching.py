"""From a query to the items it finds for a customer; and which computation a place asks for."""

from time import perf_counter

import numpy as np

from features.behaviour import Activity
from features.ranking import Profile
from features.search import before_search, find_matches, normalized_query
from server.recommend.compute import Policy, Ranked, compute_slate
from server.recommend.slate import Place, SlateFlag
from server.recommend.snapshot import Snapshot
from server.tracing import span


def compute_place(snapshot: Snapshot, activity: Activity, profile: Profile, place: Place, policy: Policy) -> Ranked:
    """Computes the slate of a place. Equal arguments give equal bits on the same processor type, in whatever company it runs."""
    if place.query:
        return compute_search(snapshot, activity, profile, place.query, policy)
    # Context items are part of the sequence, as if just viewed; the channel is not: it must not change the answer.
    return compute_slate(snapshot, activity.with_context(place.context_item_ids, ""), profile, policy)


def compute_search(snapshot: Snapshot, activity: Activity, profile: Profile, query: str, policy: Policy) -> Ranked:
    """Computes what a normalized query finds; where that is nothing, recommendations, flagged RECOMMENDED_INSTEAD.

    The customer is as they were before this very search, whether or not its event is in ``activity``.
    """
    table, model = snapshot.table, snapshot.model
    earlier = before_search(activity, query)
    marks = [perf_counter()]
    with span("words"):
        meant = table.lexical.corrected(query)
        relevance = table.lexical.relevance(meant.terms)
    marks.append(perf_counter())
    with span("query_vector"):
        # What has no word says nothing to an encoder either: it would name what it makes of any unknown character.
        vector = model.text_vector(meant.text or query) if model and meant.terms and len(table) else None
    marks.append(perf_counter())
    with span("user_vector"):
        customer = model.user_vector(earlier, table, snapshot.vectors) if model and vector is not None else None
    marks.append(perf_counter())
    with span("matching"):
        found = find_matches(relevance, snapshot.vectors, query=vector, customer=customer, index=snapshot.index, weights=policy.search)
    marks.append(perf_counter())
    stages = dict(zip(("words", "query_vector", "user_vector", "matching"), np.diff(marks).tolist(), strict=True))
    if not len(found.rows):
        instead = compute_slate(snapshot, earlier, profile, policy)
        stages |= {stage: stages.get(stage, 0.0) + seconds for stage, seconds in instead.stages.items()}
        return Ranked(instead.rows, instead.scores, instead.sources, instead.flags | SlateFlag.RECOMMENDED_INSTEAD, stages)
    flags = SlateFlag(0) if model else SlateFlag.NO_MODEL
    return Ranked(found.rows, found.scores, found.sources, flags, stages)


def rehearse(snapshot: Snapshot, policy: Policy) -> None:
    """Computes slates that nobody sees, of somebody who looked at the first item: every part runs once before it answers.

    What searches need besides is built here, off the event loop: the words and completions of the epoch's items.
    """
    table = snapshot.table
    somebody = Activity(0).with_context(table.ids[:1], "")
    compute_slate(snapshot, somebody, Profile(), policy)
    title = normalized_query(table.titles[0]) if len(table) else ""
    compute_search(snapshot, somebody, Profile(), title or "nothing", policy)
    table.completions.complete("", 1, lambda _: True)
