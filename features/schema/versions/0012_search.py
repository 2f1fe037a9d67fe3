"""Exposures of searches name their query."""

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Drops the queries: answers of searches can no longer be replayed."""
    op.execute("ALTER TABLE exposures DROP COLUMN query")
