"""Sessions: begun, saved after every turn, found again by name, number or what was said."""

from __future__ import annotations

import builtins
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, cast

from dbrx_cli.files import apart
from dbrx_cli.private import data_folder
from model.errors import InputError
from model.messages import Message, Role

from .database import FILE, Notify, StoreError, faults_of, open_database, transaction

Kind = Literal["chat", "generate"]
TITLE = 60  # characters of the first question that stand for a session without a name
NAME = 100

# A session, how many messages it has, and its first question.
ENTRIES = """
    SELECT s.id, s.name, s.kind, s.model, s.revision, s.created, s.updated,
        (SELECT count(*) FROM messages WHERE session = s.id) AS turns,
        (SELECT substr(content, 1, 400) FROM messages
            WHERE session = s.id AND role = 'user' ORDER BY position LIMIT 1) AS question
    FROM sessions AS s
"""
NEWEST_FIRST = " ORDER BY s.updated DESC, s.id DESC"


class Conflict(StoreError):
    """Another process has saved or removed the session since it was read here."""


@dataclass(frozen=True)
class Entry:
    """A session in a list."""

    id: int
    name: str | None
    kind: Kind
    model: str
    revision: str | None
    created: str  # ISO 8601, UTC
    updated: str
    turns: int  # messages, without the system message
    title: str  # the beginning of the first question


@dataclass(frozen=True)
class Session:
    """A session as it was saved last. `timings[i]` belongs to `turns[i]`; only replies have them."""

    id: int
    name: str | None
    kind: Kind
    model: str
    revision: str | None
    settings: dict[str, Any]
    system: str | None  # None: the checkpoint's default
    turns: list[Message]
    timings: list[dict[str, Any] | None]
    created: str
    updated: str


@dataclass
class _Known:
    """What is in the file of a session, as far as this process has seen."""

    version: int
    turns: list[Message]


