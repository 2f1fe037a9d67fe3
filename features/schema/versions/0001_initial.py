"""The first schema: customers, events, catalogue, index epochs, feature snapshots, journal and model registry."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """There is nothing below the first schema."""
    raise RuntimeError("0001 is the first schema; drop the database instead")
