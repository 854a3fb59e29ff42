"""What a server lists under /models: names, aliases, and how large each model's context is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from threading import Event
from typing import Any

from dbrx_cli.engine.chunks import whole
from dbrx_cli.engine.http_client import LARGEST_COUNT, Forbidden, NoPath, OneReply, Passing, Refused, Server, persist
from model.errors import DbrxError
from model.hub.retry import FEW_TRIES

# Of vLLM, OpenRouter, Groq, Mistral, LM Studio, tabbyAPI, llama.cpp, this program and LiteLLM; `n_ctx_train`, for
# which a model was made, is none of them.
CONTEXT_KEYS = (
    "max_model_len", "context_length", "context_window", "max_context_length", "loaded_context_length", "max_seq_len",
    "n_ctx", "context", "max_input_tokens",
)  # fmt: skip
TOLD = 8  # names in a notice


@dataclass(frozen=True)
class Listing:
    """The models that a server lists; none where it has no such list."""

    entries: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, server: Server, named: bool, notice: Callable[[str], None]) -> tuple[Listing, Server]:
        """Ask under each base of the server; the list, and the server with the base that has one.

        If there is no list (many servers have none, or show it to some keys only) and a model was named, nothing is
        wrong yet. Else a fault tells why there is none.
        """
        missing: list[DbrxError] = []
        garbled = 0
        for one in server.each():
            try:
                tries = FEW_TRIES if named else None
                entries = _entries(persist(partial(one.get, "models"), notice, Event(), tries=tries))
            except (NoPath, Forbidden, Refused, OneReply) as fault:
                if isinstance(fault, Passing) and not named:  # which has cost time enough
                    missing.insert(0, fault)
                    break
                missing.append(fault)
                continue
            if entries is not None:
                return cls(entries), one
            missing.append(one.no_server())
            garbled += 1
        if named and garbled < len(missing):
            return cls(), server
        first = missing[0]
        raise type(first)(first.message, f"{first.hint}; if it has no list of models, name one with -m")

    @property
    def names(self) -> list[str]:
        """Of all models."""
        return [str(entry["id"]) for entry in self.entries]

    @property
    def summary(self) -> str:
        """The first names, as a notice tells them."""
        more = len(self.entries) - TOLD
        return ", ".join(self.names[:TOLD]) + (f" and {more} more" if more > 0 else "")

    def find(self, name: str) -> dict[str, Any] | None:
        """The entry that answers to a name: its own, an alias, one with `latest` for a tag, or a pattern (LiteLLM)."""
        for fits in (
            lambda entry: name in (entry["id"], *_aliases(entry)),
            lambda entry: f"{name}:latest" == entry["id"] or name == f"{entry['id']}:latest",
            lambda entry: "*" in entry["id"] and fnmatchcase(name, entry["id"].replace("[", "[[]")),
        ):
            if found := next(filter(fits, self.entries), None):
                return found
        return None


def context_of(entry: dict[str, Any]) -> int | None:
    """The context in tokens, if the entry tells it: the least, where it tells several (a provider's, the model's)."""
    told = [parts.get(key) for parts in _parts(entry) for key in CONTEXT_KEYS]
    return min((n for n in told if type(n) is int and 0 < n < LARGEST_COUNT), default=None)


def _parts(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry and the objects in it: llama.cpp's `meta`, OpenRouter's `top_provider`, GitHub's `limits`."""
    yield entry
    yield from (value for value in entry.values() if isinstance(value, dict))


def _aliases(entry: dict[str, Any]) -> list[Any]:
    aliases = entry.get("aliases")
    return aliases if isinstance(aliases, list) else []


def _entries(answer: Any) -> tuple[dict[str, Any], ...] | None:
    """The models of an answer: OpenAI's form, or the bare list; None if it is neither.

    What cannot be written is no name.
    """
    if isinstance(answer, dict) and "data" in answer:
        answer = answer["data"] or []
    elif isinstance(answer, dict) and isinstance(answer.get("models"), list):
        answer = answer["models"]
    if not isinstance(answer, list):
        return None
    entries = [{"id": model} if isinstance(model, str) else model for model in answer]
    entries = [{"id": model.get("name"), **model} for model in entries if isinstance(model, dict)]
    return tuple(model for model in entries if isinstance(model["id"], str) and whole(model["id"]) == model["id"])
