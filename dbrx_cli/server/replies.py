"""What the engine gives -> the protocol's JSON: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from dbrx_cli.engine import UNLIKELY, Delta, Done, Likelihood, TokenLogprob

if TYPE_CHECKING:
    from dbrx_cli.server.requests import Asked
    from dbrx_cli.server.tickets import Ticket
    from model.tokenizer import Tokenizer

Json = dict[str, Any]


class Form:
    """The form of one answer: all of its parts have one id, one time and one model."""

    prefix, whole, part = "", "", ""  # of its id; `object` of an answer, and of a chunk

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked) -> None:
        self._head = {"id": f"{self.prefix}-{token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._tells_ids, self._n = tokenizer, asked.tells_ids, asked.n

    def answer(self, tickets: Sequence[Ticket]) -> Json:
        """The whole answer."""
        choices = [self._choice(ticket) for ticket in tickets]
        told: Json = {**self._head, "object": self.whole, "system_fingerprint": None, "choices": choices}
        return {**told, **self._asked_ids(tickets[0]), "usage": self._usage(tickets)}

    def begin(self, ticket: Ticket) -> Json:
        """The chunk before the first of a choice; empty where there is none."""
        return {}

    def chunk(self, ticket: Ticket, deltas: Iterable[Delta]) -> Json:
        """The chunk of some tokens; empty where it would tell nothing."""
        deltas = list(deltas)
        text = "".join(delta.text for delta in deltas)
        scores = [delta.logprob for delta in deltas if delta.logprob is not None]
        if not text and not scores and not self._tells_ids:
            return {}
        choice = self._delta(ticket, text, scores)
        return self._chunk([choice | self._ids([d.token_id for d in deltas if d.token_id is not None])])

    def end(self, ticket: Ticket, done: Done) -> Json:
        """The last chunk of a choice."""
        return self._chunk([self._last(ticket) | _finish(ticket, done)])

    def total(self, tickets: Sequence[Ticket]) -> Json:
        """The chunk with the usage."""
        return self._chunk([]) | {"usage": self._usage(tickets)}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.part, "choices": choices}

    def _usage(self, tickets: Sequence[Ticket]) -> Json:
        """Tokens of all choices; a prompt counts once, however many choices it has."""
        told = [ticket.result.usage for ticket in tickets]
        read = sum(each.prompt_tokens for each in told[:: self._n])
        made = sum(each.completion_tokens for each in told)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in told[:: self._n])},
        }

    def _ids(self, ids: Sequence[int]) -> Json:
        return {"token_ids": list(ids)} if self._tells_ids else {}

    def _asked_ids(self, ticket: Ticket) -> Json:
        return {"prompt_token_ids": ticket.job.reply.prompt} if self._tells_ids else {}

    def _choice(self, ticket: Ticket) -> Json:
        raise NotImplementedError

    def _delta(self, ticket: Ticket, text: str, scores: Sequence[TokenLogprob]) -> Json:
        raise NotImplementedError

    def _last(self, ticket: Ticket) -> Json:
        raise NotImplementedError


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, ticket: Ticket) -> Json:
        """See `Form.begin`."""
        choice = {"index": ticket.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._chunk([choice]) | self._asked_ids(ticket)

    def _choice(self, ticket: Ticket) -> Json:
        done = ticket.result
        message = {"role": "assistant", "content": done.text, "refusal": None}
        logprobs = None if done.logprobs is None else self._logprobs(done.logprobs)
        choice = {"index": ticket.index, "message": message, "logprobs": logprobs}
        return choice | _finish(ticket, done) | self._ids(done.token_ids)

    def _delta(self, ticket: Ticket, text: str, scores: Sequence[TokenLogprob]) -> Json:
        logprobs = self._logprobs(scores) if scores else None
        return {"index": ticket.index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def _last(self, ticket: Ticket) -> Json:
        return {"index": ticket.index, "delta": {}, "logprobs": None}

    def _logprobs(self, scores: Sequence[TokenLogprob]) -> Json:
        told = [self._likelihood(s) | {"top_logprobs": [self._likelihood(t) for t in s.top]} for s in scores]
        return {"content": told, "refusal": None}

    def _likelihood(self, one: Likelihood) -> Json:
        assert one.token_id is not None
        spelled = list(self._tokenizer.decode_bytes(one.token_id))
        return {"token": one.text, "logprob": _finite(one.logprob), "bytes": spelled}


class TextForm(Form):
    """/v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def _choice(self, ticket: Ticket) -> Json:
        done = ticket.result
        logprobs = None if done.logprobs is None else _columns(done.logprobs)
        choice = {"index": ticket.index, "text": done.text, "logprobs": logprobs}
        return choice | _finish(ticket, done) | self._ids(done.token_ids)

    def _delta(self, ticket: Ticket, text: str, scores: Sequence[TokenLogprob]) -> Json:
        logprobs = _columns(scores, ticket.told) if scores else None
        ticket.told += len(text)
        return {"index": ticket.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _last(self, ticket: Ticket) -> Json:
        return {"index": ticket.index, "text": "", "logprobs": None}


def _finish(ticket: Ticket, done: Done) -> Json:
    reason = "stop" if done.finish_reason == "stop_string" else done.finish_reason
    return {"finish_reason": reason, "stop_reason": ticket.job.reply.stop_string}


def _columns(scores: Sequence[TokenLogprob], start: int = 0) -> Json:
    """The older form: a list for each property. start: characters before the first."""
    offsets = [start]
    for score in scores:
        offsets.append(offsets[-1] + len(score.text))
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": [{top.text: _finite(top.logprob) for top in score.top} for score in scores],
        "text_offset": offsets[:-1],
    }


def _finite(logprob: float) -> float:
    return max(logprob, UNLIKELY)
