"""Puts the rooms of a recommendation together."""

from collections.abc import Callable
from datetime import datetime

from features.search import SearchWeights
from server.assistant.rules import AssistantRules
from server.catalog.offers import Offers
from server.fleet import FleetWatch
from server.ingest.identities import Identities
from server.journal.exposures import Journal
from server.metrics import Metrics
from server.online.states import UserStates
from server.online.store import OnlineStore
from server.recommend.ahead import Ahead
from server.recommend.compute import Policy
from server.recommend.computing import Computing, Gate
from server.recommend.customers import Customers
from server.recommend.known import KnownSlates
from server.recommend.recommender import Recommender
from server.recommend.slates import Slates
from server.recommend.standing import Standings
from server.settings import ServerSettings


def policy_of(settings: ServerSettings) -> Policy:
    """Returns the shop's rules for slates and answers."""
    weights = SearchWeights(personal=settings.search_personal_weight, least_similarity=settings.search_least_similarity)
    assistant = AssistantRules(settings.assistant_min_confidence, settings.assistant_scope_confidence)
    return Policy(settings.slate_size, settings.exclude_purchased, settings.max_per_category, weights, assistant)


def recommender_of(
    settings: ServerSettings,
    *,
    known: KnownSlates,
    identities: Identities,
    states: UserStates,
    standings: Standings,
    computing: Computing,
    ahead: Ahead,
    online: OnlineStore,
    fleet: FleetWatch,
    offers: Offers,
    journal: Journal,
    metrics: Metrics,
    now: Callable[[], datetime],
) -> Recommender:
    """Returns the recommender of one process over its stores."""
    slates = Slates(
        standings,
        Customers(states),
        online=online,
        fleet=fleet,
        metrics=metrics,
        computing=computing,
        ahead=ahead,
        apart=Gate(slots=settings.degraded_reads, waiting=settings.degraded_waiting, reason="DEGRADED_QUEUE_FULL"),
        known=known,
        policy=policy_of(settings),
        ttl_seconds=settings.slate_ttl_seconds,
    )
    return Recommender(
        identities=identities,
        slates=slates,
        standings=standings,
        computing=computing,
        offers=offers,
        journal=journal,
        metrics=metrics,
        hide_out_of_stock=settings.hide_out_of_stock,
        now=now,
    )
