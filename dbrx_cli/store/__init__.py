"""Conversations that outlive the program: one SQLite file for chats and for what `generate` answered."""

from .database import StoreError
from .export import export_json, export_markdown
from .log import Recorder, log_generate
from .sessions import Conflict, Entry, Kind, Session, Store

__all__ = [
    "Conflict",
    "Entry",
    "Kind",
    "Recorder",
    "Session",
    "Store",
    "StoreError",
    "export_json",
    "export_markdown",
    "log_generate",
]
