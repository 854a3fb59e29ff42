"""Machine-readable replies: one object at the end, or a line an event."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from dbrx_cli.engine import Delta, Done


class JsonRenderer:
    """`--json`: one object when the reply is complete."""

    def delta(self, delta: Delta) -> None:
        pass

    def done(self, done: Done) -> None:
        _print(done.to_dict())

    def broken(self) -> None:
        pass


class JsonLinesRenderer:
    """`--jsonl`: start, a line a token, done."""

    def __init__(self, model: str) -> None:
        _print({"event": "start", "model": model})

    def delta(self, delta: Delta) -> None:
        logprob = {} if delta.logprob is None else {"logprob": asdict(delta.logprob)}
        _print({"event": "token", "text": delta.text, "token_id": delta.token_id, **logprob})

    def done(self, done: Done) -> None:
        _print({"event": "done", **done.to_dict()})

    def broken(self) -> None:
        pass


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
