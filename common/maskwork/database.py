"""Opening a program's database, whatever version of that program wrote it last. Both sides keep theirs this way.

The rest of a program sees an engine whose database is at the schema of its `tables.py`, or a `StoreError` that names
the file and the remedy. NOT here: whose tables they are and what the rows mean.

Rules
1. A database is brought to its head in one transaction when it is opened: killed half-way, it is as it was before.
2. SQLite runs in WAL mode with `synchronous=FULL`: a transaction that has returned survives a power cut.
3. A database written by a newer program, or by another one, is refused untouched.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from maskwork.errors import StoreError

_MIGRATING = threading.Lock()  # alembic's `op` and `context` are proxies, one per process


@dataclass(frozen=True, slots=True)
class Migrations:
    """The migrations of one program's database.

    Attributes:
        folder: where alembic finds ``env.py`` and ``versions``.
        head: the newest revision.
        owner: whose database it is, for people: "coordinator".
    """

    folder: Path
    head: str
    owner: str


def open_engine(migrations: Migrations, database: str, *, busy_timeout_s: float) -> Engine:
    """Open a database and bring its schema up to date; a SQLite file is created if it is missing.

    Args:
        migrations: Whose database it has to be.
        database: SQLAlchemy URL; a SQLite one must name a file.
        busy_timeout_s: How long a transaction waits for another connection's, in seconds.

    Raises:
        StoreError: If it cannot be opened or written, or is of another program or a newer version.
    """
    url = _checked_url(migrations, database)
    name = url.database or database
    try:
        engine = create_engine(url)
    except (NoSuchModuleError, ImportError) as cause:
        raise StoreError(f"no driver for it ({cause})", file=name, remedy="Install the database's driver.") from cause
    if url.get_backend_name() == "sqlite":
        _set_up_sqlite(engine, busy_timeout_s)
    try:
        with world_failures(name):
            _upgrade(migrations, engine, name)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def world_failures(file: str) -> Iterator[None]:
    """Turn what the database driver reports into a `StoreError` that names `file`.

    Raises:
        StoreError: The world failed.
        RuntimeError: A key was violated: the caller's fault, and rolled back.
    """
    try:
        yield
    except IntegrityError as caught:
        raise RuntimeError(f"{file}: a record that contradicts those already kept ({caught.orig})") from caught
    except DBAPIError as caught:
        raise StoreError.from_cause(caught.orig or caught, file=file) from caught
    except OSError as caught:
        raise StoreError.from_cause(caught, file=file) from caught


def _checked_url(migrations: Migrations, database: str) -> URL:
    try:
        url = make_url(database)
    except ArgumentError as cause:
        remedy = f"Write it as sqlite:////absolute/path/to/{migrations.owner}.sqlite."
        raise StoreError("is not a database URL", file=database, remedy=remedy) from cause
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        remedy = "Name a file: what is kept in memory does not survive a restart."
        raise StoreError("names no file", file=database, remedy=remedy)
    return url


def _set_up_sqlite(engine: Engine, busy_timeout_s: float) -> None:
    def connected(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {round(busy_timeout_s * 1000)}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begun(connection: Connection) -> None:
        # sqlite3 by itself would begin after the first reads. A write takes the lock before them, so that what it
        # checked is still so when it writes.
        reading = connection.get_execution_options().get("maskwork_reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)


def _upgrade(migrations: Migrations, engine: Engine, name: str) -> None:
    with engine.execution_options(maskwork_reading=True).connect() as connection:
        if _revision(migrations, connection, name) == migrations.head:
            return  # without importing alembic, which takes longer than everything else here
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(migrations.folder).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with _MIGRATING, engine.begin() as connection:
        found = _revision(migrations, connection, name)
        if found is not None and found not in known:
            raise StoreError(
                f"has schema {found!r}, which this program (schema {migrations.head!r}) does not know",
                file=name,
                remedy=f"Install the newer version that wrote it, or name a file that is the {migrations.owner}'s.",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(migrations: Migrations, connection: Connection, name: str) -> str | None:
    tables = inspect(connection).get_table_names()
    if "alembic_version" in tables:
        found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return found
    if tables:
        remedy = f"Name another file for the {migrations.owner}."
        raise StoreError("holds another program's tables", file=name, remedy=remedy)
    return None
