"""The fixed times of the tests."""

from datetime import UTC, datetime, timedelta

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=90)
