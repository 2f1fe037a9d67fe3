"""Alembic's entry point: one connection, one transaction per migration, guarded by an advisory lock."""

from alembic import context
from sqlalchemy import create_engine, text

# Any number shared by all migrating processes will do; this one spells "cncd" in ASCII.
_LOCK = 0x636E6364

engine = create_engine(context.config.attributes["url"])
with engine.connect() as connection:
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
    connection.commit()
    try:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK})
        connection.commit()
engine.dispose()
