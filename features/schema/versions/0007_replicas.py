"""Replicas that wait to join, and what runs their models."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Guarantees of this schema cannot be taken back; restore a backup instead."""
    raise RuntimeError("0007 cannot be undone; restore a backup instead")
