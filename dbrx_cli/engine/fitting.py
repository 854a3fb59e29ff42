"""Whether a finished reply fits a JSON Schema: a server may not keep to what it was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

BEGINNING = re.compile(r'\s*([\[{"\-0-9tfn]|$)')


def misfit(schema: Mapping[str, Any], text: str, ended: bool) -> str | None:
    """What is wrong with a text, None if nothing is. Of one that was cut off (not `ended`) only its beginning is known.

    Spelling and order of keys are free in JSON, but the grammar knows one of each (see `model/constrain.py`): so it
    reads the value as this module writes it.
    """
    if not ended:
        return None if BEGINNING.match(text) else "the reply is not JSON"
    from llguidance import LLMatcher, LLTokenizer

    try:
        value = _ordered(json.loads(text), schema, schema)
        written = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return "the reply is not JSON"
    grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_flexible": False})
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    return None if matcher.consume_tokens(list(written)) and matcher.is_accepting() else "the reply does not fit it"


def _ordered(value: Any, schema: Any, root: Mapping[str, Any]) -> Any:
    """A value with its keys in the order of the schema's properties, where that is plain to see."""
    if isinstance(schema, dict) and isinstance(place := schema.get("$ref"), str):
        kind, _, name = place.removeprefix("#/").rpartition("/")
        schema = root.get(kind, {}).get(name) if kind in ("$defs", "definitions") else None
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_ordered(item, schema.get("items"), root) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties")
    known = known if isinstance(known, dict) else {}
    keys = [key for key in known if key in value] + [key for key in value if key not in known]
    return {key: _ordered(value[key], known.get(key), root) for key in keys}
