"""An index of purchases, which every state of a customer holds."""

from pathlib import Path

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Drops the index: nothing but speed hangs on it."""
    op.execute("DROP INDEX events_purchases")
