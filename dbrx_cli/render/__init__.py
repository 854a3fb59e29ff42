"""A choice: how a reply is shown while it comes. Text goes to stdout, and nothing else does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from dbrx_cli.engine import Delta, Done
from dbrx_cli.status import Status


class Renderer(Protocol):
    """Shows one reply. `streams`: text is seen as it comes, not only at the end."""

    streams: bool

    def delta(self, delta: Delta) -> None:
        """A piece has come."""

    def done(self, done: Done) -> None:
        """The reply is complete, or was interrupted."""

    def broken(self) -> None:
        """A fault ends it, and is told next."""


def show(stream: Generator[Delta | Done, None, None], renderer: Renderer, status: Status | None = None) -> Done:
    """Feed a reply to a renderer; Ctrl-C, wherever it strikes, ends the reply and keeps what came.

    status: what stands there until text is seen.
    """
    status = status or Status("", shown=False)
    try:
        try:
            for event in stream:
                if isinstance(event, Done):
                    break
                if event.text and renderer.streams:
                    status.end()
                status.made()
                renderer.delta(event)
        except KeyboardInterrupt:
            status.end()
            event = stream.throw(KeyboardInterrupt())
            while isinstance(event, Delta):
                renderer.delta(event)
                event = next(stream)
    except BaseException:
        status.end()
        renderer.broken()
        raise
    assert isinstance(event, Done)
    status.end()
    renderer.done(event)
    return event
