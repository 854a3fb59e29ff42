"""Faults as the protocol tells them. Permanent ones are 4xx: clients repeat 408, 409, 429 and 5xx by themselves."""

from __future__ import annotations

from typing import Any

from model.errors import ContextError, DbrxError, InputError, ModelError, ResourceError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no reply. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_request(fault: DbrxError, param: str) -> ApiError:
    """The fault of a request that cannot be begun: whatever it is, the same request will meet it again."""
    if isinstance(fault, ContextError):  # litellm knows it by these words alone
        told = f"This model's maximum context length is exceeded: {fault.message}"
        return ApiError(told, param=param, code="context_length_exceeded")
    return ApiError(fault.message, param=param)


def of_reply(fault: BaseException) -> ApiError:
    """The fault that ended a reply."""
    if isinstance(fault, ApiError):
        return fault
    if isinstance(fault, InputError):  # a schema that cannot be kept
        return ApiError(fault.message)
    if isinstance(fault, ResourceError):
        return ApiError(fault.message, 500, code="out_of_memory")
    if isinstance(fault, ModelError):
        return ApiError(fault.message, 500, code="model_error")
    return ApiError("internal error: see what the server wrote on its terminal", 500)
