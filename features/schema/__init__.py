"""The PostgreSQL schema, migrated by Alembic: the system of record of one shop."""

from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from features.settings import sqlalchemy_url

if TYPE_CHECKING:
    from alembic.config import Config

_FOLDER = Path(__file__).parent


def _config(dsn: str) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.attributes["url"] = sqlalchemy_url(dsn)
    return config


def migrate(dsn: str, revision: str = "head") -> None:
    """Brings the database named by ``dsn`` to ``revision``; running it twice changes nothing."""
    from alembic import command  # with SQLAlchemy 25 MB, which a server on a current schema does without

    command.upgrade(_config(dsn), revision)


def current_revision(dsn: str) -> str | None:
    """Returns the revision the database stands at, or None when it was never migrated."""
    with psycopg.connect(dsn) as connection:
        if connection.execute("SELECT to_regclass('alembic_version') IS NULL").fetchone() == (True,):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def head_revision() -> str:
    """Returns the newest revision this release knows: the files of revisions begin with their numbers."""
    return max(path.name.partition("_")[0] for path in (_FOLDER / "versions").glob("[0-9]*.py"))
