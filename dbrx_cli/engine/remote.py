"""A model that another process serves: the OpenAI-compatible protocol, streamed (docs/servers.md)."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from dbrx_cli.engine import REMOTE, Delta, Done, FinishReason, Request, Timings, TokenLogprob, Usage
from dbrx_cli.engine.chunks import ids_of, logprobs_of, read_chunk, reason_of, text_of, thinks, whole
from dbrx_cli.engine.fitting import Undecided, misfit
from dbrx_cli.engine.http_client import (
    LARGEST_ANSWER,
    LARGEST_COUNT,
    TRY_AGAIN,
    Answer,
    NoPath,
    OneReply,
    Refused,
    Server,
    persist,
)
from dbrx_cli.engine.listing import Listing, context_of
from dbrx_cli.options import DEFAULT_MODEL, EngineOptions
from dbrx_cli.report import Report
from model.errors import ContextError, DbrxError, InputError, ModelError
from model.messages import Message
from model.sampling import DISTRIBUTION, PARAMETERS, SamplingParams

DBRX_CONTEXT = 32768  # where the server does not say
BYTES_A_TOKEN = 4.0  # of English; corrected by what the server counts
TOKENS_A_MESSAGE = 5  # of the chat template
END = "[DONE]"
# How servers by `owned_by` go on with the last message, and which key the repetition penalty has (else: both keys).
GO_ON: dict[str, dict[str, bool]] = {
    "vllm": {"continue_final_message": True, "add_generation_prompt": False},
    "sglang": {"continue_final_message": True},
    "llamacpp": {},  # always does
}
PENALTY = {"vllm": ("repetition_penalty",), "sglang": ("repetition_penalty",), "llamacpp": ("repeat_penalty",)}
# Fields of a request -> the flag that asks for them.
FLAGS = {name: "--" + name.replace("_", "-") for name in (*PARAMETERS, "stop")} | {
    "repeat_penalty": "--repetition-penalty",
    "max_completion_tokens": "--max-tokens",
    "response_format": "--schema",
    "json_schema": "--schema",
    "logprobs": "--logprobs",
    "top_logprobs": "--logprobs",
}


@dataclass(frozen=True)
class ServerParams(SamplingParams):
    """What a server is asked for; None, as it may be here, leaves it to the server."""

    SEEDS = 2**31  # servers keep no more of a seed for sure; llama.cpp takes 2**32 - 1 for "any"

    def __post_init__(self) -> None:
        SamplingParams(**{name: value for name, value in vars(self).items() if value is not None})  # its bounds hold
        if self.seed is not None and not 0 <= self.seed < self.SEEDS:
            raise ValueError(f"seed must be from 0 to {self.SEEDS - 1} for a server, not {self.seed}")


class RemoteEngine:
    """Answers through a server. Tokens are its own, so counts are estimates until it has told its own."""

    def __init__(self, server: Server, name: str, listing: Listing, report: Report, context: int | None = None) -> None:
        """context: --context, the user's own bound."""
        entry = listing.find(name) or (listing.entries[0] if len(listing.entries) == 1 else {})
        told = context_of(entry)
        if context is not None and told is not None and context > told:
            report.notice(f"{server.host} has a context of {told} tokens, so --context is no more than that")
        self.server = server
        self.name = name
        unset: dict[str, Any] = dict.fromkeys(DISTRIBUTION)
        self.defaults: SamplingParams = ServerParams(**unset)
        self.context = min(filter(None, (context, told)), default=DBRX_CONTEXT)
        self.owner = str(entry.get("owned_by", ""))
        self.continues = self.owner in GO_ON
        self._unlisted = bool(listing.entries) and listing.find(name) is None
        self._bound = context
        self._knows_context = context is not None or told is not None
        self._listing = listing
        self._report = report
        self._bytes_a_token = BYTES_A_TOKEN
        self._spelled: dict[str, str | None] = {}  # fields that this server wants otherwise, or (None) not at all
        self._answered = False  # whether it has taken any request
        self._open: set[Answer] = set()
        self._stop = threading.Event()
        self.patience: float | None = None  # seconds, in which a server may say again and again that it is busy

    @classmethod
    def open(cls, options: EngineOptions, report: Report) -> RemoteEngine:
        """Ask the server what it has: the model that was named, else its first."""
        named = options.model != DEFAULT_MODEL
        listing, server = Listing.of(Server.at(options.url or ""), named, report.notice)
        names, name = [n for n in listing.names if "*" not in n], options.model
        if not named and name not in names:
            if not names:
                raise ModelError(f"{server.host} names no model", "name one with -m")
            name = names[0]
            if len(names) > 1:
                has = server.said(listing.summary)
                report.notice(f"{server.host} has several models, {server.said(name)} is taken; choose with -m: {has}")
        elif listing.entries and listing.find(name) is None:
            has = server.said(listing.summary)
            report.notice(f"{server.host} does not list {name}, which is asked for all the same; it lists {has}")
        if len(server.bases) == 1:
            report.detail(f"paths of {server.host} begin with {server.bases[0]}")
        return cls(server, name, listing, report, options.context)

    def stream(self, request: Request) -> Generator[Delta | Done, None, None]:
        """See `Engine.stream`. A reply that breaks off is kept as far as it came, its Done has the fault."""
        path, content = self._asked(request)
        reply = _Reply(request, self.owner == "llamacpp")
        reason: FinishReason = "interrupted"
        fault: DbrxError | None = None
        answer = None
        try:
            answer = self._ask(path, content)
            reason = yield from self._answer(answer, reply)
            self._check(request, reply, reason)
        except KeyboardInterrupt:
            pass
        except DbrxError as error:
            if not reply.text:
                raise
            fault = error
        finally:
            if answer is not None:
                self._hang_up(answer)
        yield self._done(request, reply, reason, fault)

    def count(self, messages: Sequence[Message]) -> int:
        """See `Engine.count`; an estimate."""
        size = sum(len(message.content.encode(errors="replace")) for message in messages)
        return round(size / self._bytes_a_token) + TOKENS_A_MESSAGE * (len(messages) + 1)

    def unread(self, messages: Sequence[Message]) -> None:
        """See `Engine.unread`: what the server has in its cache is its own affair."""

    def close(self) -> None:
        """See `Engine.close`: replies that other threads wait for are broken off."""
        self._stop.set()
        for answer in list(self._open):
            self._hang_up(answer)

    def _count(self, prompt: Sequence[Message] | str) -> int:
        if isinstance(prompt, str):
            return round(len(prompt.encode(errors="replace")) / self._bytes_a_token)
        return self.count(prompt)

    def _asked(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Path and content of the request; `InputError` for what the server has no words for."""
        if request.resume is not None:
            raise InputError("--resume is not possible with --url", "leave it out, or load the model here")
        if request.continue_final and not self.continues:
            raise InputError(
                f"{self.server.host} is not known to go on with a reply", "vLLM, SGLang and llama-server do"
            )
        if self._bound is not None and (tokens := self._count(request.prompt)) >= self._bound:
            raise ContextError(
                f"the prompt has about {tokens} tokens, and --context is {self._bound}",
                "shorten it, or raise --context",
            )
        content: dict[str, Any] = {
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self._longest(request),
            **self._sampling(request.params),
        }
        if request.stop:
            content["stop"] = list(request.stop)
        raw = isinstance(request.prompt, str)
        if request.logprobs is not None:
            content |= {"logprobs": request.logprobs} if raw else {"logprobs": True, "top_logprobs": request.logprobs}
        if self.owner == "vllm":
            content["return_token_ids"] = True
        if request.constraint is not None and request.constraint.json_schema is None:
            raise InputError(
                "--grammar and --regex are not possible with --url", "load the model here, or use --schema"
            )
        if request.constraint is not None:
            schema = request.constraint.json_schema
            form = {"name": "reply", "schema": schema, "strict": True}
            content["response_format"] = {"type": "json_schema", "json_schema": form}
            if raw and self.owner == "llamacpp":  # which has no eye for the above there
                content["json_schema"] = schema
        if isinstance(request.prompt, str):
            return "completions", {**content, "prompt": request.prompt}
        if request.continue_final:
            content |= GO_ON[self.owner]
        messages = [{"role": message.role, "content": message.content} for message in request.prompt]
        return "chat/completions", {**content, "messages": messages}

    def _longest(self, request: Request) -> int:
        """--max-tokens, but no more than the context leaves: some servers refuse what can never come."""
        if not self._knows_context:
            return request.params.max_tokens
        left = self.context - self._count(request.prompt)  # an estimate, so that it is not trusted to be near 0
        return min(request.params.max_tokens, max(left, self.context // 4, 1))

    def _sampling(self, params: SamplingParams) -> dict[str, Any]:
        """What was given, and nothing else: servers differ in what they know and in their own defaults."""
        given = {name: getattr(params, name) for name in (*DISTRIBUTION, "seed")}
        spellings = PENALTY.get(self.owner, ("repetition_penalty", "repeat_penalty"))
        given |= dict.fromkeys(spellings, given.pop("repetition_penalty"))
        return {name: value for name, value in given.items() if value is not None}

    def _ask(self, path: str, content: dict[str, Any]) -> Answer:
        """The answer of a server that takes the request; what only this program wants is left out if it must be."""
        spelled = dict(self._spelled)
        while True:
            sent = {key: value for name, value in content.items() if (key := spelled.get(name, name))}
            try:
                post = functools.partial(self._post, path, sent)
                answer = persist(post, self._report.notice, self._stop, self.patience)
            except Refused as fault:
                otherwise = self._otherwise(fault.message, sent)
                if not otherwise:
                    raise self._blamed(fault, sent) from None
                spelled |= otherwise
            except (ModelError, NoPath) as fault:
                raise self._blamed(fault, sent) from None
            else:
                for name in spelled.keys() - self._spelled.keys():
                    instead = f", but {spelled[name]}" if spelled[name] else ""
                    self._report.detail(f"{self.server.host} does not take {name}{instead}")
                self._spelled, self._answered = spelled, True
                return answer

    def _post(self, path: str, content: dict[str, Any]) -> Answer:
        """The answer to a request, under the first base that has the path."""
        missing = None
        for server in self.server.each():
            answer = server.post(path, content)
            self._open.add(answer)
            try:
                answer.head()
            except NoPath as fault:
                self._hang_up(answer)
                missing = missing or fault
            except BaseException:
                self._hang_up(answer)
                raise
            else:
                self.server = server
                return answer
        assert missing is not None
        if path == "completions":
            missing.hint = f"it may have no plain completions: leave out --raw, or {missing.hint}"
        raise missing

    def _hang_up(self, answer: Answer) -> None:
        answer.close()
        self._open.discard(answer)

    def _otherwise(self, said: str, sent: dict[str, Any]) -> dict[str, str | None]:
        """Another spelling of a request that was refused: fields and their names, None without them."""
        if "max_tokens" in sent and "max_completion_tokens" in said:
            return {"max_tokens": "max_completion_tokens"}
        ours = [name for name in ("stream_options", "return_token_ids") if name in sent]
        blamed = [name for name in ours if name in said]
        if not blamed and not self._answered and not _flags(said, sent):  # no word of what it is
            blamed = ours
        return dict.fromkeys(blamed)

    def _blamed(self, fault: Refused | ModelError | NoPath, sent: dict[str, Any]) -> DbrxError:
        """The fault with the flag that it speaks of, or with the models that there are."""
        flags = _flags(fault.message, sent)
        if flags and isinstance(fault, Refused):
            fault.hint = f"leave out {' and '.join(flags)}, or choose another value"
        elif self._unlisted and (
            isinstance(fault, NoPath) or re.search(rf"model|{re.escape(self.name)}", fault.message)
        ):
            return ModelError(fault.message, f"it lists {self.server.said(self._listing.summary)}")
        return fault

    def _answer(self, answer: Answer, reply: _Reply) -> Generator[Delta, None, FinishReason]:
        """Pieces of text, and at the end why it ended; `ConnectionFault` if the server never says."""
        reason: FinishReason | None = None
        ended = False
        for name, data in answer.events():
            if data.strip() == END:
                ended = True
                break
            chunk = read_chunk(self.server, name, data)
            reply.note(chunk)
            for choice in chunk.get("choices") or []:
                if choice.get("index") not in (None, 0):  # another reply, which nobody asked for
                    continue
                pieces = reply.pieces
                deltas = reply.take(choice)
                if reply.pieces > pieces:
                    answer.spoke()
                yield from deltas
                if len(reply.text) + len(reply.ids) > LARGEST_ANSWER:
                    raise OneReply(f"{self.server.host} does not end its reply", TRY_AGAIN)
                reason = reason_of(self.server, choice) or reason
        if rest := reply.finish():
            yield Delta(rest, None)
        if reason is None and not (ended and reply.text):
            raise OneReply(f"{self.server.host} broke off in the middle of the reply", TRY_AGAIN)
        return reason or "stop"

    def _check(self, request: Request, reply: _Reply, reason: FinishReason) -> None:
        """`DbrxError` if the reply is not what was asked for."""
        host = self.server.host
        if not reply.text and not request.stop:
            thought = ", though the model has thought" if reply.thought else ""
            raise DbrxError(f"{host} gave an empty reply ({reason}){thought}", "ask otherwise, or raise --max-tokens")
        if request.logprobs is not None and reply.text and not reply.logprobs:
            raise DbrxError(f"{host} tells no log-probabilities", "leave out --logprobs, or load the model here")
        if request.constraint is not None and request.constraint.json_schema is not None:
            ended = reason == "stop" and not request.stop
            try:
                wrong = misfit(request.constraint.json_schema, reply.text, ended)
            except Undecided:
                self._report.notice("the reply could not be checked against --schema: its keys stand in another order")
                return
            if wrong:
                hint = "take a server that knows response_format, or load the model here"
                raise DbrxError(f"{host} does not keep to --schema: {wrong}", hint)

    def _done(self, request: Request, reply: _Reply, reason: FinishReason, fault: DbrxError | None) -> Done:
        now = time.perf_counter()
        first = reply.first_at or now
        prefill_s, decode_s = first - reply.started, (reply.last_at or now) - first
        usage = Usage(
            _number(reply.usage, "prompt_tokens", self._count(request.prompt)),
            _number(reply.usage.get("prompt_tokens_details"), "cached_tokens", 0),
            _number(reply.usage, "completion_tokens", reply.pieces),
        )
        if reply.usage and not isinstance(request.prompt, str):
            self._correct(request.prompt, usage.prompt_tokens)
        return Done(
            text=reply.text,
            token_ids=reply.ids,
            finish_reason=reason,
            usage=usage,
            timings=Timings(
                load_s=0.0,
                prefill_s=prefill_s,
                decode_s=decode_s,
                prefill_tokens_per_s=max(0, usage.prompt_tokens - usage.cached_tokens) / prefill_s
                if prefill_s
                else 0.0,
                decode_tokens_per_s=max(0, usage.completion_tokens - 1) / decode_s if decode_s else 0.0,
            ),
            model=self.name,
            revision=None,
            attn=REMOTE,
            dtype=REMOTE,
            quantize=REMOTE,
            seed=request.params.seed,
            logprobs=reply.logprobs or None,
            error=fault,
        )

    def _correct(self, messages: Sequence[Message], counted: int) -> None:
        """Learn from the server's count how long its tokens are, within reason."""
        size = sum(len(message.content.encode(errors="replace")) for message in messages)
        tokens = counted - TOKENS_A_MESSAGE * (len(messages) + 1)
        if size > 200 and tokens > 0:
            self._bytes_a_token = min(8.0, max(0.5, size / tokens))


class _Reply:
    """A reply as it comes, with its clock."""

    def __init__(self, request: Request, repeats: bool) -> None:
        """repeats: whether the server may begin by repeating what it goes on from, as llama.cpp's does."""
        self.text = ""
        self.pieces = 0
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.thought = False
        self.usage: dict[str, Any] = {}
        self.started = time.perf_counter()
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._half = ""  # of a surrogate pair whose other half comes with the next piece
        last = request.prompt[-1] if request.continue_final and repeats else None
        self._repeated = last.content if isinstance(last, Message) else ""
        self._held = ""  # the part of that which has come

    def take(self, choice: dict[str, Any]) -> list[Delta]:
        """What a chunk adds, a Delta for each token that the server tells, the text with the last."""
        self.thought = self.thought or thinks(choice)
        text = self._add(text_of(choice))
        ids, logprobs = ids_of(choice), logprobs_of(choice)
        if not ids and all(one.token_id is not None for one in logprobs):
            ids = [one.token_id for one in logprobs if one.token_id is not None]
        self.ids += ids
        self.logprobs += logprobs
        tokens = max(len(ids), len(logprobs), bool(text))
        return [
            Delta(
                text if i == tokens - 1 else "",
                ids[i] if i < len(ids) else None,
                logprobs[i] if i < len(logprobs) else None,
            )
            for i in range(tokens)
        ]

    def finish(self) -> str:
        """What was held back, when no more comes."""
        rest = "" if self._held == self._repeated else self._held
        self._repeated = self._held = ""
        return self._add(rest, ended=True)

    def note(self, chunk: dict[str, Any]) -> None:
        """Keep the usage, which the last chunks carry."""
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]

    def _add(self, text: str, ended: bool = False) -> str:
        text = self._half + self._new(text)
        half = len(text) - 1 if not ended and "\ud800" <= text[-1:] <= "\udbff" else len(text)
        text, self._half = whole(text[:half]), text[half:]
        if text:
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at
            self.text += text
            self.pieces += 1
        return text

    def _new(self, text: str) -> str:
        """The text without what it repeats."""
        self._held += text
        if self._repeated.startswith(self._held):
            return ""
        new = self._held.removeprefix(self._repeated)
        self._repeated = self._held = ""
        return new


def _flags(said: str, sent: dict[str, Any]) -> list[str]:
    """The flags behind those fields of a request of which a server speaks."""
    return sorted({FLAGS[name] for name in FLAGS.keys() & sent.keys() if re.search(rf"(?<!\w){name}(?!\w)", said)})


def _number(values: Any, key: str, otherwise: int) -> int:
    value = values.get(key) if isinstance(values, dict) else None
    return value if type(value) is int and 0 <= value < LARGEST_COUNT else otherwise