class Store:
    """All sessions. Faults are `StoreError`, a full disk `ResourceError`; nothing is half written after one."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._known: dict[int, _Known] = {}

    @classmethod
    def open(cls, path: Path | None = None, notify: Notify = lambda text: None) -> Self:
        """The user's store, or the one in the file `path`. `notify` hears of a damaged file that was set aside."""
        path = path or data_folder() / FILE
        return cls(open_database(path, notify), path)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(
        self, kind: Kind, model: str, revision: str | None, settings: Mapping[str, Any], name: str | None = None
    ) -> int:
        """A new session; its number."""
        now = _now()
        with faults_of(self._path), transaction(self._connection):
            if name is not None:
                self._check_name(name)
            row = self._connection.execute(
                "INSERT INTO sessions (name, kind, model, revision, settings, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, kind, clean(model), revision, _json(settings), now, now),
            )
        assert row.lastrowid
        self._known[row.lastrowid] = _Known(0, [])
        return row.lastrowid

    def save(
        self,
        id: int,
        system: str | None,
        turns: Sequence[Message],
        timings: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> None:
        """Replace the turns of a session; those that have not changed are not written again.

        `timings` belong to the last turn. `model`: the one that it goes on with, if it is another one. Raises
        `Conflict` if another process has saved or removed the session.
        """
        known = self._known.get(id) or self._read(id)
        same = next((i for i, (a, b) in enumerate(zip(known.turns, turns, strict=False)) if a != b), None)
        same = min(len(known.turns), len(turns)) if same is None else same
        written = [
            (id, position, turns[position].role, clean(turns[position].content)) for position in range(same, len(turns))
        ]
        with faults_of(self._path), transaction(self._connection):
            execute = self._connection.execute
            done = execute(
                "UPDATE sessions SET system = ?, updated = ?, model = coalesce(?, model), version = version + 1 "
                "WHERE id = ? AND version = ?",
                (
                    None if system is None else clean(system),
                    _now(),
                    None if model is None else clean(model),
                    id,
                    known.version,
                ),
            )
            if done.rowcount != 1:
                raise changed_by_another(id)
            execute("DELETE FROM messages WHERE session = ? AND position >= ?", (id, same))
            self._connection.executemany(
                "INSERT INTO messages (session, position, role, content) VALUES (?, ?, ?, ?)", written
            )
            self._connection.executemany(
                "INSERT INTO reply_ids SELECT id, ? FROM messages WHERE session = ? AND position = ?",
                [
                    (json.dumps(turn.token_ids), id, position)
                    for position, turn in enumerate(turns[same:], same)
                    if turn.token_ids
                ],
            )
            if timings is not None:
                execute(
                    "UPDATE messages SET timings = ? WHERE session = ? AND position = ?",
                    (_json(timings), id, len(turns) - 1),
                )
        self._known[id] = _Known(known.version + 1, list(turns))

    def branches(self, id: int) -> dict[int, builtins.list[Message]]:
        """The other ways in which a session went on, by number."""
        with faults_of(self._path):
            rows = self._connection.execute("SELECT number, turns FROM branches WHERE session = ?", (id,)).fetchall()
        return {
            row["number"]: [Message(role, content, tuple(ids)) for role, content, ids in json.loads(row["turns"])]
            for row in rows
        }

    def save_branches(self, id: int, branches: Mapping[int, Sequence[Message]]) -> None:
        """Replace them. `Conflict` as `save`."""
        known = self._known.get(id) or self._read(id)
        rows = [
            (id, number, clean(json.dumps([(turn.role, turn.content, turn.token_ids) for turn in turns])))
            for number, turns in branches.items()
        ]
        with faults_of(self._path), transaction(self._connection):
            done = self._connection.execute(
                "UPDATE sessions SET version = version + 1 WHERE id = ? AND version = ?", (id, known.version)
            )
            if done.rowcount != 1:
                raise changed_by_another(id)
            self._connection.execute("DELETE FROM branches WHERE session = ?", (id,))
            self._connection.executemany("INSERT INTO branches (session, number, turns) VALUES (?, ?, ?)", rows)
        known.version += 1

    def latest(self, kind: Kind = "chat") -> Session | None:
        """The session that was saved last and holds something."""
        with faults_of(self._path):
            row = self._connection.execute(
                "SELECT id FROM sessions AS s WHERE kind = ? AND EXISTS (SELECT 1 FROM messages WHERE session = s.id)"
                + NEWEST_FIRST,
                (kind,),
            ).fetchone()
        return self._load(row["id"]) if row else None

    def find(self, name_or_id: str | int) -> Session:
        """A session by its name or number; `InputError` names the likeliest if there is none."""
        return self._load(self._id(name_or_id))

    def names(self) -> list[str]:
        """All names that were given."""
        with faults_of(self._path):
            rows = self._connection.execute("SELECT name FROM sessions WHERE name IS NOT NULL ORDER BY name")
            return [row["name"] for row in rows]

    def search(self, text: str) -> list[tuple[Entry, str]]:
        """Sessions where one message, the system message or the name holds every word, and where it does.

        Words are found inside words, without regard to case. Newest first.
        """
        from .search import find_messages

        words = clean(text).split()
        if not words:
            raise InputError("there is nothing to search for", "type a word")
        with faults_of(self._path):
            hits = find_messages(self._connection, words)
            rows = self._connection.execute(ENTRIES + NEWEST_FIRST).fetchall()
        return [(_entry(row), hits[row["id"]]) for row in rows if row["id"] in hits]

    def list(self, kind: Kind | None = None, limit: int | None = None) -> list[Entry]:
        """Sessions, the one that was saved last first."""
        with faults_of(self._path):
            rows = self._connection.execute(
                f"{ENTRIES} WHERE ?1 IS NULL OR kind = ?1 {NEWEST_FIRST} LIMIT ?2",
                (kind, -1 if limit is None else limit),
            ).fetchall()
        return [_entry(row) for row in rows]

    def rename(self, name_or_id: str | int, name: str) -> None:
        """Give a session a name; `InputError` if another has it."""
        id = self._id(name_or_id)
        with faults_of(self._path), transaction(self._connection):
            self._check_name(name, but=id)
            self._connection.execute("UPDATE sessions SET name = ? WHERE id = ?", (name, id))

    def remove(self, name_or_id: str | int) -> None:
        """Remove a session, and its words from the file."""
        from .search import forget

        id = self._id(name_or_id)
        with faults_of(self._path):
            with transaction(self._connection):
                self._connection.execute("DELETE FROM sessions WHERE id = ?", (id,))
                forget(self._connection)
            # The old pages are in the write-ahead log until it is folded in; a reader may delay that.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._known.pop(id, None)

    def _id(self, name_or_id: str | int) -> int:
        wanted = clean(str(name_or_id))
        with faults_of(self._path):
            row = self._connection.execute("SELECT id FROM sessions WHERE name = ?", (wanted,)).fetchone()
            if row is None and wanted.isascii() and wanted.isdigit():
                row = self._connection.execute("SELECT id FROM sessions WHERE id = ?", (wanted,)).fetchone()
        if row is None:
            near = get_close_matches(wanted, self.names(), 1)
            hint = f"did you mean {near[0]}?" if near else "see dbrx sessions list"
            raise InputError(f"there is no session {wanted!r}", hint)
        return int(row["id"])

    def _read(self, id: int) -> _Known:
        self._load(id)
        return self._known[id]

    def _load(self, id: int) -> Session:
        with faults_of(self._path), transaction(self._connection):  # both tables as of one moment
            row = self._connection.execute("SELECT * FROM sessions WHERE id = ?", (id,)).fetchone()
            if row is None:
                raise Conflict(f"session {id} was removed by another dbrx")
            messages = self._connection.execute(
                "SELECT role, content, timings, ids FROM messages LEFT JOIN reply_ids ON message = messages.id "
                "WHERE session = ? ORDER BY position",
                (id,),
            ).fetchall()
        turns = [
            Message(cast(Role, message["role"]), message["content"], tuple(json.loads(message["ids"] or "[]")))
            for message in messages
        ]
        self._known[id] = _Known(row["version"], list(turns))
        return Session(
            id=id,
            name=row["name"],
            kind=row["kind"],
            model=row["model"],
            revision=row["revision"],
            settings=json.loads(row["settings"]),
            system=row["system"],
            turns=turns,
            timings=[message["timings"] and json.loads(message["timings"]) for message in messages],
            created=row["created"],
            updated=row["updated"],
        )

    def _check_name(self, name: str, but: int | None = None) -> None:
        if not name or len(name) > NAME or not name.isprintable() or name.isdigit() or name != name.strip():
            raise InputError(
                f"{name!r} cannot be the name of a session", f"take up to {NAME} characters, and not a number alone"
            )
        taken = self._connection.execute(
            "SELECT 1 FROM sessions WHERE name = ? AND id IS NOT ?", (name, but)
        ).fetchone()
        if taken:
            raise InputError(f"there is a session {name!r} already", "take another name, or remove that one")


def changed_by_another(id: int) -> Conflict:
    """What is told where another process has saved or removed a session."""
    return Conflict(f"session {id} was changed by another dbrx", "go on in a new session")


def _entry(row: sqlite3.Row) -> Entry:
    values = dict(row)
    question = " ".join(apart(values.pop("question") or "")[1].split())
    return Entry(**values, title=question if len(question) <= TITLE else question[: TITLE - 1] + "…")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _json(values: Mapping[str, Any]) -> str:
    return clean(json.dumps(dict(values), ensure_ascii=False, default=str))


def clean(text: str) -> str:
    """Text that SQLite takes: a lone surrogate becomes U+FFFD, a pair the character that it stands for."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
