"""Actions in a customer's state are numbers, and the text of a rating or review says how it was rated."""

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Guarantees of this schema cannot be taken back; restore a backup instead."""
    raise RuntimeError("0011 cannot be undone; restore a backup instead")
