"""Who may ask: the key, Host and Origin of a request, before anything reads its body."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dbrx_cli.addresses import is_loopback
from dbrx_cli.server.errors import ApiError
from model.errors import InputError

if TYPE_CHECKING:
    from dbrx_cli.server.metrics import Metrics

HOST = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::[0-9]*)?")  # a name or an address, and a port
OPEN = ("/health", "/v1/health")  # without a key: whether a server is there is no secret


class Guard:
    """What a server asks of every request.

    Without a key only this machine may ask, and no web page: its Origin, or the Host of an address that it had
    pointed here, gives it away. With a key whoever has it may ask, a page only if its origin was allowed.
    """

    def __init__(self, host: str, key: str | None, origins: Sequence[str] = ()) -> None:
        """host: where the server listens. `InputError` for one that others reach, without a key."""
        if key is None and not is_loopback(host):
            raise InputError(
                f"--host {host}: other machines reach this address, and no key protects it",
                "set DBRX_API_KEY to a long random text, or leave out --host",
            )
        self._key, self._origins = key, tuple(origin.rstrip("/") for origin in origins)

    def around(self, app: ASGIApp, metrics: Metrics) -> ASGIApp:
        """An application that answers only whom it may, and counts its answers."""
        inner = app
        if self._origins:
            inner = CORSMiddleware(app, allow_origins=self._origins, allow_methods=["GET", "POST"], allow_headers=["*"])

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":  # a WebSocket; no route takes one
                return
            told = [499]  # nginx's number of who hangs up, unless something is answered

            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    told[0] = message["status"]
                await send(message)

            try:
                self._check(scope)
            except ApiError as fault:
                await JSONResponse(fault.body, fault.status, fault.headers)(scope, receive, note)
            else:
                await inner(scope, receive, note)
            finally:
                # Paths that there are, so that strangers cannot make up as many as they like.
                path = getattr(scope.get("route"), "path", "other")
                metrics.answers.labels(path, told[0]).inc()

        return guarded

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise ApiError(f"pages of {origin[:200]} may not ask: --allow-origin lets them", 403)
        if self._key is None:
            host = headers.get("host", "")
            if not (named := HOST.fullmatch(host)) or not is_loopback(named[1]):
                raise ApiError(f"the Host {host[:200]!r} is not this machine", 403)
        elif scope["path"].rstrip("/") not in OPEN and not self._is_preflight(scope, headers):
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                raise ApiError("no key, or a wrong one", 401, code="invalid_api_key")

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        """A browser's question before a page's, which carries no key; only pages of allowed origins come this far."""
        return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
