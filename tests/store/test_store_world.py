"""When the world fails, the operator is told which file and what to do; and what migrations promise.

Both databases are put through the same: the coordinator's `Store` and the participant's `Ledger`.
"""

import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, create_engine, event

from maskwork.coordinator import migrations as coordinator_migrations
from maskwork.coordinator.migrations import tables as coordinator_tables
from maskwork.coordinator.records import JobRecord, JobState
from maskwork.coordinator.store import Store
from maskwork.errors import StoreError, UserError
from maskwork.participant import migrations as participant_migrations
from maskwork.participant.ledger import DATABASE_NAME, Ledger
from maskwork.participant.migrations import tables as participant_tables

SHORT_S = 0.02
JOB = JobRecord("j", "n", "t", JobState.QUEUED, 1, 1, 1, "{}", "spiffe://f/researcher/r", 0.0, b"m" * 32, b"m" * 32)


def open_store(directory: Path) -> Store:
    return Store.open(f"sqlite:///{directory}/{DATABASE_NAME}", busy_timeout_s=SHORT_S)


def open_ledger(directory: Path) -> Ledger:
    return Ledger.open(directory, busy_timeout_s=SHORT_S)


def write(opened: Store | Ledger) -> None:
    if isinstance(opened, Store):
        opened.add_job(JOB)
    else:
        opened.record_revocation_number("f", 1)


def write_much(opened: Store | Ledger) -> None:
    much = "x" * 9999
    if isinstance(opened, Store):
        opened.add_job(dataclasses.replace(JOB, job_id="k", spec_json=much))
    else:
        opened.record_release("f", "j", b"m" * 32, session_id=b"s" * 32, survivors=[much], at=0.0)


def read(opened: Store | Ledger) -> object:
    return opened.jobs() if isinstance(opened, Store) else opened.highest_revocation_number("f")


Opener = Callable[[Path], Store | Ledger]
both = pytest.mark.parametrize("opener", [open_store, open_ledger])
MIGRATIONS = [
    pytest.param(coordinator_migrations, coordinator_tables.Base.metadata, open_store, id="coordinator"),
    pytest.param(participant_migrations, participant_tables.Base.metadata, open_ledger, id="participant"),
]


def is_open(path: Path) -> bool:
    descriptors = Path("/proc/self/fd")  # elsewhere than on Linux there is nothing to see
    return descriptors.exists() and any(os.path.realpath(entry) == str(path) for entry in descriptors.iterdir())


def fails(opener: Opener, directory: Path, what: str, remedy: str) -> None:
    """Opening says what and what to do, names the file, and holds no lock afterwards."""
    for _ in range(2):
        with pytest.raises(StoreError, match=what) as caught:
            opener(directory)
        assert caught.value.file == str(directory / DATABASE_NAME)
        assert remedy in caught.value.remedy
        assert str(caught.value).startswith(caught.value.file)


@both
def test_what_is_acknowledged_is_on_disk(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as opened, opened._engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 1000 * SHORT_S}


