"""`dbrx chat` with an engine that needs no model: `python -m tests.fake_chat [FLAGS]`. The message says the answer.

`say TEXT` is answered with TEXT (`\\n` and other escapes as in Python), `slowly TEXT` too but a word in 50 ms, `read N`
makes the reading take N seconds, `tell FILE` answers with a file, `prompt` with all that was read. `fail TEXT` breaks
off behind TEXT. Anything else is echoed. With FAKE_LOAD in the environment, loading takes so many seconds.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

# Forks of a test's process have these, and need not import them.
import pydantic.fields  # noqa: F401

import dbrx_cli.app
import dbrx_cli.render.markdown
import dbrx_cli.repl.notices
import dbrx_cli.repl.prompt
import dbrx_cli.settings_file
from dbrx_cli.commands import chat
from dbrx_cli.engine import Delta, Done, FinishReason, Request, Timings, Usage
from model.errors import ConnectionFault, ContextError
from model.messages import Message
from model.sampling import SamplingParams

CONTEXT = 300


class FakeEngine:
    """A token is a word or a run of spaces; a message costs two more. Reads 100 tokens a second, as it says."""

    name = "fake"
    continues = True
    defaults = SamplingParams()
    context = CONTEXT

    def __init__(self) -> None:
        self._cached: list[str] = []

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        assert not isinstance(request.prompt, str)
        prompt = self._encode(request.prompt)
        if len(prompt) >= self.context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, and the context is {self.context}")
        unread = self.unread(request.prompt)
        text, made = "", 0
        reason: FinishReason = "interrupted"
        try:
            answer, pause = self._answer(request)
            self._cached = prompt
            for piece in re.findall(r"\s+|\S+", answer)[: request.params.max_tokens]:
                text, made = text + piece, made + 1
                self._cached = [*self._cached, piece]
                yield Delta(piece, made)
                time.sleep(pause)
            if request.prompt[-1].content.startswith("fail "):
                raise ConnectionFault("the server broke off in the middle of the reply", "try again")
            reason = "length" if len(text) < len(answer) else "stop"
        except KeyboardInterrupt:
            pass
        yield finished(text, made, reason, len(prompt), unread)

    def count(self, messages: Sequence[Message]) -> int:
        return len(self._encode(messages))

    def unread(self, messages: Sequence[Message]) -> int:
        prompt = self._encode(messages)
        pairs = enumerate(zip(prompt, self._cached, strict=False))
        return len(prompt) - next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(self._cached)))

    def close(self) -> None:
        pass

    def _encode(self, messages: Sequence[Message]) -> list[str]:
        return [token for m in messages for token in (f"<{m.role}>", *re.findall(r"\s+|\S+", m.content), "</>")][:-1]

    def _answer(self, request: Request) -> tuple[str, float]:
        assert not isinstance(request.prompt, str)
        if request.continue_final:
            return " and more", 0.0
        question = request.prompt[-1].content
        verb, _, rest = question.partition(" ")
        if verb == "prompt":
            return repr([(m.role, m.content) for m in request.prompt]), 0.0
        if verb == "tell":
            return Path(rest).read_text("utf-8"), 0.0
        if verb == "read":
            time.sleep(float(rest))
        if verb in ("say", "slowly", "fail"):
            rest = rest.replace("\\n", "\n").replace("\\e", "\x1b").replace("\\a", "\x07")
            return rest, 0.05 if verb == "slowly" else 0.0
        return f"You said: {question}", 0.0


def finished(text: str, made: int = 0, reason: FinishReason = "stop", prompt: int = 0, unread: int = 0) -> Done:
    """The record that closes a reply."""
    usage = Usage(prompt, prompt - unread, made)
    timings = Timings(1.5, unread / 100, made / 20, 100.0, 20.0)
    return Done(text, list(range(made)), reason, usage, timings, "fake", None, "none", "float32", "none", 0)


def main() -> None:
    """The command line, but for the engine."""

    def load(options: object, report: object) -> FakeEngine:
        if seconds := os.environ.get("FAKE_LOAD"):
            print("Reading the weights", flush=True)
            time.sleep(float(seconds))
        return FakeEngine()

    chat.open_engine = load
    sys.argv[1:1] = ["chat"]
    dbrx_cli.app.main()


if __name__ == "__main__":
    main()
