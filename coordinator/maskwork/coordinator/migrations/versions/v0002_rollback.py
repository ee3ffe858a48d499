"""Schema 2: rounds that had committed and were taken back, because their models were damaged (ADR 0010)."""

import sqlalchemy as sa
from alembic import op

revision = "coordinator_0002"
down_revision = "coordinator_0001"


def upgrade() -> None:
    """Say of each round whether it was taken back, and of each job how many were."""
    op.add_column("jobs", sa.Column("rolled_back", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("rounds", sa.Column("rolled_back_at", sa.Float(precision=53), nullable=True))
    op.add_column("rounds", sa.Column("rolled_back_reason", sa.Text(), nullable=False, server_default=""))
