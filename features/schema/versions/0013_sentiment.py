"""What customers' reviews and messages say, judged once each, and as features of their profiles."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Runs the SQL beside this file."""
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Guarantees of this schema cannot be taken back; restore a backup instead."""
    raise RuntimeError("0013 cannot be undone; restore a backup instead")
