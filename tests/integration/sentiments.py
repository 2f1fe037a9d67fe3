"""Judgements of events, put in place without a model: for tests of what becomes of them."""

import uuid
from datetime import datetime

import psycopg

from server.settings import ServerSettings


def write_event(settings: ServerSettings, user: str, at: datetime, text: str, *, action: str = "review") -> uuid.UUID:
    """Stores a review of a customer, as an import would, and returns its id."""
    event = uuid.uuid4()
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute("INSERT INTO users (user_id) VALUES (%s) ON CONFLICT DO NOTHING", [user])
        connection.execute(
            "INSERT INTO events (user_id, event_id, channel, action, text, occurred_at) VALUES (%s, %s, 'web', %s, %s, %s)",
            [user, event, action, text, at],
        )
        connection.execute("UPDATE users SET version = version + 1 WHERE user_id = %s", [user])
    return event


def judge(settings: ServerSettings, user: str, event: uuid.UUID, score: float | None, *, origin: str = "") -> None:
    """Stores what a model made of an event."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        connection.execute(
            "INSERT INTO event_sentiments (user_id, event_id, origin_id, language, score, model_version) "
            "VALUES (%s, %s, %s, 'en', %s, 'm')",
            [user, event, origin or user, score],
        )


def opinion(settings: ServerSettings, user: str, at: datetime, score: float | None) -> uuid.UUID:
    """Stores a review and what a model made of it."""
    event = write_event(settings, user, at, "a review")
    judge(settings, user, event, score)
    return event
