"""A choice: how a reply is shown while it comes. Text goes to stdout, and nothing else does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from dbrx_cli.engine import Delta, Done


class Renderer(Protocol):
    """Shows one reply."""

    def delta(self, delta: Delta) -> None:
        """A piece has come."""

    def done(self, done: Done) -> None:
        """The reply is complete, or was interrupted."""

    def broken(self) -> None:
        """A fault ends it, and is told next."""


def show(stream: Generator[Delta | Done, None, None], renderer: Renderer) -> Done:
    """Feed a reply to a renderer; Ctrl-C, wherever it strikes, ends the reply and keeps what came."""
    try:
        try:
            for event in stream:
                if isinstance(event, Done):
                    break
                renderer.delta(event)
        except KeyboardInterrupt:
            event = stream.throw(KeyboardInterrupt())
            while isinstance(event, Delta):
                renderer.delta(event)
                event = next(stream)
    except BaseException:
        renderer.broken()
        raise
    assert isinstance(event, Done)
    renderer.done(event)
    return event