@both
def test_a_garbage_file(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database, but long enough to be looked at " * 100)
    fails(opener, tmp_path, "damaged or not a database", "restore the last backup")
    assert (tmp_path / DATABASE_NAME).read_bytes().startswith(b"not a database"), "it is left as it was"


@both
def test_pages_that_are_damaged_later(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as opened:
        write(opened)
    path = tmp_path / DATABASE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    with pytest.raises(StoreError, match="damaged") as caught, opener(tmp_path) as opened:
        read(opened)
    assert caught.value.file == str(path)


@both
def test_a_database_that_is_refused_is_not_kept_open(opener: Opener, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as other, other:
        other.execute("CREATE TABLE moz_places (id INTEGER)")
    with pytest.raises(StoreError) as caught:
        opener(tmp_path)
    # The traceback still holds every frame here, so that it is closed is not the garbage collector's work.
    assert caught.tb is not None
    assert not is_open(tmp_path / DATABASE_NAME)


@both
def test_a_newer_schema_is_left_alone(opener: Opener, tmp_path: Path) -> None:
    opener(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    fails(opener, tmp_path, "schema 'from_the_future', which this program", "Install the newer version that wrote it")


def test_one_sides_database_is_not_taken_for_the_others(tmp_path: Path) -> None:
    for first, second in ((open_store, open_ledger), (open_ledger, open_store)):
        directory = tmp_path / first.__name__
        first(directory).close()
        fails(second, directory, "does not know", "name a file that is the")


@both
def test_another_programs_database(opener: Opener, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as other, other:
        other.execute("CREATE TABLE moz_places (id INTEGER)")
    fails(opener, tmp_path, "another program's tables", "Name another file")


@both
def test_a_locked_database(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as opened:
        write(opened)
        before = read(opened)
        with closing(sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked by another process") as caught:
                write(opened)
            assert caught.value.file == str(tmp_path / DATABASE_NAME)
            assert "Stop the other process" in caught.value.remedy
            assert read(opened) == before, "reading goes on"


@both
def test_a_database_locked_while_it_is_created(opener: Opener, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        fails(opener, tmp_path, "locked by another process", "Stop the other process")


def test_a_read_only_database(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with Store.open(f"sqlite:///file:{tmp_path}/{DATABASE_NAME}?mode=ro&uri=true") as store:
        with pytest.raises(StoreError, match="is read-only") as caught:
            store.add_job(JOB)
        assert caught.value.file.endswith(DATABASE_NAME)
        assert "mount its file system writable" in caught.value.remedy
        assert store.jobs() == ()


NOBODY = 65534


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Root may write everything, so it steps down to a user that owns `folder` and nothing else."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@both
def test_a_file_without_the_right_to_write_it(opener: Opener) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        opener(folder).close()
        (folder / DATABASE_NAME).chmod(0o400)
        refused = pytest.raises(StoreError, match=r"read-only|cannot be opened")
        with as_nobody(folder), refused, opener(folder) as opened:
            write(opened)


@both
def test_a_directory_where_the_file_should_be(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).mkdir()
    fails(opener, tmp_path, "cannot be opened", "Check that its directory exists")


@both
def test_a_file_where_the_directory_should_be(opener: Opener, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(StoreError, match=r"state/.*cannot be opened"):
        opener(tmp_path / "state")


@both
def test_a_full_disk_loses_nothing(opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as opened:
        write(opened)
        before = read(opened)
        with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as other:
            (pages,) = other.execute("PRAGMA page_count").fetchone()
        opened._engine.dispose()
        event.listen(
            opened._engine, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}")
        )
        with pytest.raises(StoreError, match="the disk is full") as caught:
            write_much(opened)
        assert "Free some space" in caught.value.remedy
        assert read(opened) == before


def test_two_coordinators_cannot_share_a_database(tmp_path: Path) -> None:
    with open_store(tmp_path):
        fails(open_store, tmp_path, "in use by another coordinator", "Stop the other coordinator")
    open_store(tmp_path).close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("not a url", "is not a database URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("nosuchdatabase://host/name", "no driver"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, what: str) -> None:
    with pytest.raises(StoreError, match=what):
        Store.open(url)


def test_a_store_error_is_for_the_person_at_the_terminal() -> None:
    assert issubclass(StoreError, UserError)
    unknown = StoreError.from_cause(ValueError("odd"), file="f.sqlite")
    assert str(unknown) == "f.sqlite: could not be used (odd). Check the disk and the system's log."


@pytest.mark.parametrize(("package", "metadata", "opener"), MIGRATIONS)
def test_the_scripts_lead_to_the_tables(package: object, metadata: MetaData, opener: Opener, tmp_path: Path) -> None:
    with opener(tmp_path) as opened, opened._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize(("package", "metadata", "opener"), MIGRATIONS)
def test_head_is_the_last_script(package: ModuleType, metadata: MetaData, opener: Opener, tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(str(package.__file__)).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [package.MIGRATIONS.head]


def test_a_database_of_the_first_schema_keeps_its_jobs_and_rounds(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_NAME
    config = Config()
    config.set_main_option("script_location", str(Path(str(coordinator_migrations.__file__)).parent))
    with create_engine(f"sqlite:///{path}").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "coordinator_0001")
    with closing(sqlite3.connect(path)) as older, older:
        values = "'j', 'n', 't', 'running', 2, 2, 1, '{}', 's', 0.0, x'6d', x'6d', ''"
        older.execute(f"INSERT INTO jobs VALUES (1, {values})")
        older.execute("INSERT INTO attempts VALUES ('j', 1, 1, x'01', x'02', x'03', 0.0, 1.0, 'committed', '')")
        older.execute("INSERT INTO rounds VALUES ('j', 1, 1, x'01', x'6d', '[\"a\"]', '[]', '{}', '{}', 0, 1.0)")
    with open_store(tmp_path) as store:
        (job,), (committed,) = store.jobs(), store.rounds("j")
        assert (job.rolled_back, job.rounds_committed, committed.survivors) == (0, 1, ("a",))
        assert store.rolled_back_rounds("j") == ()


@both
def test_a_migration_that_fails_half_way_leaves_nothing(opener: Opener, tmp_path: Path) -> None:
    path = tmp_path / DATABASE_NAME
    opener(tmp_path).close()
    with closing(sqlite3.connect(path)) as other, other:
        (last,) = other.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rootpage DESC").fetchone()
        other.execute("DROP TABLE alembic_version")
        for (name,) in other.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name != last:
                other.execute(f"DROP TABLE {name}")
        other.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    with pytest.raises(StoreError, match="already exists"):
        opener(tmp_path)
    with closing(sqlite3.connect(path)) as other:
        names = {name for (name,) in other.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {last, "alembic_version"}


@pytest.mark.parametrize(
    ("module", "opening"),
    [
        ("maskwork.coordinator.store", f"Store.open('sqlite:///{{}}/{DATABASE_NAME}')"),
        ("maskwork.participant.ledger", "Ledger.open('{}')"),
    ],
)
def test_an_up_to_date_database_opens_without_alembic_and_torch(module: str, opening: str, tmp_path: Path) -> None:
    (open_store if "store" in module else open_ledger)(tmp_path).close()
    code = (
        f"import sys; from {module} import {opening.split('.')[0]}; {opening.format(tmp_path)}.close(); "
        "print([name for name in ('alembic', 'torch', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


WITHOUT_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from {module} import {opener}
from maskwork.errors import StorageUnavailable
opened = {opening}
opened._engine.dispose()  # the next statement opens the file anew
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    {reading}
except StorageUnavailable as error:
    for descriptor in taken:
        os.close(descriptor)
    {reading}  # there again, by itself
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "opener", "opening", "reading"),
    [
        ("maskwork.coordinator.store", "Store", f"Store.open('sqlite:///{{}}/{DATABASE_NAME}')", "opened.jobs()"),
        ("maskwork.participant.ledger", "Ledger", "Ledger.open('{}')", "opened.highest_revocation_number('f')"),
    ],
)
def test_a_process_without_descriptors_is_told_which_limit_to_raise(
    module: str, opener: str, opening: str, reading: str, tmp_path: Path
) -> None:
    code = WITHOUT_DESCRIPTORS.format(module=module, opener=opener, opening=opening.format(tmp_path), reading=reading)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"{tmp_path / DATABASE_NAME}: cannot be opened: this process has as many files open")
    assert "LimitNOFILE" in done.stdout
