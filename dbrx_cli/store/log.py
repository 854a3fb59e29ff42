"""Recording a conversation while it goes on: whatever happens to the store, the conversation does not end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbrx_cli.engine import Done
from model.errors import DbrxError
from model.messages import Message

from .database import Notify
from .sessions import Conflict, Kind, Session, Store


class Recorder:
    """Saves one conversation after every turn. A fault is told once, until saving works again.

    A session is begun with the first save, so that a chat in which nothing was said leaves nothing. If another process
    has taken the same session further, this one goes on in a new session: no turn of either is lost.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        revision: str | None,
        settings: Mapping[str, Any],
        notify: Notify,
        *,
        path: Path | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.id: int | None = None
        self.model = model
        self._what = (kind, revision, dict(settings))
        self._notify = notify
        self._path = path
        self._store: Store | None = None
        self._failing = False
        self._branches: dict[int, Sequence[Message]] = {}  # other ways in which the conversation went on

    def store(self) -> Store:
        """The store, opened at the first use. Raises `DbrxError`."""
        if self._store is None:
            self._store = Store.open(self._path, self._notify)
        return self._store

    def prepare(self) -> None:
        """Open the store ahead of a save, which then takes no longer than it must; a fault is told by the save."""
        if self.enabled and not self._failing:
            with suppress(DbrxError):
                self.store()

    def resume(self, session: Session) -> dict[int, list[Message]]:
        """Go on in a session that `store()` gave; its branches."""
        branches = self.store().branches(session.id)
        self.id, self._branches = session.id, dict(branches)
        return branches

    def renew(self) -> None:
        """The next save begins another session."""
        self.id, self._branches = None, {}

    def save(self, system: str | None, turns: Sequence[Message], timings: Mapping[str, Any] | None = None) -> bool:
        """See `Store.save`; False if it could not be done."""
        if not self.enabled:
            return False
        try:
            self._save(system, turns, timings)
        except DbrxError as fault:
            if not self._failing:
                self._notify(f"this conversation is not being saved: {fault.one_line}")
            self._failing = True
            return False
        self._failing = False
        return True

    def save_branches(self, branches: Mapping[int, Sequence[Message]]) -> None:
        """See `Store.save_branches`; a fault is told as one of `save`. A new session has them with its first save."""
        self._branches = dict(branches)
        if not self.enabled or self.id is None:
            return
        try:
            self.store().save_branches(self.id, branches)
        except Conflict:  # the next save tells of it, and goes on in a new session
            pass
        except DbrxError as fault:
            self._notify(f"the branches are not being saved: {fault.one_line}")

    def close(self) -> None:
        """Let go of the file."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _save(self, system: str | None, turns: Sequence[Message], timings: Mapping[str, Any] | None) -> None:
        store = self.store()
        if self.id is not None:
            try:
                store.save(self.id, system, turns, timings, self.model)
                return
            except Conflict as conflict:
                was = conflict.message
                self.id = None
        else:
            was = None
        kind, revision, settings = self._what
        id = store.begin(kind, self.model, revision, settings)
        store.save(id, system, turns, timings)
        self.id = id
        if was:
            self._notify(f"{was}; this conversation goes on as session {id}")
        if self._branches:
            store.save_branches(id, self._branches)


def log_generate(
    model: str,
    revision: str | None,
    settings: Mapping[str, Any],
    messages: Sequence[Message] | str,
    done: Done,
    notify: Notify,
    *,
    path: Path | None = None,
) -> None:
    """Keep what `generate` was asked (messages, or raw text) and what it answered, as one session.

    Never raises for want of a place to write: `notify` is told. Speed and finish reason are kept with the reply.
    """
    turns = [Message("user", messages)] if isinstance(messages, str) else list(messages)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    recorder = Recorder("generate", model, revision, settings, notify, path=path)
    timings = {"finish_reason": done.finish_reason, **asdict(done.usage), **asdict(done.timings)}
    recorder.save(system, [*turns, done.message()], timings)
    recorder.close()
