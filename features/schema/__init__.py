"""The PostgreSQL schema, migrated by Alembic: the system of record of one shop."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from features.settings import sqlalchemy_url


def _config(dsn: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = sqlalchemy_url(dsn)
    return config


def migrate(dsn: str, revision: str = "head") -> None:
    """Brings the database named by ``dsn`` to ``revision``; running it twice changes nothing."""
    command.upgrade(_config(dsn), revision)


def current_revision(dsn: str) -> str | None:
    """Returns the revision the database stands at, or None when it was never migrated."""
    engine = create_engine(sqlalchemy_url(dsn))
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def head_revision() -> str | None:
    """Returns the newest revision this release knows."""
    return ScriptDirectory(str(Path(__file__).parent)).get_current_head()
