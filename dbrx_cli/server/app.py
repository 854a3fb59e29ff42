"""The routes: each path with and without /v1, with and without a slash at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dbrx_cli.engine import Done
from dbrx_cli.server.errors import ApiError, of_reply
from dbrx_cli.server.openapi import document
from dbrx_cli.server.replies import ChatForm, Form, TextForm
from dbrx_cli.server.requests import LARGEST_BODY, Asked, Read, read_chat, read_text
from dbrx_cli.server.safety import Guard
from dbrx_cli.server.service import Service
from dbrx_cli.server.streaming import send_events, watching
from dbrx_cli.server.tickets import Gone, Mailbox, OverTime, Ticket

BODY_SECONDS = 60.0  # in which a body must have come
Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, guard: Guard, cut: Callable[[Scope], None]) -> ASGIApp:
    """All of the server's paths behind its guard. cut: breaks off a connection."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        service.named(request.path_params["name"].rstrip("/"))
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        _ = service.engine
        return JSONResponse({"status": "draining" if service.draining else "ok"})

    async def metrics(request: Request) -> Response:
        return Response(await service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(service.names))

    chat = Completions(service, read_chat, ChatForm, "messages", cut)
    text = Completions(service, read_text, TextForm, "prompt", cut)
    routes = [
        *_routes("/models", models, "GET"),
        *_routes("/models/{name:path}", model, "GET"),
        *_routes("/chat/completions", chat, "POST"),
        *_routes("/completions", text, "POST"),
        *_routes("/health", health, "GET"),
        *_routes("/metrics", metrics, "GET"),
        Route("/openapi.json", openapi),
    ]
    app = Starlette(routes=routes, exception_handlers={ApiError: _told, HTTPException: _told_http})
    app.router.redirect_slashes = False
    return guard.around(app, service.metrics)


class Completions:
    """An endpoint that answers with replies. An ASGI application, as what it sends depends on what is received."""

    def __init__(
        self, service: Service, read: Read, form: type[Form], param: str, cut: Callable[[Scope], None]
    ) -> None:
        """param: the field that holds the prompt."""
        self._service, self._read, self._form, self._param, self._cut = service, read, form, param, cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        engine = service.engine
        try:
            body = await _body(Request(scope, receive))
        except ClientDisconnect:
            return  # nobody is there who could be told
        asked = self._read(body, engine.defaults)
        form = self._form(service.named(asked.model), engine.tokenizer, asked)
        mailbox = Mailbox(asked.stream)
        try:
            async with (
                watching(receive, mailbox),
                service.tickets(asked.requests, mailbox, self._param) as tickets,
            ):
                if asked.stream:
                    await send_events(self._chunks(tickets, mailbox, form, asked), scope, send, self._cut)
                    return
                async for _ in self._events(tickets, mailbox):
                    pass
                service.metrics.note(tickets, asked.n)
        except Gone:
            return  # nobody is there who could be told
        await JSONResponse(form.answer(tickets))(scope, receive, send)

    async def _events(self, tickets: list[Ticket], mailbox: Mailbox) -> AsyncIterator[Any]:
        try:
            async for event in mailbox.events(len(tickets)):
                yield event
        except (Gone, asyncio.CancelledError):
            raise
        except OverTime:
            limit = f"{self._service.limits.seconds:g} s"
            raise ApiError(f"the reply was not complete within {limit}; ask for fewer tokens", code="timeout") from None
        except Exception as fault:
            raise of_reply(fault) from None

    async def _chunks(
        self, tickets: list[Ticket], mailbox: Mailbox, form: Form, asked: Asked
    ) -> AsyncIterator[dict[str, Any] | None]:
        for ticket in tickets:
            yield form.begin(ticket)
        async for event in self._events(tickets, mailbox):
            if event is None:
                yield None
                continue
            ticket, what = event
            yield form.end(ticket, what) if isinstance(what, Done) else form.chunk(ticket, what)
        self._service.metrics.note(tickets, asked.n)
        if asked.tells_usage:
            yield form.total(tickets)


def _routes(path: str, handler: Any, method: str) -> list[Route]:
    slashes = ("",) if path.endswith(":path}") else ("", "/")
    methods = None if method == "GET" else [method]
    return [Route(f"{head}{path}{slash}", handler, methods=methods) for head in ("/v1", "") for slash in slashes]


async def _body(request: Request) -> bytes:
    """The whole body, in bounds of size and time; `ApiError`."""
    body = bytearray()
    too_large = ApiError(f"the body has more than {LARGEST_BODY} bytes", 413, headers={"connection": "close"})
    if int(request.headers.get("content-length", 0)) > LARGEST_BODY:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            f"the body has not come within {BODY_SECONDS:g} s", 408, headers={"connection": "close"}
        ) from None
    return bytes(body)


def _model(service: Service) -> dict[str, Any]:
    context = service.engine.context
    return {
        "id": service.names[0],
        "object": "model",
        "created": service.created,
        "owned_by": "dbrx",
        "aliases": list(service.names[1:]),
        "max_model_len": context,
        "meta": {"n_ctx": context},
    }


async def _told(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, ApiError)
    return JSONResponse(fault.body, fault.status, fault.headers)


async def _told_http(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    path = request.url.path[:200]
    what = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}.get(fault.status_code)
    told = ApiError(what or fault.detail, fault.status_code)
    return JSONResponse(told.body, fault.status_code, fault.headers)
