"""The KV cache of a session, kept when the chat is left, so that a long conversation is not read again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dbrx_cli.engine import Engine, KeepsCache
from dbrx_cli.private import data_folder, private_folder
from dbrx_cli.report import Report
from dbrx_cli.store import Recorder
from model.errors import DbrxError

FOLDER = "caches"
KEPT = 4  # sessions, the newest: a token of DBRX takes 160 kB


def keep_cache(engine: Engine, recorder: Recorder, report: Report) -> None:
    """Save what the engine has in its cache. A cache is only a saving: no fault of it is worth a word."""
    if recorder.id is None or not recorder.enabled or not isinstance(engine, KeepsCache):
        return
    with report.status("keeping what was read"), suppress(DbrxError, OSError):
        folder = private_folder(data_folder() / FOLDER)
        engine.save_cache(_path(folder, recorder.id))
        # Also of sessions that were removed: what was said must not stay behind in their caches.
        known = {entry.id for entry in recorder.store().list("chat")}
        newest = sorted(folder.glob("*.kv"), key=lambda path: path.stat().st_mtime, reverse=True)
        for place, path in enumerate(newest):
            if place >= KEPT or int(path.stem) not in known:
                path.unlink()


def take_cache(engine: Engine, session: int, report: Report) -> None:
    """Read a session's cache, if there is one that fits the model."""
    if isinstance(engine, KeepsCache):
        with report.status("fetching what was read"), suppress(DbrxError, OSError):
            engine.load_cache(_path(data_folder() / FOLDER, session))


def drop_cache(session: int) -> None:
    """Remove what a session's cache holds of its words."""
    with suppress(OSError):
        _path(data_folder() / FOLDER, session).unlink(missing_ok=True)


def _path(folder: Path, session: int) -> Path:
    return folder / f"{session}.kv"
