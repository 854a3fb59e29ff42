"""The flags of `dbrx serve`, and their values."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from model.errors import InputError

SERVER = "Server"
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def _server(flag: str, help: str, **more: Any) -> Any:
    return typer.Option(flag, rich_help_panel=SERVER, help=help, **more)


@dataclass(frozen=True)
class ServerOptions:
    """Where it listens, to whom, and what it takes."""

    host: Annotated[str, _server("--host", "Address to listen at; one that others reach needs a key.")] = "127.0.0.1"
    port: Annotated[int, _server("--port", "Port to listen at; 0 for any.", min=0, max=65535)] = 8000
    alias: Annotated[
        list[str] | None,
        _server("--alias", "Another name of the model (repeatable).", metavar="NAME", show_default=False),
    ] = None
    parallel: Annotated[int, _server("--parallel", "Replies at once.", min=1, max=256)] = 8
    queue: Annotated[int, _server("--queue", "Replies that may wait beside these.", min=0, max=10_000)] = 64
    timeout: Annotated[str, _server("--timeout", "Longest time of a request, such as 90s or 30m.", metavar="TIME")] = (
        "1h"
    )
    drain: Annotated[str, _server("--drain", "How long replies may go on after SIGTERM or Ctrl-C.", metavar="TIME")] = (
        "60s"
    )
    idle_timeout: Annotated[
        str | None,
        _server("--idle-timeout", "End when nobody has asked for so long.", metavar="TIME", show_default=False),
    ] = None
    background: Annotated[
        bool, _server("--background", "Load the model, then go on without a terminal.", metavar="", show_default=False)
    ] = False
    stop: Annotated[
        bool, _server("--stop", "End the server that runs (at --port, of several).", metavar="", show_default=False)
    ] = False
    allow_origin: Annotated[
        list[str] | None,
        _server("--allow-origin", "Let web pages of this origin ask (repeatable).", metavar="URL", show_default=False),
    ] = None


def seconds_of(text: str, flag: str) -> float:
    """A length of time such as 90, 90s, 30m or 1.5h."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text.strip())
    if not found or not (seconds := float(found[1]) * UNITS[found[2]]):
        raise InputError(f"{flag} {text[:40]} is no length of time", "give one such as 90s, 30m or 1h")
    return seconds
