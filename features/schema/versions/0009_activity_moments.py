"""The moments of the activity view, under a name that a join can narrow down."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Guarantees of this schema cannot be taken back; restore a backup instead."""
    raise RuntimeError("0009 cannot be undone; restore a backup instead")
