"""Full-text search. The index is FTS5's, brought up to date when somebody searches, so that saving stays cheap.

It knows trigrams, not words: it finds parts of words, in any script. Without FTS5, and for words of one or two
characters, the messages themselves are read; the answer is the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from .database import transaction

TRIGRAM = 3
AROUND = 40  # characters that an excerpt shows on either side

# The text itself stays in `messages` only. A message that was taken back stays in the index until the next removal of
# a session; the join below leaves it out.
INDEX = """
    CREATE VIRTUAL TABLE IF NOT EXISTS messages_index
    USING fts5 (content, content = 'messages', content_rowid = 'id', tokenize = 'trigram')
"""
CATCH_UP = """
    INSERT INTO messages_index (rowid, content)
    SELECT id, content FROM messages WHERE id > coalesce((SELECT max(id) FROM messages_index_docsize), 0)
"""
MESSAGES = "SELECT * FROM messages WHERE has_words(content)"
IN_ORDER = "ORDER BY session, position"


def find_messages(connection: sqlite3.Connection, words: Sequence[str]) -> dict[int, str]:
    """Sessions that hold every word in one place -> the text around the first word there."""
    connection.create_function("has_words", 1, lambda text: _has(text, words), deterministic=True)
    found: dict[int, str] = {}
    texts = """
        SELECT id AS session, coalesce(name, '') AS content FROM sessions UNION ALL
        SELECT id, coalesce(system, '') FROM sessions
    """
    rows = connection.execute(f"SELECT * FROM ({texts}) WHERE has_words(content)").fetchall()
    for row in [*_candidates(connection, words), *rows]:
        found.setdefault(row["session"], excerpt(row["content"], words))
    return found


def forget(connection: sqlite3.Connection) -> None:
    """Drop the index, which holds pieces of what was removed; the next search makes it again."""
    try:
        connection.execute("DROP TABLE IF EXISTS messages_index")
    except sqlite3.OperationalError:  # this SQLite has no FTS5, and so cannot even drop it
        pass


def _candidates(connection: sqlite3.Connection, words: Sequence[str]) -> list[sqlite3.Row]:
    """Messages with every word: those that the index names, or else all, looked at one by one."""
    try:
        return _indexed(connection, [word for word in words if len(word) >= TRIGRAM and "\0" not in word])
    except sqlite3.OperationalError:  # no FTS5, or the file cannot be written now
        pass
    except sqlite3.DatabaseError:  # the index is damaged; it is only a copy
        forget(connection)
    return connection.execute(f"{MESSAGES} {IN_ORDER}").fetchall()


def _indexed(connection: sqlite3.Connection, words: Sequence[str]) -> list[sqlite3.Row]:
    if not words:
        return connection.execute(f"{MESSAGES} {IN_ORDER}").fetchall()
    with transaction(connection):
        connection.execute(INDEX)
        connection.execute(CATCH_UP)
    pattern = " ".join('"' + word.replace('"', '""') + '"' for word in words)
    named = "AND id IN (SELECT rowid FROM messages_index WHERE messages_index MATCH ?)"
    return connection.execute(f"{MESSAGES} {named} {IN_ORDER}", (pattern,)).fetchall()


def _has(text: str, words: Sequence[str]) -> bool:
    folded = text.lower()
    return all(word.lower() in folded for word in words)


def excerpt(text: str, words: Sequence[str]) -> str:
    """One line around the first of the words."""
    at = max(0, text.lower().find(words[0].lower()))
    start, end = max(0, at - AROUND), at + len(words[0]) + AROUND
    line = " ".join(text[start:end].split())
    return ("…" if start else "") + line + ("…" if end < len(text) else "")
