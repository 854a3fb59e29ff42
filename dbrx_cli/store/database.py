"""The file: opened for the user alone, brought to the newest schema, set aside if it is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from dbrx_cli.private import FULL, open_private, private_folder, refuse_link
from model.errors import DbrxError, ResourceError

Notify = Callable[[str], None]

FILE = "sessions.db"
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside it
APPLICATION = 0x64627278  # "dbrx": tells our file from another program's
BUSY_S = 10.0  # how long a writer waits for another

# Step i leads from schema i to schema i + 1. A step that was released is never changed: a new one is added.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE sessions (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT UNIQUE,
            kind TEXT NOT NULL CHECK (kind IN ('chat', 'generate')),
            model TEXT NOT NULL,
            revision TEXT,
            settings TEXT NOT NULL,             -- JSON
            system TEXT,                        -- NULL: the checkpoint's default
            created TEXT NOT NULL,              -- ISO 8601, UTC
            updated TEXT NOT NULL,
            version INTEGER NOT NULL DEFAULT 0  -- counts saves, so that one writer notices another
        )""",
        # An id is never used again, so that the search index knows which messages it has seen.
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            session INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            role TEXT NOT NULL,
            content TEXT NOT NULL,
            timings TEXT,                       -- JSON, of a reply
            UNIQUE (session, position)
        )""",
        "CREATE INDEX sessions_by_time ON sessions (updated)",
    ),
    (
        # Of replies that can go on. Their text does not tell them: it may end inside a character, or be cut otherwise.
        """CREATE TABLE reply_ids (
            message INTEGER PRIMARY KEY REFERENCES messages (id) ON DELETE CASCADE,
            ids TEXT NOT NULL                   -- JSON
        )""",
    ),
    (
        # The other ways in which a conversation went on; `messages` holds the one that is talked in.
        """CREATE TABLE branches (
            session INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
            number INTEGER NOT NULL,
            turns TEXT NOT NULL,                -- JSON: [role, content, ids]
            PRIMARY KEY (session, number)
        )""",
    ),
)


class StoreError(DbrxError):
    """Sessions cannot be read or written."""


class _Damaged(Exception):
    """The file is no database of ours any more."""


def open_database(path: Path, notify: Notify) -> sqlite3.Connection:
    """A connection to the newest schema; a damaged file is set aside first, and `notify` is told.

    Raises `StoreError`, `ResourceError` (a full disk) or `DbrxError` (a planted link) if that cannot be done.
    """
    with faults_of(path):
        private_folder(path.parent)
        # One at a time: two processes that make a new file, or set the same one aside, would be in each other's way.
        with _locked(path.with_name(f"{path.name}.lock")):
            try:
                return _open(path)
            except _Damaged as damage:
                aside = _set_aside(path)
                notify(f"{path} is damaged ({damage}); it is now {aside.name}, and a new one takes its place")
            return _open(path)


@contextmanager
def faults_of(path: str | Path) -> Iterator[None]:
    """Tell faults of SQLite and of the system in one line."""
    try:
        yield
    except sqlite3.Error as error:
        # A full disk is an I/O error to SQLite where it makes files of its own, even to read.
        if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise ResourceError(f"no room for sessions: {path}: {error}", "make room on the disk") from None
        raise StoreError(f"sessions cannot be used: {path}: {error}") from None
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(f"no room for sessions: {path}: {error.strerror}", "make room on the disk") from None
        raise StoreError(f"sessions cannot be used: {path}: {error.strerror or error}") from None


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, whatever interrupts it; other writers wait."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk has rolled it back already; nothing may hide the fault.
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _open(path: Path) -> sqlite3.Connection:
    for suffix in BESIDE:
        refuse_link(path.with_name(path.name + suffix))
    os.close(open_private(path))  # SQLite gives the files beside it the same mode
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        _check(connection)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # what is removed is gone from the file, too
        connection.execute("PRAGMA journal_mode = WAL")
        _migrate(connection)
        return connection
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError) and _says_damaged(error):
            raise _Damaged(str(error)) from None
        raise


def _says_damaged(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) or 0
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _check(connection: sqlite3.Connection) -> None:
    """Whether the file is ours and whole: about a millisecond a megabyte."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables and not version:
        return
    if application != APPLICATION:
        raise _Damaged("it is not a file of dbrx")
    if version > len(MIGRATIONS):
        raise StoreError("the sessions were written by a newer dbrx", "update dbrx, or set DBRX_DATA to another folder")
    # Table by table: the check of a whole file also compares the search index, which may lag behind by design.
    for table in ("sessions", "messages"):
        if table not in tables:
            raise _Damaged(f"the table {table} is missing")
        (verdict,) = connection.execute(f"PRAGMA quick_check({table})").fetchone()
        if verdict != "ok":
            raise _Damaged(verdict.replace("\n", " "))


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring an older schema, or an empty file, to the newest in one transaction."""
    if _version(connection) == len(MIGRATIONS):
        return
    with transaction(connection):
        for step in MIGRATIONS[_version(connection) :]:  # read again: another process may have been quicker
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = open_private(path)
    try:
        give_up = time.monotonic() + BUSY_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise StoreError(f"another dbrx holds {path}", "end it, and try again") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> Path:
    """Rename a damaged file, and what belongs to it, to a name that is free."""
    stem = f"{path.stem}-damaged-{datetime.now():%Y%m%d-%H%M%S}"
    names = (f"{stem}{number}{path.suffix}" for number in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(candidate for name in names if not (candidate := path.with_name(name)).exists())
    for suffix in (*BESIDE, ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
