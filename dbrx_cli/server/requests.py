"""A request's JSON -> what the engine is asked for: one `Request` for each choice of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dbrx_cli.engine import Constraint, Request
from dbrx_cli.server.errors import ApiError
from dbrx_cli.server.schemas import CHAT, TEXT, check
from model.json_text import Limits, holds_half_a_pair, parse
from model.messages import Message
from model.sampling import DISTRIBUTION, MIN_TEMPERATURE, SamplingParams

LARGEST_BODY = 8 * 2**20  # bytes
LARGEST_SCHEMA = 64 * 1024  # of a response_format, as it was sent
BODY = Limits(LARGEST_BODY, 500_000)


@dataclass(frozen=True)
class Asked:
    """What a client wants to have, and in which form."""

    requests: Sequence[Request]  # `n` for each prompt
    n: int
    model: str | None
    stream: bool
    tells_usage: bool  # at the end of a stream
    tells_ids: bool


def read_json(content: bytes) -> dict[str, Any]:
    """The object of a body; `ApiError`."""
    try:
        body = parse(content, BODY)
    except ValueError as error:
        raise ApiError(f"the body {error}") from None
    if not isinstance(body, dict):
        raise ApiError("the body must be an object")
    if holds_half_a_pair(content, body):
        raise ApiError("the body is not valid Unicode: it holds half of a surrogate pair")
    return body


def read_chat(content: bytes, defaults: SamplingParams) -> Asked:
    """A body of /v1/chat/completions; `ApiError`."""
    body = check(read_json(content), CHAT)
    continues = body.get("continue_final_message", False)
    if continues and body.get("add_generation_prompt", False):
        raise ApiError("only one of continue_final_message and add_generation_prompt", param="continue_final_message")
    messages = [_message(fields, f"messages[{i}]") for i, fields in enumerate(body["messages"])]
    if continues and messages[-1].role != "assistant":
        raise ApiError("continue_final_message: the last message must be the assistant's", param="messages")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs", param="top_logprobs")
    request = Request(
        messages,
        _sampling(body, defaults),
        stop=_stop(body),
        continue_final=continues,
        constraint=_constraint(body.get("response_format", {"type": "text"})),
        logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
        logit_bias=_bias(body),
    )
    return _asked(body, [request])


def read_text(content: bytes, defaults: SamplingParams) -> Asked:
    """A body of /v1/completions; `ApiError`."""
    body = check(read_json(content), TEXT)
    given = body["prompt"]
    if isinstance(given, str):
        prompts = [given]
    elif all(isinstance(each, str) for each in given):
        prompts = given
    elif all(isinstance(each, int) for each in given):
        prompts = [given]
    else:
        raise ApiError("prompt must be a text, a list of texts, or a list of ids", param="prompt")
    params, stop, bias = _sampling(body, defaults), _stop(body), _bias(body)
    requests = [
        Request(
            prompt if isinstance(prompt, str) else "",
            params,
            prompt_ids=None if isinstance(prompt, str) else prompt,
            stop=stop,
            logprobs=body.get("logprobs"),
            logit_bias=bias,
        )
        for prompt in prompts
    ]
    return _asked(body, requests)


Read = Callable[[bytes, SamplingParams], Asked]


def _asked(body: dict[str, Any], requests: Sequence[Request]) -> Asked:
    """Each prompt `n` times; of a seed's choices each has one of its own."""
    n = body.get("n", 1)
    each = [_seeded(request, i) for request in requests for i in range(n)]
    options = body.get("stream_options", {})
    return Asked(
        each,
        n,
        body.get("model"),
        body.get("stream", False),
        options.get("include_usage", False),
        body.get("return_token_ids", False),
    )


def _seeded(request: Request, choice: int) -> Request:
    seed = request.params.seed
    if seed is None or choice == 0:
        return request
    return replace(request, params=request.params.under(seed=(seed + choice) % 2**63))


def _message(fields: dict[str, Any], at: str) -> Message:
    role, content = fields["role"], fields.get("content")
    if content is None and role != "assistant":
        raise ApiError(f"{at}.content is missing", param=f"{at}.content")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return Message("system" if role == "developer" else role, text)


def _sampling(body: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = {name: body[name] for name in DISTRIBUTION if name in body}
    given.setdefault("repetition_penalty", body.get("repeat_penalty", defaults.repetition_penalty))
    if given.get("temperature", 1) < MIN_TEMPERATURE:
        given["temperature"] = 0.0
    given["top_k"] = max(0, given.get("top_k", defaults.top_k))
    most = body.get("max_completion_tokens", body.get("max_tokens", defaults.max_tokens))
    return defaults.under(**given, seed=body.get("seed"), max_tokens=most)


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _bias(body: dict[str, Any]) -> dict[int, float]:
    bias: dict[str, float] = body.get("logit_bias", {})
    for key in bias:
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise ApiError(f"logit_bias: {key[:40]!r} is no id of a token", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _constraint(wanted: dict[str, Any]) -> Constraint | None:
    if wanted["type"] == "text":
        return None
    if wanted["type"] == "json_object":
        return Constraint({"type": "object"})
    if "json_schema" not in wanted:
        raise ApiError("response_format.json_schema is missing", param="response_format.json_schema")
    schema = wanted["json_schema"]["schema"]
    if (size := len(json.dumps(schema))) > LARGEST_SCHEMA:
        told = f"the schema has {size} bytes, more than {LARGEST_SCHEMA}"
        raise ApiError(told, param="response_format.json_schema.schema")
    return Constraint(schema)
