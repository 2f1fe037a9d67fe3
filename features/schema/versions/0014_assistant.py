"""The shop's articles, and what customers asked and were answered."""

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Drops articles and turns: what was imported must be imported again, what was asked is gone."""
    op.execute("DROP TABLE assistant_turns, articles")
    op.execute("ALTER TABLE fleet_state DROP COLUMN article_version")
