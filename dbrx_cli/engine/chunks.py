"""What the parts of a streamed reply say, in the forms that servers give them."""

from __future__ import annotations

import math
from typing import Any

from dbrx_cli.engine import UNLIKELY, FinishReason, Likelihood, TokenLogprob
from dbrx_cli.engine.http_client import TRY_AGAIN, OneReply, Server, words_of
from model.json_text import parse

REASONS: dict[str, FinishReason] = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "complete": "stop",
    "stop_string": "stop_string", "stop_sequence": "stop_string",
    "length": "length", "max_tokens": "length", "model_length": "length", "max_length": "length",
}  # fmt: skip


def read_chunk(server: Server, name: str, data: str) -> dict[str, Any]:
    """The object of an event, empty if it is of a foreign kind; `DbrxError` if it tells an error, or is nonsense."""
    try:
        chunk = parse(data.encode())
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        if name == "error":
            raise OneReply(f"{server.host} gave up: {server.said(data)}", TRY_AGAIN)
        if name not in ("", "message"):  # such as ping
            return {}
        raise OneReply(f"{server.host} sent what is no part of a reply", "check --url")
    if name == "error" or chunk.get("error") or not isinstance(chunk.get("choices", []), list | None):
        raise _error(server, chunk)
    if "choices" not in chunk and (chunk.get("object") == "error" or chunk.get("message") or chunk.get("detail")):
        raise _error(server, chunk)
    if not all(isinstance(choice, dict) for choice in chunk.get("choices") or []):
        raise OneReply(f"{server.host} sent what is no part of a reply", "check --url")
    return chunk


def _error(server: Server, chunk: dict[str, Any]) -> Exception:
    error = chunk.get("error")
    inner = error if isinstance(error, dict) else chunk
    said = words_of(chunk)
    code = inner.get("code", inner.get("status_code"))
    if isinstance(code, int) and 400 <= code < 500:  # a refusal that came too late for a status
        return server.refusal(code, said)
    return OneReply(f"{server.host} gave up: {server.said(said)}", TRY_AGAIN)


def text_of(choice: dict[str, Any]) -> str:
    """New text: of a chat, of a plain completion, or of a whole answer."""
    for key in ("delta", "message"):
        if isinstance(choice.get(key), dict):
            return _joined(choice[key].get("content"))
    return _joined(choice.get("text"))


def thinks(choice: dict[str, Any]) -> bool:
    """Whether the model was thinking, which is no part of its reply."""
    delta = choice.get("delta") or choice.get("message")
    return isinstance(delta, dict) and bool(delta.get("reasoning_content") or delta.get("reasoning"))


def _joined(content: Any) -> str:
    """Text, or a list of parts of which some hold text."""
    if isinstance(content, list):
        return "".join(_joined(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def reason_of(server: Server, choice: dict[str, Any]) -> FinishReason | None:
    """Why the reply ended, if it has; what cut it off in any other way is a fault."""
    given = choice.get("finish_reason")
    if given in (None, "", "null"):
        return None
    reason = REASONS.get(given.lower()) if isinstance(given, str) else None
    if reason is None:
        raise OneReply(f"{server.host} cut the reply off: {server.said(str(given))}", TRY_AGAIN)
    if reason == "stop" and isinstance(choice.get("stop_reason"), str):  # some tell which stop string it was
        return "stop_string"
    return reason


def ids_of(choice: dict[str, Any]) -> list[int]:
    """The new tokens, where the server tells them (vLLM)."""
    ids = choice.get("token_ids")
    return [id for id in ids if type(id) is int] if isinstance(ids, list) else []


def logprobs_of(choice: dict[str, Any]) -> list[TokenLogprob]:
    """The new tokens' likelihoods: in the chat's form, or in that of plain completions."""
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return []
    if isinstance(told.get("content"), list):
        return [found for entry in told["content"] if (found := _token(entry))]
    columns = [told.get(key) for key in ("tokens", "token_logprobs", "top_logprobs")]
    tokens, values, tops = (column if isinstance(column, list) else [] for column in columns)
    tops += [None] * (len(tokens) - len(tops))
    entries = [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [{"token": t, "logprob": n} for t, n in top.items()] if isinstance(top, dict) else [],
        }
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]
    return [found for entry in entries if (found := _token(entry))]


def _token(entry: Any) -> TokenLogprob | None:
    own = _likelihood(entry)
    if own is None:
        return None
    top = entry.get("top_logprobs")
    best = [found for one in top if (found := _likelihood(one))] if isinstance(top, list) else []
    best.sort(key=lambda one: -one.logprob)
    return TokenLogprob(own.token_id, own.text, own.logprob, best)


def _likelihood(entry: Any) -> Likelihood | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return None
    value, id = entry.get("logprob"), entry.get("id")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except OverflowError:  # an int with hundreds of digits
        value = UNLIKELY
    return Likelihood(
        id if type(id) is int else None, whole(entry["token"]), value if math.isfinite(value) else UNLIKELY
    )


def whole(text: str) -> str:
    """Text that can be written: a half of a surrogate pair alone becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
