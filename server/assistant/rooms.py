"""Puts the rooms of the assistant together."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from server.assistant.article_library import ArticleLibrary
from server.assistant.assistant import Assistant
from server.assistant.conversations import Conversations
from server.catalog.offers import Offers
from server.database import Pool
from server.fleet import FleetWatch
from server.ingest.identities import Identities
from server.ingest.recorder import EventRecorder
from server.metrics import Metrics
from server.recommend.computing import Computing
from server.recommend.rooms import policy_of
from server.recommend.slates import Slates
from server.recommend.standing import Standings
from server.settings import ServerSettings
from server.understand.classifiers import Classifiers
from server.understand.text_runs import TextRuns


@dataclass(frozen=True)
class AssistantRooms:
    """The assistant of one process, and what must run for it."""

    assistant: Assistant
    loops: tuple[Coroutine[Any, Any, None], ...]


@asynccontextmanager
async def open_assistant(
    settings: ServerSettings,
    *,
    pool: Pool,
    recorder: EventRecorder,
    identities: Identities,
    standings: Standings,
    slates: Slates,
    offers: Offers,
    fleet: FleetWatch,
    runs: TextRuns,
    computing: Computing,
    metrics: Metrics,
    now: Callable[[], datetime],
) -> AsyncIterator[AssistantRooms]:
    """Yields the assistant of one process over its stores; with a generator where the settings name one."""
    library = ArticleLibrary(pool, fleet)
    async with AsyncExitStack() as stack:
        phraser = None
        if settings.generator_url:
            from server.assistant.phrasing import open_phraser  # here: 7 MB that a shop without a generator never loads

            phraser = await stack.enter_async_context(
                open_phraser(
                    settings.generator_url,
                    model=settings.generator_model,
                    key=settings.generator_key.get_secret_value(),
                    timeout_seconds=settings.generator_timeout_seconds,
                    counted=metrics.phrasing,
                )
            )
        assistant = Assistant(
            recorder=recorder,
            identities=identities,
            conversations=Conversations(pool, remembered=settings.assistant_remembered, seconds=settings.assistant_remembered_seconds),
            standings=standings,
            slates=slates,
            offers=offers,
            library=library,
            classifiers=Classifiers(runs),
            computing=computing,
            phraser=phraser,
            rules=policy_of(settings).assistant,
            hide_out_of_stock=settings.hide_out_of_stock,
            metrics=metrics,
            now=now,
        )
        loops = (library.run(settings.recovery_seconds), *([phraser.breaker.run()] if phraser else []))
        yield AssistantRooms(assistant, loops)
