"""A session as text for other programs and people."""

from __future__ import annotations

from typing import Any

from dbrx_cli.output import to_json

from .sessions import Session

HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}


def export_json(session: Session) -> str:
    """All that is known of a session, as JSON; `messages` is what chat interfaces take, with timings beside replies."""
    return to_json(to_dict(session), indent=2) + "\n"


def to_dict(session: Session) -> dict[str, Any]:
    """What `export_json` writes."""
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": session.system}] if session.system is not None else []
    )
    for turn, timings in zip(session.turns, session.timings, strict=True):
        messages.append({"role": turn.role, "content": turn.content} | ({"timings": timings} if timings else {}))
    names = ("id", "name", "kind", "model", "revision", "settings", "created", "updated")
    return {name: getattr(session, name) for name in names} | {"messages": messages}


def export_markdown(session: Session) -> str:
    """A session to read: a heading, a line on the model, and each message under its speaker's name."""
    title = session.name or f"Session {session.id}"
    revision = f" ({session.revision})" if session.revision else ""
    parts = [f"# {title}", f"{session.model}{revision}, {session.created[:16].replace('T', ' ')} UTC"]
    messages = [("system", session.system)] if session.system else []
    messages += [(turn.role, turn.content) for turn in session.turns]
    for role, content in messages:
        parts += [f"## {HEADINGS[role]}", content.strip("\n")]
    return "\n\n".join(parts) + "\n"
