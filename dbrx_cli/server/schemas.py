"""What a request may hold: JSON Schemas that check it here, and stand in the OpenAPI document as they are.

null means absent, and what a schema does not name is ignored, as clients send much that is meant for other servers.
"""

from __future__ import annotations

from typing import Any

from dbrx_cli.server.errors import ApiError

Schema = dict[str, Any]

MOST_CHOICES = 16
MOST_MESSAGES = 10_000
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "number": (int, float),
    "integer": (int,), "null": (type(None),),
}  # fmt: skip
A_KIND = {"object": "an object", "array": "a list", "string": "a text", "boolean": "true or false",
          "number": "a number", "integer": "a whole number", "null": "null"}  # fmt: skip


def text(**more: Any) -> Schema:
    return {"type": "string", **more}


def number(least: float, most: float, **more: Any) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most, **more}


def integer(least: int, most: int, **more: Any) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def items(of: Schema, least: int = 0, most: int | None = None, **more: Any) -> Schema:
    return {"type": "array", "items": of, "minItems": least, **({} if most is None else {"maxItems": most}), **more}


def fields(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": [*required]}


YES_OR_NO: Schema = {"type": "boolean"}
NONE_YET = items({}, 0, 0)
WHERE_STOP = text(minLength=1, maxLength=1000)
COMMON: dict[str, Schema] = {
    "model": text(description="An id that /v1/models lists, or an alias. Default: the one that is served."),
    "stream": YES_OR_NO,
    "stream_options": fields({"include_usage": YES_OR_NO}),
    "max_tokens": integer(1, 2**31, description="Of the reply; capped to what the context leaves."),
    "temperature": number(0, 2, description="0 is greedy. Default: the checkpoint's, as of all sampling."),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": integer(-1, 2**31, description="0 and -1: all tokens."),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "repeat_penalty": number(0.01, 100, description="llama.cpp's name of repetition_penalty."),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": {"anyOf": [WHERE_STOP, items(WHERE_STOP, most=16)]},
    "n": integer(1, MOST_CHOICES),
    "logit_bias": {"type": "object", "additionalProperties": number(-100, 100), "maxProperties": 1000,
                   "propertyNames": {"pattern": "^[0-9]{1,9}$"}},
    "return_token_ids": YES_OR_NO,
}  # fmt: skip
PART = fields({"type": text(enum=["text"]), "text": text()}, "type", "text")
MESSAGE = fields(
    {
        "role": text(enum=["system", "developer", "user", "assistant"]),
        "content": {"anyOf": [text(), items(PART, 1)]},
        "tool_calls": NONE_YET,
    },
    "role",
)
FORMAT = fields(
    {
        "type": text(enum=["text", "json_object", "json_schema"]),
        "json_schema": fields({"name": text(), "schema": {"type": "object"}, "strict": YES_OR_NO}, "schema"),
    },
    "type",
)
CHAT = fields(
    COMMON
    | {
        "messages": items(MESSAGE, 1, MOST_MESSAGES),
        "max_completion_tokens": COMMON["max_tokens"],
        "logprobs": YES_OR_NO,
        "top_logprobs": integer(0, 20),
        "response_format": FORMAT,
        "tools": NONE_YET,
        "functions": NONE_YET,
        "tool_choice": text(enum=["none", "auto"]),
        "continue_final_message": YES_OR_NO,
        "add_generation_prompt": YES_OR_NO,
    },
    "messages",
)
TEXT = fields(
    COMMON
    | {
        "prompt": {"anyOf": [text(minLength=1), items({"anyOf": [text(minLength=1), integer(0, 2**31)]}, 1)]},
        "logprobs": integer(0, 20),
        "echo": {"type": "boolean", "enum": [False]},
        "suffix": text(maxLength=0),
        "best_of": integer(1, 1),
    },
    "prompt",
)


def check(value: Any, schema: Schema, at: str = "") -> Any:
    """The value without fields that are null; `ApiError` names the first that does not fit."""
    for case in schema.get("anyOf", ()):
        if _is(value, case["type"]):
            return check(value, case, at)
    kinds = [case["type"] for case in schema.get("anyOf", ())] or [schema[key] for key in ("type",) if key in schema]
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise _fault(at, f"must be {' or '.join(A_KIND[kind] for kind in kinds)}, not {_shown(value)}")
    if "enum" in schema and value not in schema["enum"]:
        raise _fault(at, f"must be {' or '.join(map(_shown, schema['enum']))}, not {_shown(value)}")
    if isinstance(value, dict):
        return _check_fields(value, schema, at)
    if isinstance(value, list):
        _check_length(value, schema, at, "Items", "entries")
        return [check(each, schema["items"], f"{at}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, str):
        _check_length(value, schema, at, "Length", "characters")
    elif not isinstance(value, bool) and value is not None:
        _check_bounds(value, schema, at)
    return int(value) if schema.get("type") == "integer" else value


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()  # as JSON Schema has it
    return isinstance(value, KINDS[kind]) or whole


def _check_fields(value: dict[str, Any], schema: Schema, at: str) -> dict[str, Any]:
    """null means absent for fields that the schema names; what lies in others is none of its business."""
    known, other = schema.get("properties", {}), schema.get("additionalProperties")
    dot, new = f"{at}." if at else "", {}
    for key, each in value.items():
        if known.get(key, other) is None:
            new[key] = each
        elif each is not None or key not in known:
            new[key] = check(each, known.get(key, other), f"{dot}{key}")
    if missing := [name for name in schema.get("required", ()) if name not in new]:
        raise _fault(f"{dot}{missing[0]}", "is missing")
    if len(new) > schema.get("maxProperties", len(new)):
        raise _fault(at, f"must have at most {schema['maxProperties']} entries, not {len(new)}")
    return new


def _check_length(value: list[Any] | str, schema: Schema, at: str, of: str, unit: str) -> None:
    if schema.get(f"max{of}") == 0 and value:
        raise _fault(at, "is not supported")
    least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}", len(value))
    if not least <= len(value) <= most:
        bound = f"at least {least}" if len(value) < least else f"at most {most}"
        raise _fault(at, f"must have {bound} {unit}, not {len(value)}")


def _check_bounds(value: float, schema: Schema, at: str) -> None:
    if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
        raise _fault(at, f"must be above {schema['exclusiveMinimum']}, not {_shown(value)}")
    # NaN is in no bounds.
    if not schema.get("minimum", float("-inf")) <= value <= schema.get("maximum", float("inf")):
        raise _fault(at, f"must be {_range(schema)}, not {_shown(value)}")


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema["maximum"]
    return f"at most {high}" if low is None else f"from {low} to {high}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return A_KIND["object" if isinstance(value, dict) else "array"]
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


def _fault(at: str, what: str) -> ApiError:
    return ApiError(f"{at or 'the body'} {what}", param=at or None)
