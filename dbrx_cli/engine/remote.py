"""A model that another process serves: the OpenAI-compatible protocol, streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from secrets import randbits
from typing import Any

from dbrx_cli.engine import Delta, Done, FinishReason, Request, Timings, Usage
from dbrx_cli.engine.wire import TRY_AGAIN, Answer, Server
from dbrx_cli.options import DEFAULT_MODEL, EngineOptions
from dbrx_cli.report import Report
from model.errors import ConnectionFault, InputError, ModelError
from model.messages import Message
from model.sampling import SamplingParams

DBRX_CONTEXT = 32768  # where the server does not say
CONTEXT_KEYS = ("max_model_len", "context_length", "context", "n_ctx")  # of vLLM, OpenRouter, this program, llama.cpp
BYTES_A_TOKEN = 4.0  # of English; corrected by what the server counts
TOKENS_A_MESSAGE = 5  # of the chat template
END = "[DONE]"


class RemoteEngine:
    """Answers through a server. Tokens are its own, so counts are estimates until it has told its own."""

    def __init__(self, server: Server, name: str, context: int) -> None:
        self.server = server
        self.name = name
        self.context = context
        self.defaults = SamplingParams()
        self._bytes_a_token = BYTES_A_TOKEN

    @classmethod
    def open(cls, options: EngineOptions, report: Report) -> RemoteEngine:
        """Ask the server what it has: the model that was named, else its first."""
        server = Server.at(options.url or "")
        models = _models(server)
        named = options.model != DEFAULT_MODEL
        names = [str(model["id"]) for model in models]
        if not named and not names:
            raise ModelError(f"{server.host} names no model", "name one with -m")
        if named and names and options.model not in names:
            raise ModelError(f"{server.host} has no model {options.model}", f"it has {', '.join(names[:10])}")
        name = options.model if named or options.model in names else names[0]
        if len(names) > 1 and not named:
            report.notice(f"{server.host} has several models, {name} is taken; choose with -m: {', '.join(names[:10])}")
        about = next((model for model in models if model["id"] == name), {})
        told = [about.get(key) for key in CONTEXT_KEYS]
        context = next((n for n in told if isinstance(n, int) and not isinstance(n, bool) and n > 0), DBRX_CONTEXT)
        return cls(server, name, options.context or context)

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """See `Engine.stream`. A reply that breaks off is a `ConnectionFault`, never a `Done`."""
        path, content = self._asked(request)
        reply = _Reply(content["seed"])
        reason: FinishReason = "interrupted"
        with self.server.post(path, content) as answer:
            try:
                reason = yield from self._answer(answer, reply)
            except KeyboardInterrupt:
                pass
        yield self._done(request, reply, reason)

    def count(self, messages: Sequence[Message]) -> int:
        """See `Engine.count`; an estimate."""
        size = sum(len(message.content.encode()) for message in messages)
        return round(size / self._bytes_a_token) + TOKENS_A_MESSAGE * (len(messages) + 1)

    def unread(self, messages: Sequence[Message]) -> int:
        """See `Engine.unread`: what the server has in its cache is its own affair."""
        return 0

    def close(self) -> None:
        """See `Engine.close`: nothing is held."""

    def _asked(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Path and content of the request; `InputError` for what the protocol has no words for."""
        for asked, flag in (
            (request.continue_final, "continuing a reply"),
            (request.constraint is not None, "--schema"),
            (request.logprobs is not None, "--logprobs"),
            (request.resume is not None, "--resume"),
        ):
            if asked:
                raise InputError(f"{flag} is not possible with --url", "leave it out, or load the model here")
        params = request.params
        content: dict[str, Any] = {
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": randbits(32) if params.seed is None else params.seed,
        }
        neutral = SamplingParams(top_k=0, min_p=0, repetition_penalty=1)
        # Servers differ in what they know beyond the above, so the rest is sent only where it does something.
        for name in ("frequency_penalty", "presence_penalty", "top_k", "min_p", "repetition_penalty"):
            if getattr(params, name) != getattr(neutral, name):
                content[name] = getattr(params, name)
        if request.stop:
            content["stop"] = list(request.stop)
        if isinstance(request.prompt, str):
            return "completions", {**content, "prompt": request.prompt}
        messages = [{"role": message.role, "content": message.content} for message in request.prompt]
        return "chat/completions", {**content, "messages": messages}

    def _answer(self, answer: Answer, reply: _Reply) -> Generator[Delta, None, FinishReason]:
        """Pieces of text, and at the end why it ended; `ConnectionFault` if the server never says."""
        reason: FinishReason | None = None
        for data in answer.events():
            if data.strip() == END:
                break
            chunk = self._chunk(data)
            reply.note(chunk)
            for choice in chunk.get("choices") or []:
                text = _text(choice)
                if text and reason is None:
                    reply.add(text)
                    yield Delta(text, None)
                reason = self._reason(choice) or reason
        if reason is None:
            raise ConnectionFault(f"{self.server.host} broke off in the middle of the reply", TRY_AGAIN)
        return reason

    def _chunk(self, data: str) -> dict[str, Any]:
        """One event's object; `ConnectionFault` if it is an error, or nonsense."""
        try:
            chunk = json.loads(data)
            sound = isinstance(chunk, dict) and all(isinstance(c, dict) for c in chunk.get("choices") or [])
        except (ValueError, RecursionError, TypeError):
            sound = False
        if not sound:
            raise ConnectionFault(f"{self.server.host} sent what is no part of a reply", "check --url")
        if chunk.get("error"):
            error = chunk["error"]
            said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
            raise ConnectionFault(f"{self.server.host} gave up: {self.server.said(said)}", TRY_AGAIN)
        return dict(chunk)

    def _reason(self, choice: dict[str, Any]) -> FinishReason | None:
        """Why the reply ended, if it has; what cut it off in any other way is a fault."""
        reason = choice.get("finish_reason")
        if reason is None:
            return None
        if reason == "stop":  # some servers tell which stop string it was
            return "stop_string" if isinstance(choice.get("stop_reason"), str) else "stop"
        if reason in ("eos", "end_turn"):
            return "stop"
        if reason == "stop_string":
            return "stop_string"
        if reason == "length":
            return "length"
        raise ConnectionFault(f"{self.server.host} cut the reply off: {self.server.said(str(reason))}", TRY_AGAIN)

    def _done(self, request: Request, reply: _Reply, reason: FinishReason) -> Done:
        now = time.perf_counter()
        first = reply.first_at or now
        prefill_s, decode_s = first - reply.started, (reply.last_at or now) - first
        estimated = isinstance(request.prompt, str) or self.count(request.prompt)
        prompt = len(request.prompt) // 4 if isinstance(request.prompt, str) else int(estimated)
        usage = Usage(
            _number(reply.usage, "prompt_tokens", prompt),
            _number(reply.usage.get("prompt_tokens_details"), "cached_tokens", 0),
            _number(reply.usage, "completion_tokens", reply.pieces),
        )
        if reply.usage and not isinstance(request.prompt, str):
            self._correct(request.prompt, usage.prompt_tokens)
        return Done(
            text=reply.text,
            token_ids=[],
            finish_reason=reason,
            usage=usage,
            timings=Timings(
                load_s=0.0,
                prefill_s=prefill_s,
                decode_s=decode_s,
                prefill_tokens_per_s=(usage.prompt_tokens - usage.cached_tokens) / prefill_s if prefill_s else 0.0,
                decode_tokens_per_s=max(0, usage.completion_tokens - 1) / decode_s if decode_s else 0.0,
            ),
            model=self.name,
            revision=None,
            attn="remote",
            dtype="remote",
            quantize="remote",
            seed=reply.seed,
        )

    def _correct(self, messages: Sequence[Message], counted: int) -> None:
        """Learn from the server's count how long its tokens are, within reason."""
        size = sum(len(message.content.encode()) for message in messages)
        tokens = counted - TOKENS_A_MESSAGE * (len(messages) + 1)
        if size > 200 and tokens > 0:
            self._bytes_a_token = min(8.0, max(0.5, size / tokens))


class _Reply:
    """A reply as it comes, with its clock."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.text = ""
        self.pieces = 0
        self.usage: dict[str, Any] = {}
        self.started = time.perf_counter()
        self.first_at: float | None = None
        self.last_at: float | None = None

    def add(self, text: str) -> None:
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.text += text
        self.pieces += 1

    def note(self, chunk: dict[str, Any]) -> None:
        """Keep the usage, which the last chunks carry."""
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]


def _models(server: Server) -> list[dict[str, Any]]:
    """What /v1/models lists."""
    answer = server.get("models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list):
        raise ConnectionFault(f"{server.host} does not answer like an OpenAI-compatible server", "check --url")
    return [model for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)]


def _text(choice: dict[str, Any]) -> str:
    """The new text of a chunk: of a chat, or of a plain completion."""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _number(values: Any, key: str, otherwise: int) -> int:
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise
