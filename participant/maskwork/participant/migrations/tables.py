"""The ledger's tables as they are at `HEAD`; a test holds the migration scripts to them.

Types are those that SQLite and PostgreSQL share: bytes as `LargeBinary`, JSON as text. NOT here: any rule beyond
keys (those are `ledger.py`'s).
"""

from sqlalchemy import Float, Index, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map = {float: Float(53), bytes: LargeBinary, str: Text}  # noqa: RUF012  (SQLAlchemy reads it)


class Attempt(Base):
    """A plan that this site took up: the highest of each job, and those before it."""

    __tablename__ = "attempts"
    federation: Mapped[str] = mapped_column(String(255), primary_key=True)
    job: Mapped[str] = mapped_column(String(255), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    session_id: Mapped[bytes]
    plan_bytes: Mapped[bytes]
    plan_signature: Mapped[bytes]
    at: Mapped[float]


class RefusedPlan(Base):
    """A signed plan that this site refused."""

    __tablename__ = "refused_plans"
    __table_args__ = (UniqueConstraint("federation", "session_id"),)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    federation: Mapped[str] = mapped_column(String(255))
    job: Mapped[str] = mapped_column(String(255))
    round_number: Mapped[int]
    attempt: Mapped[int]
    session_id: Mapped[bytes]
    plan_bytes: Mapped[bytes]
    plan_signature: Mapped[bytes]
    why: Mapped[str]
    at: Mapped[float]


class Release(Base):
    """A survivor set that this site helped to unmask, or was about to."""

    __tablename__ = "releases"
    __table_args__ = (
        UniqueConstraint("federation", "session_id"),
        Index("ix_releases_model", "federation", "model_digest"),
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    federation: Mapped[str] = mapped_column(String(255))
    job: Mapped[str] = mapped_column(String(255))
    model_digest: Mapped[bytes]
    session_id: Mapped[bytes]
    survivors_json: Mapped[str]
    at: Mapped[float]


class Mark(Base):
    """The highest revocation list seen from a federation, and the last head of its audit chain."""

    __tablename__ = "marks"
    federation: Mapped[str] = mapped_column(String(255), primary_key=True)
    revocation_number: Mapped[int | None]
    audit_head: Mapped[bytes | None]
