"""The OpenAPI document, from the schemas that check requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbrx_cli import __version__
from dbrx_cli.server.schemas import CHAT, TEXT, Schema, fields, items, text

ANY_OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
USAGE = fields(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), WHOLE), "total_tokens")
ERROR = fields(
    {
        "error": fields(
            {
                "message": text(),
                "type": text(),
                "param": {"anyOf": [text(), NULL]},
                "code": {"anyOf": [text(), NULL]},
            },
            "message",
            "type",
        )
    },
    "error",
)
MODEL = fields(
    {"id": text(), "object": text(enum=["model"]), "created": WHOLE, "owned_by": text(), "max_model_len": WHOLE},
    "id",
    "object",
    "created",
    "owned_by",
)
ANSWER = fields(
    {"id": text(), "object": text(), "created": WHOLE, "model": text(), "choices": items(ANY_OBJECT, 1),
     "usage": USAGE},
    "id", "object", "created", "model", "choices", "usage",
)  # fmt: skip


def document(names: Sequence[str]) -> dict[str, Any]:
    """OpenAPI 3.1. names: of the model that is served."""
    by_name = {"name": "name", "in": "path", "required": True, "schema": text(enum=[*names])}
    models = fields({"object": text(enum=["list"]), "data": items(MODEL)}, "object", "data")
    return {
        "openapi": "3.1.0",
        "info": {"title": "dbrx serve", "version": __version__},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/models": {"get": _operation("The models that are served", models)},
            "/v1/models/{name}": {"get": _operation("One model", MODEL) | {"parameters": [by_name]}},
            "/v1/chat/completions": {"post": _reply("The next message of a conversation", CHAT, names)},
            "/v1/completions": {"post": _reply("What follows a text", TEXT, names)},
            "/health": {"get": _operation("200, or 503 while the model is being loaded", ANY_OBJECT)},
            "/metrics": {"get": _operation("Figures for Prometheus", text(), "text/plain")},
        },
    }


def _operation(summary: str, schema: Schema, kind: str = "application/json") -> dict[str, Any]:
    told = {"description": "The answer.", "content": {kind: {"schema": schema}}}
    fault = {"description": "A fault.", "content": {"application/json": {"schema": ERROR}}}
    return {"summary": summary, "responses": {"200": told, "4XX": fault, "5XX": fault}}


def _reply(summary: str, schema: Schema, names: Sequence[str]) -> dict[str, Any]:
    schema = _nullable(schema)
    schema["properties"]["model"] = {"anyOf": [text(enum=[*names]), NULL]}
    operation = _operation(summary, ANSWER)
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation | {"requestBody": body}


def _nullable(schema: Schema) -> Schema:
    """The same, with null for what may be absent."""
    new = dict(schema)
    if "properties" in schema:
        required = schema["required"]
        new["properties"] = {
            name: _nullable(each) if name in required else {"anyOf": [_nullable(each), NULL]}
            for name, each in schema["properties"].items()
        }
    if "items" in schema:
        new["items"] = _nullable(schema["items"])
    if "anyOf" in schema:
        new["anyOf"] = [_nullable(each) for each in schema["anyOf"]]
    return new
