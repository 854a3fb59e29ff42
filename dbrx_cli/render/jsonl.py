"""Machine-readable replies: one object at the end, or a line an event."""

from __future__ import annotations

import sys
from dataclasses import asdict

from dbrx_cli.engine import Delta, Done
from dbrx_cli.output import say_json


class JsonRenderer:
    """`--json`: one object when the reply is complete."""

    streams = False

    def delta(self, delta: Delta) -> None:
        pass

    def done(self, done: Done) -> None:
        say_json(done.to_dict())

    def broken(self) -> None:
        pass


class JsonLinesRenderer:
    """`--jsonl`: start, a line a token, done."""

    def __init__(self, model: str) -> None:
        self.streams = sys.stdout.isatty()
        say_json({"event": "start", "model": model})

    def delta(self, delta: Delta) -> None:
        logprob = {} if delta.logprob is None else {"logprob": asdict(delta.logprob)}
        say_json({"event": "token", "text": delta.text, "token_id": delta.token_id, **logprob})

    def done(self, done: Done) -> None:
        say_json({"event": "done", **done.to_dict()})

    def broken(self) -> None:
        pass
