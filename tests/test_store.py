"""The store of sessions, held to what plain SQL reads from its file."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbrx_cli.engine import Done, Timings, Usage
from dbrx_cli.store import (
    Conflict,
    Recorder,
    Store,
    StoreError,
    database,
    export_json,
    export_markdown,
    log_generate,
    search,
)
from model.errors import DbrxError, InputError, ResourceError
from model.messages import Message

TALK = [
    Message("user", "What is a Mixture of Experts?\nBriefly."),
    Message("assistant", "A network that uses a part of itself."),
    Message("user", "وما هي الشبكة؟"),
    Message("assistant", "شبكة عصبية 🙂"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        yield store


def rows(path: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(path)
    found = connection.execute(sql).fetchall()
    connection.close()
    return found


def begin(store: Store, turns: list[Message] = TALK, name: str | None = None) -> int:
    id = store.begin("chat", "demo", "abc", {"temperature": 0.5, "stop": ("x",)}, name)
    store.save(id, "Be brief.", turns)
    return id


def test_what_is_saved_is_in_the_file(store: Store, path: Path) -> None:
    id = begin(store, TALK[:2], "moe")
    store.save(id, "Be brief.", TALK, {"decode_s": 0.25})
    assert rows(path, "SELECT name, kind, model, revision, settings, system FROM sessions") == [
        ("moe", "chat", "demo", "abc", '{"temperature": 0.5, "stop": ["x"]}', "Be brief.")
    ]
    messages = rows(path, "SELECT position, role, content, timings FROM messages WHERE session = 1 ORDER BY position")
    assert [message[:3] for message in messages] == [(i, turn.role, turn.content) for i, turn in enumerate(TALK)]
    assert [message[3] for message in messages] == [None, None, None, '{"decode_s": 0.25}']


def test_a_session_comes_back_as_it_was(store: Store, path: Path) -> None:
    id = begin(store, name="moe")
    with Store.open(path) as other:
        for session in (other.find("moe"), other.find(id), other.find(str(id)), other.latest()):
            assert session
            assert (session.id, session.name, session.kind, session.model, session.revision) == (
                id, "moe", "chat", "demo", "abc",
            )  # fmt: skip
            assert session.settings == {"temperature": 0.5, "stop": ["x"]}
            assert (session.system, session.turns, session.timings) == ("Be brief.", TALK, [None] * 4)
    assert store.latest("generate") is None


def test_the_latest_is_the_one_saved_last_and_not_empty(store: Store) -> None:
    first, second = begin(store), begin(store)
    store.begin("chat", "demo", None, {})
    assert (latest := store.latest()) and latest.id == second
    store.save(first, None, TALK[:2])
    assert (latest := store.latest()) and latest.id == first
    assert store.list()[0].id == first
    assert store.list(limit=1)[0].title == "What is a Mixture of Experts? Briefly."
    assert store.list(kind="generate") == []


def test_a_turn_more_writes_one_row(store: Store, path: Path) -> None:
    id = begin(store, TALK[:2])
    before = rows(path, "SELECT id FROM messages ORDER BY position")
    store.save(id, None, TALK[:3])
    after = rows(path, "SELECT id FROM messages ORDER BY position")
    assert after[:2] == before and len(after) == 3


TEXT = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C", "Cs")), max_size=8)
TURNS = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), TEXT), max_size=4)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saves=st.lists(TURNS, min_size=1, max_size=4), reopen=st.booleans())
def test_any_change_of_any_text(store: Store, path: Path, saves: list[list[Message]], reopen: bool) -> None:
    """Lone surrogates become U+FFFD, pairs one character; all else is kept, NUL as well."""
    id = store.begin("chat", "m", None, {})
    for turns in saves:
        with Store.open(path) as other:
            (other if reopen else store).save(id, turns[0].content if turns else None, turns)
        if reopen:
            store.find(id)
    stored = rows(path, f"SELECT role, content FROM messages WHERE session = {id} ORDER BY position")
    expected = [turn.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for turn in saves[-1]]
    assert stored == [(turn.role, text) for turn, text in zip(saves[-1], expected, strict=True)]


def test_a_save_over_anothers_is_refused(store: Store, path: Path) -> None:
    id = begin(store)
    with Store.open(path) as other:
        other.find(id)
        other.save(id, None, [*TALK, Message("user", "mine")])
        with pytest.raises(Conflict):
            store.save(id, None, [*TALK, Message("user", "yours")])
        assert other.find(id).turns[-1].content == "mine"
        other.remove(id)
    with pytest.raises(Conflict):
        store.save(id, None, TALK)


def test_names(store: Store) -> None:
    id = begin(store, name="experts of mine")
    other = begin(store)
    with pytest.raises(InputError, match="already"):
        store.rename(other, "experts of mine")
    with pytest.raises(InputError, match="already"):
        store.begin("chat", "m", None, {}, "experts of mine")
    for name in ("", " ", "12", "two\nlines", "\x1b[31m", "x" * 101, "tail "):
        with pytest.raises(InputError, match="cannot be the name"):
            store.rename(other, name)
    store.rename(id, "experts of mine")  # its own name is not taken
    store.rename(id, "خبراء")
    assert store.find("خبراء").id == id and store.names() == ["خبراء"]
    with pytest.raises(InputError, match="no session 'expert'"):
        store.find("expert")
    store.rename(id, "experts")
    with pytest.raises(InputError) as fault:
        store.find("expert")
    assert fault.value.hint == "did you mean experts?"


def test_branches_of_two_processes(path: Path) -> None:
    """Whoever comes second goes on in a new session, with the branches that it knows; the first loses none."""
    notices: list[str] = []
    one, two = (Recorder("chat", "m", None, {}, notices.append, path=path) for _ in range(2))
    assert one.save(None, TALK)
    kept = {1: [Message("user", "first way")]}
    one.save_branches(kept)
    assert two.resume(two.store().find(1)) == kept
    mine, yours = ({**kept, 2: [Message("user", text)]} for text in ("mine", "yours"))
    one.save_branches(mine)
    two.save_branches(yours)
    assert one.save(None, [*TALK, Message("user", "more of mine")])
    assert not notices and two.save(None, [*TALK, Message("user", "more of yours")]) and two.id == 2
    assert notices == ["session 1 was changed by another dbrx; this conversation goes on as session 2"]
    with Store.open(path) as store:
        assert store.branches(1) == mine and store.branches(2) == yours
    two.renew()
    assert two.save(None, TALK) and two.store().branches(3) == {}
    one.close()
    two.close()


def test_what_is_removed_is_gone_from_the_file(store: Store, path: Path) -> None:
    id = begin(store, [Message("user", "a canary in a mine")])
    kept = begin(store)
    assert [entry.id for entry, _ in store.search("canary")] == [id]
    store.remove(id)
    assert [entry.id for entry in store.list()] == [kept]
    assert store.search("canary") == []
    store.close()
    assert all(b"canary" not in file.read_bytes() for file in path.parent.iterdir())


def test_search(store: Store) -> None:
    a, b = begin(store, TALK, "one"), begin(store, [Message("user", "Äpfel und BIRNEN, 10 % billiger")])
    found = {word: [entry.id for entry, _ in store.search(word)] for word in ("experts", "birnen äpfel", "10 %", "%")}
    assert found == {"experts": [a], "birnen äpfel": [b], "10 %": [b], "%": [b]}
    assert [entry.id for entry, _ in store.search("brief")] == [b, a]  # in the system message
    assert store.search("one") and store.search("عصبية 🙂")[0][1] == "شبكة عصبية 🙂"
    assert store.search("experts network") == []  # not in the same message
    store.save(a, "Be brief.", TALK[2:])
    assert store.search("experts") == []  # taken back
    with pytest.raises(InputError, match="nothing to search"):
        store.search(" ")


WORDS = st.text(st.sampled_from('abAB"*%_ -äÄßعب🙂\0'), min_size=1, max_size=6)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.sampled_from('abAB"*%_ -äÄßعب🙂'), max_size=12), max_size=4), words=WORDS)
def test_search_without_an_index_finds_the_same(path: Path, texts: list[str], words: str) -> None:
    path.unlink(missing_ok=True)
    if not words.strip():
        return
    with Store.open(path) as store, pytest.MonkeyPatch.context() as patch:
        for text in texts:
            store.save(store.begin("chat", "m", None, {}), None, [Message("user", text)])
        indexed = store.search(words)
        expected = [i for i, text in enumerate(texts, 1) if all(word.lower() in text.lower() for word in words.split())]
        assert sorted(entry.id for entry, _ in indexed) == expected
        store._connection.execute("DROP TABLE IF EXISTS messages_index")
        patch.setattr(search, "INDEX", "CREATE VIRTUAL TABLE messages_index USING no_such_module (content)")
        assert store.search(words) == indexed


def test_a_damaged_index_is_only_a_copy(store: Store, path: Path) -> None:
    id = begin(store)
    assert store.search("experts")
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM messages_index_data WHERE id = 10")
    connection.commit()
    connection.close()
    for _ in range(2):
        assert [entry.id for entry, _ in store.search("experts")] == [id]


def test_files_are_private_under_any_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with Store.open(path) as store:
            begin(store)
            store.search("experts")
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert {"sessions.db", "sessions.db-wal", "sessions.db-shm"} <= modes.keys() and set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_open_file_is_closed_to_others(store: Store, path: Path) -> None:
    store.close()
    path.chmod(0o644)
    Store.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock"])
def test_planted_links_are_refused(tmp_path: Path, suffix: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o644)
    (tmp_path / f"s.db{suffix}").symlink_to(victim)
    with pytest.raises(DbrxError, match="is a link"):
        Store.open(tmp_path / "s.db")
    assert victim.read_text() == "precious" and stat.S_IMODE(victim.stat().st_mode) == 0o644


def test_other_planted_things_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.db")
    with pytest.raises(DbrxError, match="not a plain file"):
        Store.open(tmp_path / "s.db")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(DbrxError, match="everybody can write"):
        Store.open(shared / "s.db")
    (tmp_path / "link").symlink_to("/nowhere")
    with pytest.raises(DbrxError):
        Store.open(tmp_path / "link" / "s.db")


def damage_header(data: bytearray) -> None:
    data[:16] = b"not a database!!"


def damage_a_page(data: bytearray) -> None:
    data[4096:4296] = b"\xff" * 200


def damage_every_page(data: bytearray) -> None:
    data[4096:] = os.urandom(len(data) - 4096)


def cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def replace(data: bytearray) -> None:
    data[:] = b"hello"


@pytest.mark.parametrize("damage", [damage_header, damage_a_page, damage_every_page, cut, replace])
def test_a_damaged_file_is_set_aside(store: Store, path: Path, damage: Any) -> None:
    begin(store, [*TALK, Message("user", "long " * 3000)])
    store.close()
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    notices: list[str] = []
    with Store.open(path, notices.append) as fresh:
        assert fresh.list() == []
        begin(fresh)
    (notice,) = notices
    (aside,) = path.parent.glob("sessions-damaged-*.db")
    assert aside.read_bytes() == data and aside.name in notice and str(path) in notice
    Store.open(path, notices.append).close()
    assert len(notices) == 1


def test_another_programs_database_is_set_aside_too(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (cake)")
    connection.close()
    notices: list[str] = []
    Store.open(path, notices.append).close()
    (aside,) = path.parent.glob("sessions-damaged-*.db")
    assert len(notices) == 1 and rows(aside, "SELECT name FROM sqlite_master") == [("recipes",)]


def test_an_old_schema_is_migrated(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store)
    store.close()
    assert rows(path, "PRAGMA user_version") == [(len(database.MIGRATIONS),)]
    more = ("ALTER TABLE sessions ADD COLUMN colour TEXT", "UPDATE sessions SET colour = 'red'")
    broken = (*more, "no SQL")
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, broken))
    with pytest.raises(StoreError):
        Store.open(path)
    assert "colour" not in str(rows(path, "SELECT sql FROM sqlite_master"))  # all of a migration, or nothing
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS[:-1], more))
    with Store.open(path) as migrated:
        assert migrated.find(1).turns == TALK
    assert rows(path, "SELECT colour FROM sessions") == [("red",)]
    assert rows(path, "PRAGMA user_version") == [(len(database.MIGRATIONS),)]


def test_a_newer_schema_is_left_alone(store: Store, path: Path) -> None:
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer dbrx"):
        Store.open(path)
    assert path.read_bytes() == before and len(list(path.parent.glob("*.db"))) == 1


def test_the_first_schema_is_what_was_released(store: Store, path: Path) -> None:
    """A released step is never changed: a file from then would not have the change."""
    columns = {
        table: [row[1] for row in rows(path, f"PRAGMA table_info({table})")] for table in ("sessions", "messages")
    }
    assert columns == {
        "sessions": "id name kind model revision settings system created updated version".split(),
        "messages": "id session position role content timings".split(),
    }


def test_a_full_disk_leaves_what_was(store: Store, path: Path) -> None:
    id = begin(store)
    store._connection.execute("PRAGMA max_page_count = 10")
    with pytest.raises(ResourceError, match="full"):
        store.save(id, None, [Message("user", "x" * 100_000)])
    assert store.find(id).turns == TALK
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.save(id, None, [Message("user", "x" * 100_000)])
    assert rows(path, "SELECT length(content) FROM messages") == [(100_000,)]


def test_a_recorder_tells_once_and_goes_on(path: Path) -> None:
    notices: list[str] = []
    recorder = Recorder("chat", "m", None, {}, notices.append, path=path)
    assert recorder.id is None and not path.exists()  # nothing said, nothing kept
    assert recorder.save(None, TALK[:2]) and recorder.id == 1
    store = recorder.store()
    store._connection.execute("PRAGMA max_page_count = 10")
    long = [*TALK, Message("user", "x" * 100_000)]
    assert not recorder.save(None, long) and not recorder.save(None, long)
    assert len(notices) == 1 and "not being saved" in notices[0]
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert recorder.save(None, long) and store.find(1).turns == long
    recorder.renew()
    assert recorder.save(None, TALK) and recorder.id == 2
    recorder.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "s.db", Path("/proc/dbrx/s.db"), tmp_path):
        notices: list[str] = []
        recorder = Recorder("chat", "m", None, {}, notices.append, path=place)
        assert not recorder.save(None, TALK) and not recorder.save(None, TALK)
        assert len(notices) == 1 and "\n" not in notices[0]
    off = Recorder("chat", "m", None, {}, notices.append, path=tmp_path / "off" / "s.db", enabled=False)
    assert not off.save(None, TALK) and not (tmp_path / "off").exists() and len(notices) == 1


def done(text: str) -> Done:
    timings = Timings(load_s=0.1, prefill_s=0.2, decode_s=0.3, prefill_tokens_per_s=4.0, decode_tokens_per_s=5.0)
    return Done(text, [1], "stop", Usage(6, 0, 7), timings, "demo", None, "sdpa", "bfloat16", "none", 0)


def test_log_generate(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [Message("system", "Be brief."), Message("user", "Why?")]
    log_generate("demo", None, {"seed": 0}, prompt, done("So."), print, path=path)
    log_generate("demo", None, {"raw": True}, "Once", done(" upon"), print, path=path)
    with Store.open(path) as store:
        raw, asked = (store.find(entry.id) for entry in store.list("generate"))
    assert (asked.system, asked.turns) == ("Be brief.", [Message("user", "Why?"), Message("assistant", "So.")])
    assert asked.timings[1] and asked.timings[1]["decode_tokens_per_s"] == 5.0
    assert asked.timings[1]["finish_reason"] == "stop" and asked.timings[1]["prompt_tokens"] == 6
    assert (raw.system, raw.turns[0].content, raw.settings) == (None, "Once", {"raw": True})
    log_generate("demo", None, {}, "x", done("y"), print, path=path / "below" / "s.db")
    assert capsys.readouterr().out.count("\n") == 1


def test_export(store: Store) -> None:
    id = begin(store, TALK[:2], "moe")
    store.save(id, "Be brief.", TALK, {"decode_s": 0.25})
    session = store.find(id)
    data = json.loads(export_json(session))
    assert data["messages"] == [
        {"role": "system", "content": "Be brief."},
        *({"role": turn.role, "content": turn.content} for turn in TALK[:3]),
        {"role": "assistant", "content": TALK[3].content, "timings": {"decode_s": 0.25}},
    ]
    assert data["name"] == "moe" and data["settings"]["temperature"] == 0.5 and data["created"].endswith("+00:00")
    text = export_markdown(session)
    assert text.startswith("# moe\n\ndemo (abc), 20") and text.endswith("## Assistant\n\nشبكة عصبية 🙂\n")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## System", "## User", "## Assistant", "## User", "## Assistant"]
