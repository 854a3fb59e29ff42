"""DBRX in `llm` (entry point `llm`): the models on this machine, and the one of a server.

`dbrx/NAME` is computed in this process, `dbrx/server` by the server that DBRX_URL names. llm keeps the log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

import llm
from pydantic import Field, create_model

from dbrx_cli.complete import model_names
from dbrx_cli.options import DEFAULT_MODEL, EngineOptions, OutputOptions, SamplingOptions, WhichModel
from model.errors import DbrxError

if TYPE_CHECKING:
    from dbrx_cli.engine import Engine, Request

SERVER = "server"
NOT_OFFERED = {field.name for field in fields(WhichModel)} | {"url"}


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """What llm calls when it starts."""
    names = dict.fromkeys(model_names(""))
    if named := os.environ.get("DBRX_MODEL"):
        names[named] = None
    for name in names:
        register(Dbrx(f"dbrx/{name}", name))
    if url := os.environ.get("DBRX_URL"):
        register(Dbrx(f"dbrx/{SERVER}", named or DEFAULT_MODEL, url))


def _options() -> Any:
    """The flags of model and sampling as options of llm, whose values are single texts."""
    offered: dict[str, Any] = {}
    for group in (EngineOptions, SamplingOptions):
        plain, annotated = get_type_hints(group), get_type_hints(group, include_extras=True)
        for name in (field.name for field in fields(group) if field.name not in NOT_OFFERED):
            kind = str if name == "stop" else plain[name]
            offered[name] = (kind | None, Field(default=None, description=annotated[name].__metadata__[0].help))
    return create_model("Options", __base__=llm.Options, **offered)


class Dbrx(llm.Model):  # type: ignore[misc]
    """One model; its engine stays open between the turns of `llm chat`."""

    can_stream = True
    supports_schema = True
    Options = _options()

    def __init__(self, model_id: str, name: str, url: str | None = None) -> None:
        self.model_id = model_id
        self.name = name
        self.url = url
        self._opened: tuple[EngineOptions, Engine] | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The reply, piece by piece; `llm.ModelError` has a fault's one line."""
        from dbrx_cli.engine import Done

        given = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        try:
            engine = self._engine(given)
            for part in engine.stream(self._request(prompt, given, engine)):
                if not isinstance(part, Done):
                    yield part.text
                    continue
                usage = part.usage
                response.set_usage(
                    input=usage.prompt_tokens,
                    output=usage.completion_tokens,
                    details={"cached_tokens": usage.cached_tokens} if usage.cached_tokens else None,
                )
                if part.error is not None:
                    raise part.error
        except DbrxError as error:
            raise llm.ModelError(error.one_line) from None

    def _engine(self, given: dict[str, Any]) -> Engine:
        from dbrx_cli.engine.choose import open_engine
        from dbrx_cli.report import Report

        own = {field.name for field in fields(EngineOptions)}
        options = EngineOptions(
            model=self.name, url=self.url, **{name: value for name, value in given.items() if name in own}
        )
        if self._opened is None or self._opened[0] != options:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = None  # before the next one takes its memory
            self._opened = options, open_engine(options, Report(OutputOptions()))
        return self._opened[1]

    def _request(self, prompt: Any, given: dict[str, Any], engine: Engine) -> Request:
        from dbrx_cli.engine import Constraint, Request
        from model.constrain import read_schema

        own = {field.name for field in fields(SamplingOptions)}
        sampling = {name: value for name, value in given.items() if name in own}
        stop = sampling.pop("stop", None)
        constraint = None
        if prompt.schema:
            constraint = Constraint(read_schema(json.dumps(prompt.schema), "--schema"))
        return Request(
            messages_of(prompt.messages),
            SamplingOptions(**sampling).over(engine.defaults),
            SamplingOptions(stop=None if stop is None else [stop]).stop_strings,
            constraint=constraint,
        )


def messages_of(chain: Iterable[Any]) -> list[Any]:
    """llm's messages as ours. A turn may say the system message again: the last one counts, and stands first."""
    from model.messages import Message

    turns, system = [], []
    for message in chain:
        content = "".join(getattr(part, "text", "") for part in message.parts)
        if message.role == "system":
            system = [Message("system", content)]
        else:
            turns.append(Message(message.role, content))
    return system + turns
