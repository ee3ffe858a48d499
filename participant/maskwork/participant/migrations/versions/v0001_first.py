"""Schema 1: the first one. A released migration script is never edited; the next schema gets a script of its own."""

import sqlalchemy as sa
from alembic import op

revision = "participant_0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "attempts",
        sa.Column("federation", sa.String(length=255), nullable=False),
        sa.Column("job", sa.String(length=255), nullable=False),
        sa.Column("round_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("session_id", sa.LargeBinary(), nullable=False),
        sa.Column("plan_bytes", sa.LargeBinary(), nullable=False),
        sa.Column("plan_signature", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("federation", "job", "round_number", "attempt"),
    )
    op.create_table(
        "marks",
        sa.Column("federation", sa.String(length=255), nullable=False),
        sa.Column("revocation_number", sa.Integer(), nullable=True),
        sa.Column("audit_head", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("federation"),
    )
    op.create_table(
        "refused_plans",
        sa.Column("position", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("federation", sa.String(length=255), nullable=False),
        sa.Column("job", sa.String(length=255), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("session_id", sa.LargeBinary(), nullable=False),
        sa.Column("plan_bytes", sa.LargeBinary(), nullable=False),
        sa.Column("plan_signature", sa.LargeBinary(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("federation", "session_id"),
    )
    op.create_table(
        "releases",
        sa.Column("position", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("federation", sa.String(length=255), nullable=False),
        sa.Column("job", sa.String(length=255), nullable=False),
        sa.Column("model_digest", sa.LargeBinary(), nullable=False),
        sa.Column("session_id", sa.LargeBinary(), nullable=False),
        sa.Column("survivors_json", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("federation", "session_id"),
    )
    op.create_index("ix_releases_model", "releases", ["federation", "model_digest"], unique=False)
